"""Answers of the policy as it stands, on all ranks, into a file that a kill cannot spoil.

Rank 0 appends them chunk by chunk. A chunk is always the same rows, answered together, so that a resumed run, which
drops a torn line and the chunk it stands in, ends with the very file of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer
from trl.trainer.utils import add_fused_lm_head

from align_cli.data import chat
from align_cli.methods.sampling import Sampler, respond
from align_cli.methods.watch import OrderlyStop
from align_cli.model import load
from align_cli.stages import online
from align_cli.stages.job import Job
from align_cli.stages.samples import whole

Row = dict[str, Any]
LINES = 10
"""Progress lines a file."""


class Answerer:
    """The frozen policy of a job, without a trainer: it answers, and gives log-probabilities of answers."""

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase, args: Any):
        self.job, self.tokenizer = job, tokenizer
        asked = job.recipe.generation
        self.sampler = Sampler(asked.max_new_tokens, asked.temperature, asked.top_p, asked.top_k, asked.batch)
        model = load.policy(job.recipe.model, tokenizer, dtype=job.dtype, path=job.base)
        self.ends = load.set_ends(model, chat.generation_ends(tokenizer))
        add_fused_lm_head(model, temperature=asked.temperature, outputs=("log_probs", "entropy"))
        # of a trainer only what places models: it never trains
        self.trainer = Trainer(model=online.frozen(model), args=args, processing_class=tokenizer)
        self.model, self.device = model, self.trainer.accelerator.device

    def respond(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """A response for every prompt's token ids; row i is drawn by seeds[i]. As many rows on every rank."""
        with whole(self.model, self.device), self.trainer.accelerator.autocast():
            return respond(
                self.model, prompts, seeds, sampler=self.sampler, ends=self.ends, pad=self.tokenizer.pad_token_id
            )

    def text(self, ids: list[int]) -> str:
        """A response as text, without the token that ends it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def ended(self, ids: list[int]) -> bool:
        """Whether a response ends by itself."""
        return bool(ids) and ids[-1] in self.ends

    @torch.no_grad()
    def log_probs(self, model: Any, prompts: list[list[int]], responses: list[list[int]]) -> list[tuple[float, float]]:
        """For each response its summed log-probability under `model`, and the mean entropy of its tokens, if the model
        gives one. As many rows on every rank."""
        height, found = max(online.SCORED_TOKENS // self.job.recipe.data.max_length, 1), []
        order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]) + len(responses[at]))
        with (
            whole(model, self.device) if model is self.model else contextlib.nullcontext(),
            self.trainer.accelerator.autocast(),
        ):
            for start in range(0, len(order), height):
                rows = [(prompts[at], responses[at]) for at in order[start : start + height]]
                found += self._scored(model, rows)
        return [value for _, value in sorted(zip(order, found, strict=True))]

    def _scored(self, model: Any, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, float]]:
        t = max(len(prompt) + len(response) for prompt, response in rows)
        pad, device = self.tokenizer.pad_token_id, self.device
        ids = torch.tensor([[*p, *r, *[pad] * (t - len(p) - len(r))] for p, r in rows], device=device)
        seen = torch.tensor([[1] * len(p + r) + [0] * (t - len(p + r)) for p, r in rows], device=device)
        labels = torch.tensor([[-100] * len(p) + r + [-100] * (t - len(p + r)) for p, r in rows], device=device)
        made = model(input_ids=ids, attention_mask=seen, labels=labels, fused_lm_head=True)
        sums = made.log_probs.float().sum(1).tolist()
        entropy = made.entropy.float().sum(1).tolist() if made.entropy is not None else [0.0] * len(rows)
        return [(s, e / max(len(r), 1)) for s, e, (_, r) in zip(sums, entropy, rows, strict=True)]


def collect(
    job: Job, file: Path, count: int, per_rank: int, make: Callable[[list[int]], list[Row]], label: str
) -> tuple[list[Row], int | None]:
    """`count` rows of a file, the same on every rank: those that are there, and the others as `make(indices)` gives
    them, `per_rank` at a time. Also the signal that stopped it; what was written by then stays."""
    size = per_rank * job.ranks
    found: list[Row] = shared(job, _kept(file, size, count) if job.main else None)
    if len(found) == count:
        return found, None
    if found:
        job.say(f"{label}: {len(found)} of {count} prompts are answered already ({file})")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stop, began, before, due = OrderlyStop(), time.monotonic(), len(found), 0.0
    stop.listen()
    try:
        for first in range(before, count, size):
            chunk = list(range(first, min(first + size, count)))
            mine = chunk[job.rank :: job.ranks]
            # as many rows on every rank, since ranks under ZeRO-3 generate and score together
            filled = mine + chunk[:1] * (-(-len(chunk) // job.ranks) - len(mine))
            made = _in_order(job, make(filled)[: len(mine)])
            if job.main:
                _append(file, made)
            found += made
            if len(found) >= due or len(found) == count:
                due = len(found) + count / LINES
                rate = (len(found) - before) / max(time.monotonic() - began, 1e-9)
                job.say(f"{label}: {len(found)}/{count} prompts answered · {rate:.2f} a second")
            if stop.heard(device) is not None and len(found) < count:
                return found, stop.received
    finally:
        stop.leave()
    return found, stop.received


def _kept(file: Path, size: int, count: int) -> list[Row]:
    """The rows of a file that stand there whole, in whole chunks; what follows them is cut off."""
    if not file.is_file():
        return []
    rows, ends = [], [0]
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        rows.append(row)
        ends.append(ends[-1] + len(line))
    keep = min(len(rows), count)
    keep -= keep % size if keep < count else 0
    if file.stat().st_size != ends[keep]:
        os.truncate(file, ends[keep])
    return rows[:keep]


def _append(file: Path, rows: list[Row]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        stream.flush()
        os.fsync(stream.fileno())


def _in_order(job: Job, mine: list[Row]) -> list[Row]:
    """The rows of all ranks, dealt out in turn, as one list."""
    if job.ranks == 1:
        return mine
    parts: list[Any] = [None] * job.ranks
    torch.distributed.all_gather_object(parts, mine)
    return [part[at] for at in range(len(parts[0])) for part in parts if at < len(part)]


def shared(job: Job, value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if job.ranks == 1:
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def let_go(*engines: Any) -> None:
    """Free what models and engines held, once nothing else names them."""
    for engine in engines:
        if hasattr(engine, "destroy"):
            engine.destroy()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
