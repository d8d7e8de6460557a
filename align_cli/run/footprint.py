"""What a recipe's run will hold in memory on each rank, before anything is loaded. Imports no torch."""

from __future__ import annotations

from align_cli.errors import AlignError
from align_cli.model import kind, memory
from align_cli.recipe import check as recipe_check
from align_cli.recipe.schema import Recipe
from align_cli.run import devices
from align_cli.run.upstream import recipe_of, stage_of_run


def footprint(stage: str, recipe: Recipe, per_device: int, ranks: int) -> tuple[memory.Sizes | None, list[memory.Part]]:
    """The model's dimensions and what one rank will hold; (None, []) where the size is unknown until it is loaded."""
    size = _size(stage, recipe)
    if size is None:
        return None, []
    trainable = memory.lora_parameters(size, recipe.lora.r) if recipe.lora else size.parameters
    # under LoRA, PPO's four roles are adapters of one backbone
    shared = stage == "ppo" and recipe.lora is not None
    frozen = {"reference": 1} if _holds_reference(stage, recipe) else {}
    if stage in ("ppo", "rloo", "grpo"):
        models = sum(source.path is not None for source in recipe.reward)
        frozen["reward"] = (0 if shared else models) + (recipe.gold is not None and recipe.gold.path is not None)
    return size, memory.plan(
        size,
        dtype=resolve_dtype(recipe),
        mixed=bool(recipe.trainer.get("bf16") or recipe.trainer.get("fp16") or devices.gpus()),
        trainable=trainable * (2 if shared else 1),
        zero_stage=recipe.zero.stage,
        world_size=ranks,
        offload_optimizer=recipe.zero.offload_optimizer,
        offload_param=recipe.zero.offload_param,
        frozen=frozen,
        trained_copies=2 if stage == "ppo" and not shared else 1,
        **_micro_step(stage, recipe, per_device),
        checkpointing=bool(recipe.trainer.get("gradient_checkpointing", devices.gpus() > 0)),
    )


def _holds_reference(stage: str, recipe: Recipe) -> bool:
    """Whether another, frozen model of the policy's size gives reference log-probabilities."""
    if stage in ("orpo", "simpo"):
        return recipe.method.needs_reference() and bool(recipe.lora is None or recipe.reference)
    if stage == "kto":
        return bool(recipe.lora is None or recipe.reference)
    if stage in ("dpo", "spin"):
        other = getattr(recipe, "reference", None)
        return not recipe.method.precompute_reference and bool(recipe.lora is None or other)
    return recipe.lora is None and (stage == "ppo" or (stage in ("rloo", "grpo") and recipe.method.beta > 0))


def _micro_step(stage: str, recipe: Recipe, per_device: int) -> dict[str, int]:
    """Rows and tokens a row that go through the model at a time."""
    if stage in ("rm", "orpo", "simpo"):
        return {"rows": 1, "tokens": recipe.method.batch_tokens or memory.batch_tokens(devices.gpus() > 0)}
    return {"rows": per_device * (2 if stage in ("dpo", "spin") else 1), "tokens": recipe.data.max_length}


def resolve_dtype(recipe: Recipe) -> str:
    """The type that `model.dtype: auto` stands for: float32 where weights are trained in full, bfloat16 under LoRA."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    return "bfloat16" if recipe.lora else "float32"


def _size(stage: str, recipe: Recipe, depth: int = 0) -> memory.Sizes | None:
    """The model's dimensions: from its files, the recipe, or the recipe of the upstream run that is still to do."""
    held = kind.look(recipe.model.path)
    counted = recipe.model.parameters or (kind.parameters(recipe.model.path) if held.kind == "causal-lm" else None)
    if counted:
        return memory.sizes(counted, held.config)
    if held.kind == "adapter" and held.base:
        base = kind.look(held.base)
        return memory.sizes(kind.parameters(held.base), base.config)
    upstream = stage_of_run(recipe.model.path)
    if held.kind == "missing" and upstream and depth < 4:
        try:
            named = recipe_of(upstream, recipe.model.path)
            _, above = recipe_check.load(upstream, [f"recipe={named}"])
        except AlignError:
            return None
        return _size(upstream, above, depth + 1)
    return None
