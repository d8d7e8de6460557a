"""Row counts of a source, from file to tokens: rows read, used, and dropped by reason with the first place of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from align_cli.data.turns import Dropped
from align_cli.recipe.constitution import Constitution

UNREAD = 12
"""Most unread columns that are listed by name."""


@dataclass
class Count:
    """Row counts of one source; rows read = rows used + rows dropped."""

    source: str
    """Its path or hub id."""
    key: str = ""
    """Its key in the recipe, e.g. `data.train[0]`."""
    split: str = "train"
    """The source's split; only hub ids, directories and globs have splits."""
    part: dict[str, str] = field(default_factory=dict)
    """Those of `subset`, `data_dir` and `revision` that the source sets."""
    rows_read: int = 0
    rows_used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason -> `place: excerpt` of the first such row."""
    format: str = ""
    fingerprint: str = ""
    repeated: int = 0
    """Responses left out of used rows because they repeat a better response of the same row."""
    partial: bool = False
    """Whether only the first part of the source was read."""
    shared: bool = False
    """Whether the recipe names the same path more than once, so that the path alone does not identify it."""
    unread: list[str] = field(default_factory=list)
    """Columns of the source, and keys of its turns, that are not read."""
    ranked: int = 0
    """Rows whose scores are the numbers from 1 to K, as ranks are."""
    pairs: dict[str, int] = field(default_factory=dict)
    """Pairs of the used rows for each `method.pairs`, or labelled responses for each `method.split`."""

    @property
    def name(self) -> str:
        """The path, with the recipe key if the recipe names the path more than once."""
        return f"{self.source} as {self.key}" if self.shared else self.source

    def elements(self, how: str) -> int:
        """Number of rows as a trainer counts them: pairs for preferences, single responses for labels."""
        return self.pairs.get(how, self.rows_used)

    def lines(self) -> list[str]:
        """The lines for the terminal: the counts, then one line per drop reason and per warning."""
        dropped, part = sum(self.dropped.values()), ", first part only" if self.partial else ""
        head = f"{self.name} ({self.format}{part}): {self.rows_read} rows read, {self.rows_used} used"
        reasons = sorted(self.dropped.items(), key=lambda item: -item[1])
        lines = [f"  {rows} {reason}, first at {self.first[reason]}" for reason, rows in reasons]
        if self.repeated:
            lines.append(f"  {self.repeated} repeated responses left out of rows that are used")
        if self.ranked and self.ranked == self.rows_used:
            lines.append("  warning: scores are 1…K in every row; if 1 is the best, write `columns: { ranks: scores }`")
        if self.unread:
            more = f" and {len(self.unread) - UNREAD} more" if len(self.unread) > UNREAD else ""
            lines.append(f"  columns that are not read: {', '.join(self.unread[:UNREAD])}{more}")
        return [f"{head}, {dropped} dropped", *lines]

    def as_manifest(self) -> dict[str, Any]:
        """The entry of manifest.json's `data`."""
        kept = {key: getattr(self, key) for key in ("source", "rows_read", "rows_used", "dropped", "fingerprint")}
        if self.shared:
            kept |= {"key": self.key, "split": self.split}
        return (
            kept
            | self.part
            | {"format": self.format}
            | ({"repeated_responses": self.repeated} if self.repeated else {})
        )

    def drop(self, place: str, dropped: Dropped) -> None:
        """Count a row that is not used."""
        text = " ".join(dropped.example.split())
        excerpt = f"{place}: {text[:60]}…" if len(text) > 60 else f"{place}: {text}"
        self.dropped[dropped.reason] = self.dropped.get(dropped.reason, 0) + 1
        self.first.setdefault(dropped.reason, excerpt.removesuffix(": "))

    def lose(self, place: str, dropped: Dropped) -> None:
        """Count a row as dropped that was counted as used before."""
        self.rows_used -= 1
        self.drop(place, dropped)

    def too_many_dropped(self, limit: float) -> Iterator[str]:
        """A line if more than the fraction `limit` of the rows, or all rows, are dropped."""
        dropped = sum(self.dropped.values())
        if not dropped or (dropped <= limit * self.rows_read and dropped < self.rows_read):
            return
        reason, most = max(self.dropped.items(), key=lambda item: item[1])
        remedy = "correct the rows" if dropped == self.rows_read else "correct the rows or raise data.max_dropped"
        yield (
            f"{self.name}: {dropped} of {self.rows_read} rows dropped ({dropped / self.rows_read:.1%}),"
            f" data.max_dropped allows {limit:.1%}; most often: {reason} ({most}), first at {self.first[reason]};"
            f" {remedy}"
        )


def of_constitution(constitution: Constitution) -> Count:
    """The count of a constitution as a source, so that changing it makes a finished run stale."""
    number = len(constitution.principles)
    return Count(
        constitution.path, rows_read=number, rows_used=number, format="constitution", fingerprint=constitution.sha256
    )
