"""The sections of `align sft`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from align_cli.recipe.sections import Recipe, section


@section
class SftMethod:
    """Supervised fine-tuning: mean -log p over response tokens (InstructGPT, arXiv 2203.02155)."""

    train_on: Literal["all-turns", "last-turn"] = "all-turns"
    """Which assistant turns of a conversation to train on; all other tokens are masked."""
    packing: bool = False
    """Pack several rows into one sequence of data.max_length; rows do not attend to each other."""


@section
class SftRecipe(Recipe):
    """align sft"""

    stage: ClassVar[str] = "sft"
    method: SftMethod = Field(default_factory=SftMethod)

    def packs(self) -> bool:
        return self.method.packing
