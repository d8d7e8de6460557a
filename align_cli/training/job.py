"""The input and the result of a stage. The worker writes the manifest from the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from align_cli.data.chat import Tally
from align_cli.data.groups import Count
from align_cli.errors import DataError, raise_all
from align_cli.model.precision import Precision
from align_cli.recipe.sections import Recipe
from align_cli.run.directory import RunDirectory

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


@dataclass
class Job(Generic[AnyRecipe]):
    """One stage's run on one rank."""

    recipe: AnyRecipe
    run: RunDirectory
    precision: Precision
    per_device: int
    accumulation: int
    rank: int
    ranks: int
    console: Console
    cache: Path
    """Cache directory shared by all runs; holds the reference's log-probabilities."""
    base: str
    """Where the policy's weights are read from: the recipe's path, or the merged model of an adapter parent."""
    base_fingerprint: str | None = None
    """Of the weights at `base` when an adapter's run started; rank 0 has it."""
    reference: str | None = None
    """Where the weights of a separate reference are read from; None if the reference is the initial policy."""

    earlier: list[dict[str, Any]] = field(default_factory=list)
    """Precision of the steps before a resume on a machine of another kind, for the manifest."""

    @property
    def dtype(self) -> str:
        """Dtype of the weights of the policy and its reference."""
        return self.precision.weights

    def precision_entry(self) -> dict[str, Any]:
        """The manifest's entry for the data types."""
        return self.precision.as_manifest() | ({"earlier": self.earlier} if self.earlier else {})

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
    """The result of a stage, for the manifest."""

    metrics: dict[str, Any]
    counts: list[Count] = field(default_factory=list)
    stopped_by: int | None = None
    """Signal that ended training early; the run is then unfinished."""
    extra: dict[str, Any] = field(default_factory=dict)
    parents: list[dict[str, Any]] = field(default_factory=list)
    """Parents that the recipe does not name: the last round of a loop."""


def fold_in(counts: list[Count], tally: Tally, max_dropped: float) -> list[str]:
    """Lines to print about rows used, dropped and truncated, once all rows are tokenized.

    Raises DataError if more than the share `max_dropped` of a source's rows was dropped, or all of them.
    """
    raise_all(DataError, [line for count in counts for line in count.too_many_dropped(max_dropped)])
    lines = [line for count in counts for line in count.lines()]
    if tally.truncated:
        lines.append(f"{tally.truncated} rows truncated to data.max_length")
    return lines + [f"warning: {note} ({number} answers)" for note, number in tally.notes.items()]
