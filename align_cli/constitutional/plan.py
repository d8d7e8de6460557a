"""Checks of `align cai` before it starts (its constitution and rows of an earlier run), and its number of training
steps. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align_cli.data.count import of_constitution
from align_cli.data.groups import Count
from align_cli.recipe import constitution
from align_cli.recipe.constitutional import NEEDS_PHASE, CaiMethod, CaiRecipe

COLUMNS = {
    "answers": ("row", "kind", "prompt", "answer"),
    "revisions": ("row", "kind", "prompt", "answer", "chain", "revision"),
    "pairs": ("row", "kind", "prompt", "answers"),
}
"""Required keys of the rows of each file."""


def constitution_problems(method: CaiMethod) -> tuple[list[str], list[Count]]:
    """Problems of the constitution, or its count if there are none. The count makes a run stale if it changes."""
    kinds = ["red-team", *(["harmless"] if method.harmless else [])]
    if lines := constitution.problems(method.constitution, kinds):
        return lines, []
    return [], [of_constitution(constitution.load(method.constitution))]


def row_problems(method: CaiMethod) -> list[str]:
    """Reasons why the files of `method.rows` cannot replace the skipped phases."""
    if method.rows is None:
        return []
    phases = {NEEDS_PHASE[phase] for phase in method.phases if phase in NEEDS_PHASE} - set(method.phases)
    if "pairs" in method.phases and method.pairs == "revised" and "revisions" not in method.phases:
        phases.add("revisions")
    return [line for phase in sorted(phases & set(COLUMNS)) for line in _file_problems(Path(method.rows), phase)]


def _file_problems(folder: Path, phase: str) -> Iterator[str]:
    file = folder / f"{phase}.jsonl"
    if not file.is_file():
        yield f"method.rows: {file}: no such file; name a directory that holds it, or add {phase} to method.phases"
        return
    seen: set[Any] = set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            yield f"{file}:{number}: not valid JSON ({error}); correct or remove the line"
            continue
        missing = [name for name in COLUMNS[phase] if not isinstance(row, dict) or name not in row]
        if missing:
            yield f"{file}:{number}: lacks {', '.join(missing)}; write what `align cai` writes, or remove the line"
        elif row["row"] in seen:
            yield f"{file}:{number}: row {row['row']} occurs twice; remove one"
        else:
            seen.add(row["row"])


def steps(recipe: CaiRecipe, counts: list[Count], batch: int) -> int | None:
    """Number of optimizer steps if every revision can be used; None without training or if a count is unknown.

    `counts` are those of data.train, method.harmless and method.helpful, then the constitution's.
    """
    method = recipe.method
    if "train" not in method.phases:
        return None
    prompts, helpful = [*recipe.data.train, *(method.harmless or [])], method.helpful or []
    if len(counts) != len(prompts) + len(helpful) + 1:
        return None
    revised = sum(count.rows_used * source.weight for count, source in zip(counts, prompts, strict=False))
    mixed = sum(count.rows_used * source.weight for count, source in zip(counts[len(prompts) :], helpful, strict=False))
    rows = revised * (method.revisions if method.train_on == "all" else 1) + mixed
    if isinstance(recipe.data.eval, float):
        rows *= 1 - recipe.data.eval
    return math.ceil(math.ceil(round(rows) / batch) * recipe.trainer.get("num_train_epochs", 3.0))
