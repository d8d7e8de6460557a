"""What a stage is given and what it hands back. The worker writes the manifest from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from align_cli.data.chat import Tally
from align_cli.data.groups import Count
from align_cli.errors import DataError, raise_all
from align_cli.recipe.sections import Recipe
from align_cli.run.directory import RunDirectory

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


@dataclass
class Job(Generic[AnyRecipe]):
    """One stage's run on one rank."""

    recipe: AnyRecipe
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
    parents: list[dict[str, Any]] = field(default_factory=list)
    """Parents beside those that the recipe names: the last of a loop's rounds."""


def fold_in(counts: list[Count], tally: Tally, max_dropped: float) -> list[str]:
    """Lines for the screen about what all rows came to, once they are tokens.

    Raises DataError if more than `max_dropped` of a source's rows are dropped by now, or all of them.
    """
    raise_all(DataError, [line for count in counts for line in count.too_many_dropped(max_dropped)])
    lines = [line for count in counts for line in count.lines()]
    if tally.truncated:
        lines.append(f"{tally.truncated} rows cut to data.max_length")
    return lines + [f"warning: {note} ({number} answers)" for note, number in tally.notes.items()]
