"""The sections of `align rm`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from align_cli.recipe.sections import Count, Recipe, Source, as_source, section
from align_cli.recipe.stages import RowKind


@section
class RmMethod:
    """A reward model from rankings (InstructGPT, arXiv 2203.02155, eq. 1)."""

    loss: Literal["ranking", "pairwise", "plackett-luce", "best-of-k"] = "ranking"
    """ranking: all pairs of a prompt are one element of the mean; pairwise: every pair is; plackett-luce: the
    likelihood of the whole order; best-of-k: cross-entropy of the best response against the others."""
    margin: float | Literal["scores"] | None = None
    """By how much the better reward must be ahead: a number, or `scores` for the difference of the source's scores
    (Llama 2, arXiv 2307.09288). For ranking and pairwise."""
    center: Annotated[float, Field(ge=0)] = 0.0
    """Weight of (r_i + r_j)², which keeps rewards near zero (arXiv 2312.09244, which uses 0.01)."""
    center_on: Annotated[Source | None, BeforeValidator(as_source, json_schema_input_type=str | Source | None)] = None
    """Demonstrations whose mean score is put at 0 after training; null shifts nothing."""
    layout: Literal["auto", "shared", "rows"] = "auto"
    """shared: the prompt goes through the model once for all of its responses (4-D mask); rows: once for each. auto
    tries shared on the first rows, and keeps it if the model gives the same."""
    batch_tokens: Count | None = None
    """Tokens, padding included, that go through the model at a time on a device. Memory follows from it, the result
    does not. null: 16384 on a GPU, 2048 without one."""
    seeds: list[Annotated[int, Field(ge=0)]] | None = None
    """An ensemble: one head a seed on the common trunk, each drawn and bootstrapped by its seed. null: one head."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.margin is not None and self.loss not in ("ranking", "pairwise"):
            yield "method.margin", f"means nothing to {self.loss}; remove it, or set method.loss=ranking"
        if self.seeds is not None and len(set(self.seeds)) < max(len(self.seeds), 1):
            yield "method.seeds", "must differ from each other; give each head its own"


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
            yield "samples", "a reward model answers nothing; remove it, or use `align score` on the finished run"
        if self.data.streaming:
            yield "data.streaming", "does not work in rm, whose steps are filled from whole groups in memory; remove it"
