"""Applies a source's `columns`: our names for the file's columns, or for cells inside their objects and lists.

columns: { prompt: instruction, responses: "completions[].response" }
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from align_cli.recipe.sections import Source

Row = dict[str, Any]
STEP = re.compile(r"\[\]|\.?([^.\[\]]+)")


def renamed(
    rows: Iterator[tuple[str, Any]], source: Source, report: Callable[[str], None]
) -> Iterator[tuple[str, Row]]:
    """(place, row) with `source.columns` applied; reports rows that are not objects or lack a named cell."""
    # a column of which only an inner cell is renamed keeps its own name as well
    moved = set(source.columns.values())
    for place, row in rows:
        if not isinstance(row, dict):
            report(f'{place}: the row is a {type(row).__name__}, not an object; write {{"column": value, …}}')
            continue
        cells, missing = {}, None
        for ours, theirs in source.columns.items():
            try:
                cells[ours] = row[theirs] if theirs in row else reach(row, theirs)
            except LookupError:
                missing = missing or theirs
        if missing:
            report(f"{place}: no column '{missing}' (has {', '.join(row)}); correct `columns` of the source or the row")
            continue
        kept = {name: value for name, value in row.items() if name not in moved} if moved else row
        yield place, kept | cells


def reach(value: Any, path: str) -> Any:
    """The cell at a path; `a.b[].c` is key c of each entry of the list under key b of a. Raises LookupError."""
    steps = [match[1] for match in STEP.finditer(path)]
    return _reach(value, steps)


def _reach(value: Any, steps: list[str | None]) -> Any:
    for at, step in enumerate(steps):
        if step is None:
            if not isinstance(value, list):
                raise LookupError(step)
            return [_reach(entry, steps[at + 1 :]) for entry in value]
        if not isinstance(value, dict) or step not in value:
            raise LookupError(step)
        value = value[step]
    return value
