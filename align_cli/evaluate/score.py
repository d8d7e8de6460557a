"""align score: a reward model's score for every response of a file.

    align score runs/demo/rm data=answers.jsonl out=scores.jsonl

It writes scored lists (`prompt`, `responses`, `scores`), which `align rm` and `align dpo` accept as data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align_cli.compat import chat_date
from align_cli.data import chat
from align_cli.data.groups import Group, read_groups
from align_cli.errors import AlignError, DataError, RecipeError, UpstreamError, did_you_mean
from align_cli.model import kind, load, reward_head
from align_cli.recipe.sections import Data, Model
from align_cli.run import manifest
from align_cli.run.directory import write_atomically
from align_cli.training import layout

KEYS = ("data", "out", "format", "max_length", "batch_tokens")


def run(path: str, settings: list[str], say: Callable[[str], None]) -> None:
    """Score a file and write the result. Raises AlignError for user errors."""
    given = _settings(settings)
    contents = kind.look(path)
    if contents.kind == "unfinished":
        raise UpstreamError(f"{path}: is an unfinished run; run its stage again to finish it")
    if contents.kind != "reward-model" and not contents.reward:
        policies = {"causal-lm": "holds a policy", "adapter": "holds a policy's adapter"}
        finding = contents.finding or policies.get(contents.kind, "is not a directory")
        raise UpstreamError(f"{path}: {finding}; name a finished reward model such as runs/demo/rm")
    out = Path(given.get("out") or f"{Path(given['data']).stem}.scores.jsonl")
    if out.is_dir() or not out.parent.is_dir():
        raise AlignError(f"out: {out}: is a directory or not in one; name a file in an existing directory")
    groups, counts = _groups(given)
    for line in counts:
        say(line)
    made = manifest.read(path) or {}
    # the reward model was trained with this date in its template
    chat_date.use(made.get("template_date"))
    tokenizer = load.tokenizer(Model(path=path))
    model, scale = reward_head.load_run(path, tokenizer), made.get("reward", {})
    shift = torch.zeros(1) if scale.get("shift_in_weights") else torch.tensor(scale.get("shift", [0.0]))
    rows, cut = _rows(tokenizer, groups, int(given["max_length"]))
    with torch.no_grad():
        scores = layout.scored(
            rows,
            lambda inputs: model(**inputs),
            tokenizer.pad_token_id,
            tokens=int(given["batch_tokens"]),
            device=model.device,
        )
    lines, flat = [], []
    for group, values in zip(groups, scores, strict=True):
        heads = values + shift
        row: dict[str, Any] = {"prompt": group.prompt, "responses": group.responses, "scores": _plain(heads.mean(1))}
        if heads.shape[1] > 1:
            row |= {"minimum": _plain(heads.min(1).values), "spread": _plain(heads.std(1)), "heads": _plain(heads)}
        lines.append(json.dumps(row | {"place": group.place}, ensure_ascii=False))
        flat.append(heads.mean(1))
    write_atomically(out, "\n".join(lines) + "\n")
    every = torch.cat(flat)
    say(
        f"{out}: {len(groups)} prompts, {len(every)} responses, mean score {every.mean():.3f}, standard deviation "
        f"{every.std(unbiased=False):.3f}" + (f"; {cut} cut to max_length={given['max_length']}" if cut else "")
    )


def _settings(settings: list[str]) -> dict[str, str]:
    given, lines = {"max_length": "4096", "batch_tokens": "8192"}, []
    for word in settings:
        key, equals, value = word.partition("=")
        if not equals or key not in KEYS:
            near = did_you_mean(key, list(KEYS)) or f"; known: {', '.join(f'{name}=' for name in KEYS)}"
            lines.append(f"command line: unknown setting '{word}'{near}")
        elif key in ("max_length", "batch_tokens") and not (value.isdigit() and int(value)):
            lines.append(f"command line: {key} is '{value}'; give a number of tokens")
        else:
            given[key] = value
    if "data" not in given and not lines:
        lines.append("command line: data= is missing; name a file with prompts and responses")
    if lines:
        raise RecipeError(*lines)
    return given


def _groups(given: dict[str, str]) -> tuple[list[Group], list[str]]:
    """Groups with all their responses: rankings and pairs if the file has them, else single answers."""
    source = {"path": given["data"]} | ({"format": given["format"]} if "format" in given else {})
    errors = []
    for need in ("preferences", "demonstrations"):
        try:
            read = read_groups(Data(train=[source], max_dropped=1.0), need, 0)
            return read.train, [line for count in read.counts for line in count.lines()]
        except DataError as error:
            errors.append(error)
    raise errors[0]


def _rows(tokenizer: Any, groups: list[Group], max_length: int) -> tuple[list[layout.Row], int]:
    """Token ids of every group, and how many responses were cut."""
    rows, cut, lines = [], 0, []
    for group in groups:
        try:
            prompt, answers = chat.responses(tokenizer, group)
        except chat.Unrenderable as error:
            lines.append(f"{group.place}: {error}")
            continue
        if len(prompt) >= max_length:
            lines.append(f"{group.place}: the prompt has {len(prompt)} tokens; raise max_length")
        room = max_length - len(prompt)
        cut += sum(len(answer) > room for answer in answers)
        rows.append({"prompt_ids": prompt, "responses": [answer[:room] for answer in answers]})
    if lines:
        raise DataError(*lines[:20])
    return rows, cut


def _plain(values: torch.Tensor) -> list:
    return [round(value, 6) for value in values.tolist()] if values.dim() == 1 else [_plain(row) for row in values]
