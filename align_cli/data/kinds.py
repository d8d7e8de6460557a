"""Checks that a column holds only strings or only message lists; a row that holds the other kind is broken."""

from __future__ import annotations

from typing import Any

from align_cli.data import turns
from align_cli.data.turns import Broken
from align_cli.recipe.formats import COLUMNS
from align_cli.recipe.stages import RowKind

TEXTS = ("prompt", "completion", "chosen", "rejected", "responses")
"""Columns that hold strings or message lists, the same kind in all rows; a mixture means a broken conversion."""
KINDS = {turns.STRING, turns.MESSAGES}


def text_columns(name: str, need: RowKind) -> tuple[str, ...]:
    """The columns of a format that hold strings or message lists, the same kind in every row."""
    if need == "prompts":
        return ("prompt",)
    wants = {"hh": COLUMNS["preference"], "scored": (*COLUMNS["preference"], "responses")}.get(name, COLUMNS[name])
    return tuple(column for column in wants if column in TEXTS)


def note_kinds(row: dict[str, Any], place: str, columns: tuple[str, ...], seen: dict[str, tuple[str, str]]) -> None:
    """Record in `seen` the kind of each column and its first place. Raises Broken if a row holds the other kind."""
    kinds = {column: turns.kind(row.get(column)) for column in columns}
    if isinstance(row.get("responses"), list) and "responses" in kinds:
        of_row = {turns.kind(item) for item in row["responses"]}
        if len(of_row & KINDS) > 1:
            raise Broken("'responses' mixes strings and lists of messages; write all of them in one way")
        kinds["responses"] = next(iter(of_row & KINDS), "")
    pair = {kinds.get("chosen", ""), kinds.get("rejected", "")}
    if pair == KINDS:
        raise Broken(f"'chosen' is {kinds['chosen']}, 'rejected' {kinds['rejected']}; write both in one way")
    for column, what in kinds.items():
        first, where = seen.setdefault(column, (what, place)) if what in KINDS else (what, place)
        if first != what:
            raise Broken(f"'{column}' holds {what} here, but {first} at {where}; write all rows in one way")
