"""Data types of weights in memory. Imports no torch."""

from __future__ import annotations

from align_cli.recipe.sections import Recipe
from align_cli.recipe.stages import Role


def trained(recipe: Recipe) -> str:
    """The dtype that `model.dtype` stands for: auto is float32 for full training and bfloat16 under LoRA."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    return "bfloat16" if recipe.lora else "float32"


def scorer(gpu: bool) -> str:
    """The dtype of reward models that only score."""
    return "bfloat16" if gpu else "float32"


def of(role: Role, recipe: Recipe, gpu: bool) -> str:
    """The type of the weights of a role's models."""
    return scorer(gpu) if role.precision == "scorer" else trained(recipe)
