"""What a stage is given and what it hands back. The worker writes the manifest from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from align_cli.data.chat import Tally
from align_cli.data.groups import Count
from align_cli.errors import DataError, raise_all
from align_cli.recipe.schema import Recipe
from align_cli.run.directory import RunDirectory


@dataclass
class Job:
    """One stage's run on one rank."""

    recipe: Recipe
    run: RunDirectory
    dtype: str
    per_device: int
    accumulation: int
    rank: int
    ranks: int
    console: Console
    cache: Path
    """Shared by runs: the reference's log-probabilities."""
    base: str
    """Where the policy's weights are read: the recipe's path, or an adapter parent merged into this run."""
    reference: str | None = None
    """Where another reference's weights are read; None for the policy as it starts."""

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.main:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)


@dataclass
class Outcome:
    """What a stage leaves for the manifest."""

    metrics: dict[str, Any]
    counts: list[Count] = field(default_factory=list)
    stopped_by: int | None = None
    """Signal that ended training early; such a run is not finished."""
    extra: dict[str, Any] = field(default_factory=dict)


def fold_in(counts: list[Count], tally: Tally, max_dropped: float) -> list[str]:
    """Move what was dropped on the way to tokens into the counts of its source; lines for the screen.

    Raises DataError if more than `max_dropped` of a source's rows are lost by now, or all of them.
    """
    lines, problems = [], []
    for count in counts:
        lost_here = tally.dropped.pop(count.source, Counter())
        for reason, number in lost_here.items():
            count.dropped[reason] = count.dropped.get(reason, 0) + number
            count.rows_used -= number
            count.first.setdefault(reason, tally.first[(count.source, reason)])
        lines += count.lines()
        lost = count.rows_read - count.rows_used
        if lost_here and (lost > max_dropped * count.rows_read or count.rows_used <= 0):
            reason, number = lost_here.most_common(1)[0]
            problems.append(
                f"{count.source}: {lost} of {count.rows_read} rows dropped, more than data.max_dropped = "
                f"{max_dropped:.0%}; {number} of them: {reason}, first at {count.first[reason]}; mend them or raise "
                "data.max_dropped"
            )
    raise_all(DataError, problems)
    if tally.truncated:
        lines.append(f"{tally.truncated} rows cut to data.max_length")
    return lines
