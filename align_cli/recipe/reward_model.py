"""The sections of `align rm`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from align_cli.recipe.sections import Count, Recipe, Source, as_source, section
from align_cli.recipe.stages import RowKind


@section
class RmMethod:
    """Reward modelling on rankings (InstructGPT, arXiv 2203.02155, eq. 1)."""

    loss: Literal["ranking", "pairwise", "plackett-luce", "best-of-k"] = "ranking"
    """ranking: mean over prompts of the mean over a prompt's pairs; pairwise: mean over all pairs; plackett-luce:
    likelihood of the whole order; best-of-k: cross-entropy of the best response against the others."""
    margin: float | Literal["scores"] | None = None
    """Margin subtracted from the reward difference: a number, or `scores` for the difference of the source's scores
    (Llama 2, arXiv 2307.09288). For ranking and pairwise."""
    center: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the penalty (r_i + r_j)², which keeps rewards near zero (arXiv 2312.09244 uses 0.01)."""
    center_on: Annotated[Source | None, BeforeValidator(as_source, json_schema_input_type=str | Source | None)] = None
    """Demonstrations whose mean score is shifted to 0 after training; null: no shift."""
    layout: Literal["auto", "shared", "rows"] = "auto"
    """shared: one forward pass of the prompt for all its responses (4-D mask); rows: one per response. auto: compare
    the two on the first rows, and use shared if the results agree and, on a GPU, if it is the faster one. The manifest
    names the choice."""
    batch_tokens: Count | None = None
    """Maximum tokens (padding included) per forward pass on each device. It affects memory, not the result. null: 16384
    on a GPU, 2048 on a CPU."""
    seeds: list[Annotated[int, Field(ge=0)]] | None = None
    """Train an ensemble: one head per seed on a shared trunk. The seed sets the head's initial weights and its
    bootstrap sample. null: one head."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.margin is not None and self.loss not in ("ranking", "pairwise"):
            yield "method.margin", f"has no effect with {self.loss}; remove it, or set method.loss=ranking"
        if self.seeds is not None and len(set(self.seeds)) < max(len(self.seeds), 1):
            yield "method.seeds", "must be distinct and not empty; give each head its own seed"


@section
class RmRecipe(Recipe):
    """align rm"""

    stage: ClassVar[str] = "rm"
    method: RmMethod = Field(default_factory=RmMethod)

    def micro_step(self, per_device: int) -> tuple[int, int | None]:
        return 1, self.method.batch_tokens

    def method_sources(self) -> list[tuple[str, list[Source], RowKind]]:
        on = self.method.center_on
        return [("method.center_on", [on], "demonstrations")] if on is not None else []

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.samples is not None:
            yield "samples", "does not work in rm; remove it, or use `align score` on the finished run"
        if self.data.streaming:
            yield "data.streaming", "does not work in rm, whose batches are filled from groups in memory; remove it"
