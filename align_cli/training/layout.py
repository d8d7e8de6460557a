"""Packs groups of token ids into model inputs, with the positions at which the responses end.

Two layouts that give the same scores:
  shared  a group is one row, [prompt][response 1]…[response K]; each response sees the prompt and itself (4-D mask),
          and its positions start at the prompt's end. The prompt goes through the model once, not K times.
  rows    a response is one row, [prompt][response], padded on the right; for models without support for 4-D masks.

Shapes: b groups, k responses of a group (padded to the largest), t tokens of a row, n rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
"""`prompt_ids` and `responses`, the latter a list of lists of token ids."""


@dataclass
class Packed:
    """A micro-batch of groups."""

    inputs: dict[str, Tensor]
    """Model inputs: input_ids (n, t), attention_mask (n, t) or (n, 1, t, t), position_ids, ends (n, e)."""
    there: Tensor
    """(b, k) whether the response exists; False for padding."""
    tokens: int
    """Tokens that are not padding."""

    def regroup(self, values: Tensor) -> Tensor:
        """(n, e, …) values at the responses' ends -> (b, k, …), 0 for padded responses."""
        if values.shape[:2] == self.there.shape:
            return values * self.there.view(*self.there.shape, *[1] * (values.dim() - 2)).to(values.dtype)
        grouped = values.new_zeros(*self.there.shape, *values.shape[2:])
        grouped[self.there] = values[:, 0]
        return grouped

    def predicting(self, rows: list[Row]) -> Tensor:
        """(n, t) mask of positions whose next token belongs to the same response: all response tokens but the last."""
        positions = torch.zeros(self.inputs["input_ids"].shape, dtype=torch.bool)
        ends, lengths = self.inputs["ends"].tolist(), [[len(response) for response in row["responses"]] for row in rows]
        if self.inputs["ends"].shape != self.there.shape:  # one response per row
            lengths = [[length] for group in lengths for length in group]
        for at, (lasts, counts) in enumerate(zip(ends, lengths, strict=True)):
            for last, count in zip(lasts, counts, strict=False):
                positions[at, last - count + 1 : last] = True
        return positions.to(self.there.device)


def shared(rows: list[Row], pad: int, device: torch.device | str = "cpu") -> Packed:
    """One row per group; the prompt is in it once."""
    k = max(len(row["responses"]) for row in rows)
    flat, positions, owners, ends = [], [], [], []
    for row in rows:
        prompt = row["prompt_ids"]
        ids, places, owner, last = list(prompt), list(range(len(prompt))), [0] * len(prompt), []
        for number, response in enumerate(row["responses"], 1):
            ids += response
            places += range(len(prompt), len(prompt) + len(response))
            owner += [number] * len(response)
            last.append(len(ids) - 1)
        flat.append(ids)
        positions.append(places)
        owners.append(owner)
        ends.append(last + [0] * (k - len(last)))
    owner = _padded(owners, -1, device)
    t = owner.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool, device=device).tril()
    sees = (owner.unsqueeze(1) == 0) | (owner.unsqueeze(1) == owner.unsqueeze(2))
    # padding attends to padding, since a mask row without any entry gives NaN
    mask = (sees & causal & ((owner.unsqueeze(1) >= 0) | (owner.unsqueeze(2) < 0))).unsqueeze(1)
    inputs = {
        "input_ids": _padded(flat, pad, device),
        "attention_mask": mask,
        "position_ids": _padded(positions, 0, device),
        "ends": torch.tensor(ends, device=device),
    }
    return Packed(inputs, _there(rows, k, device), sum(map(len, flat)))


def separate(rows: list[Row], pad: int, device: torch.device | str = "cpu") -> Packed:
    """One row per response."""
    flat = [row["prompt_ids"] + response for row in rows for response in row["responses"]]
    lengths = torch.tensor([len(ids) for ids in flat], device=device)
    ids = _padded(flat, pad, device)
    inputs = {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(1)).long(),
        "ends": lengths.unsqueeze(1) - 1,
    }
    k = max(len(row["responses"]) for row in rows)
    return Packed(inputs, _there(rows, k, device), int(lengths.sum()))


LAYOUTS: dict[str, Callable[..., Packed]] = {"shared": shared, "rows": separate}


def scored(
    rows: list[Row],
    forward: Callable[[dict[str, Tensor]], Tensor],
    pad: int,
    *,
    tokens: int,
    device: torch.device | str,
    even: Callable[[list[list[int]]], list[list[int]]] = lambda parts: parts,
) -> list[Tensor]:
    """Per group the (k, h) float32 scores of its responses, on the CPU. Runs one row per response, at most `tokens`
    tokens at a time.

    `forward` gives the (n, 1, h) scores of a micro-batch's inputs. `even` may repeat micro-batches where all ranks must
    run the same number.
    """
    scores: dict[int, Tensor] = {}
    for part in even(fill(rows, "rows", tokens)):
        packed = separate([rows[at] for at in part], pad, device)
        for at, values in zip(part, packed.regroup(forward(packed.inputs)).float().cpu(), strict=True):
            scores[at] = values[: len(rows[at]["responses"])]
    return [scores[at] for at in range(len(rows))]


def size(row: Row, layout: str) -> tuple[int, int]:
    """(model rows of a group, tokens of its longest row)."""
    lengths = [len(response) for response in row["responses"]]
    if layout == "shared":
        return 1, len(row["prompt_ids"]) + sum(lengths)
    return len(lengths), len(row["prompt_ids"]) + max(lengths)


def fill(rows: list[Row], layout: str, tokens: int) -> list[list[int]]:
    """Indices of the groups in micro-batches of at most `tokens` tokens, padding included. Sorted longest first, so
    that groups of a micro-batch have similar lengths. A group is never split: one over the limit is a micro-batch of
    its own."""
    order = sorted(range(len(rows)), key=lambda at: (-size(rows[at], layout)[1], at))
    batches: list[list[int]] = []
    height = width = 0
    for at in order:
        count, length = size(rows[at], layout)
        if batches and (height + count) * max(width, length) <= tokens:
            batches[-1].append(at)
            height, width = height + count, max(width, length)
        else:
            batches.append([at])
            height, width = count, length
    return batches


def _padded(lists: list[list[int]], value: int, device: torch.device | str) -> Tensor:
    t = max(map(len, lists))
    return torch.tensor([row + [value] * (t - len(row)) for row in lists], device=device)


def _there(rows: list[Row], k: int, device: torch.device | str) -> Tensor:
    counts = torch.tensor([len(row["responses"]) for row in rows], device=device)
    return torch.arange(k, device=device) < counts.unsqueeze(1)
