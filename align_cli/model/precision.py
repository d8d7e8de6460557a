"""Data types of weights and matrix products, chosen by what the machine multiplies. Imports no torch.

`trainer.bf16: auto` (the default) is bfloat16 where the hardware multiplies it: GPUs from compute capability 8.0 on,
and CPUs with AMX or AVX512-BF16. Elsewhere bfloat16 is emulated, up to a hundred times slower than float32, so float32
is used.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from align_cli.hardware import Machine
from align_cli.recipe.sections import Recipe
from align_cli.recipe.stages import Role

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Precision:
    """The data types of a run."""

    weights: Dtype
    """Of the trained model's weights, and of its reference's."""
    products: Dtype
    """Of matrix products in the trained model's passes: autocast, or DeepSpeed's own mixed precision."""
    scorer: Dtype
    """Of reward models that only score."""
    generator: Dtype
    """Of judges and other models that only write."""
    machine: str
    """What the choice rests on."""

    def __str__(self) -> str:
        return f"{self.weights} weights, {self.products} products"

    def as_manifest(self) -> dict[str, str]:
        """The manifest's entry."""
        return asdict(self)


def choose(recipe: Recipe, machine: Machine) -> Precision:
    """The data types of a recipe's run on a machine.

    `model.dtype: auto` is float32 for full training, and the type of the products under LoRA.
    """
    products: Dtype = "float32"
    if recipe.trainer.get("fp16"):
        products = "float16"
    elif wanted(recipe, machine):
        products = "bfloat16"
    auto = products if recipe.lora else "float32"
    half = machine.bf16 and machine.gpu
    return Precision(
        weights=auto if recipe.model.dtype == "auto" else recipe.model.dtype,
        products=products,
        scorer="bfloat16" if half else "float32",
        generator="bfloat16" if half or products == "bfloat16" else "float32",
        machine=str(machine),
    )


def wanted(recipe: Recipe, machine: Machine) -> bool:
    """Whether `trainer.bf16` asks for bfloat16 on this machine."""
    given = recipe.trainer.get("bf16", "auto")
    # products of bfloat16 weights are bfloat16 anyway
    return machine.bf16 or recipe.model.dtype == "bfloat16" if given in ("auto", None) else bool(given)


def of(role: Role, chosen: Precision) -> Dtype:
    """The type of the weights of a role's models."""
    return chosen.scorer if role.precision == "scorer" else chosen.weights


def notes(recipe: Recipe, machine: Machine) -> list[str]:
    """Lines about a choice that is slow or that the user may not expect on this machine."""
    if machine.bf16 or recipe.trainer.get("fp16"):
        return []
    if wanted(recipe, machine):
        return [f"bf16 on a {machine} is emulated and slow; trainer.bf16=auto and model.dtype=auto take float32 here"]
    if machine.gpu:
        return [f"float32, since this is a {machine}; trainer.fp16=true is faster, but overflows above 65504"]
    return []


def problems(recipe: Recipe, machine: Machine) -> list[str]:
    """Contradictions in `trainer.bf16` and `trainer.fp16`, which transformers reports with a traceback."""
    if not recipe.trainer.get("fp16"):
        return []
    if recipe.trainer.get("bf16") is True:
        return ["trainer.bf16: is true, and so is trainer.fp16; keep one of them"]
    if not machine.gpu:
        return ["trainer.fp16: needs a GPU; remove it, or set trainer.bf16=auto"]
    return []
