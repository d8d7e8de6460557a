"""What became of a source's rows from the file to the tokens: read, used, dropped for which reason, where first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from align_cli.data.turns import Dropped
from align_cli.recipe.constitution import Constitution

UNREAD = 12
"""Columns that are listed by name."""


@dataclass
class Count:
    """The rows of one source; rows read = rows used + rows dropped."""

    source: str
    """Its path or hub id."""
    key: str = ""
    """Where the recipe names it: `data.train[0]`."""
    split: str = "train"
    """Of a hub id or of a `datasets` directory."""
    rows_read: int = 0
    rows_used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason -> `place: excerpt` of the first such row."""
    format: str = ""
    fingerprint: str = ""
    repeated: int = 0
    """Responses left out of rows that are used, since they repeat a better one of the same row."""
    partial: bool = False
    """Whether only the first part of the source was read."""
    shared: bool = False
    """Whether the recipe names the same path more than once, so that the path alone does not tell which this is."""
    unread: list[str] = field(default_factory=list)
    """Columns of the source, and keys of its turns, that are not read."""
    ranked: int = 0
    """Rows whose scores are the numbers from 1 to K, as ranks are."""
    pairs: dict[str, int] = field(default_factory=dict)
    """Pairs that the rows used give, by `method.pairs`, or labelled responses, by `method.split`."""

    @property
    def name(self) -> str:
        """The path, and the recipe's key where the path alone could be another source."""
        return f"{self.source} as {self.key}" if self.shared else self.source

    def elements(self, how: str) -> int:
        """What a trainer counts as rows: pairs, for preferences; single responses, for labels."""
        return self.pairs.get(how, self.rows_used)

    def lines(self) -> list[str]:
        """A line for the screen, and one for every reason to drop."""
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
        return kept | {"format": self.format} | ({"repeated_responses": self.repeated} if self.repeated else {})

    def drop(self, place: str, dropped: Dropped) -> None:
        """Count a row that is not used."""
        text = " ".join(dropped.example.split())
        excerpt = f"{place}: {text[:60]}…" if len(text) > 60 else f"{place}: {text}"
        self.dropped[dropped.reason] = self.dropped.get(dropped.reason, 0) + 1
        self.first.setdefault(dropped.reason, excerpt.removesuffix(": "))

    def lose(self, place: str, dropped: Dropped) -> None:
        """Count a row that was used so far as dropped."""
        self.rows_used -= 1
        self.drop(place, dropped)

    def too_many_dropped(self, limit: float) -> Iterator[str]:
        """A line if more than `limit` of the rows are dropped, or all."""
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
    """A constitution as a source, so that a changed one makes a finished run stale."""
    number = len(constitution.principles)
    return Count(
        constitution.path, rows_read=number, rows_used=number, format="constitution", fingerprint=constitution.sha256
    )
