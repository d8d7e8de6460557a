"""Estimates a run's memory per rank before anything is loaded. Imports no torch."""

from __future__ import annotations

from align_cli.errors import AlignError
from align_cli.model import kind, memory, precision
from align_cli.recipe import check
from align_cli.recipe.sections import Recipe
from align_cli.run import devices
from align_cli.run.upstream import recipe_of, stage_of_run


def footprint(recipe: Recipe, per_device: int, ranks: int) -> tuple[memory.Sizes | None, list[memory.Part]]:
    """The model's dimensions and the memory of one rank; (None, []) if the size is unknown before loading."""
    size, gpu = _size(recipe), devices.gpus() > 0
    chosen = precision.choose(recipe, devices.machine(recipe.launch))
    if size is None:
        return None, []
    trained = [role.name for role in recipe.spec.models if role.trained]
    frozen: dict[str, tuple[int, str]] = {}
    for role in recipe.spec.models:
        if not role.trained:
            # reward models and the gold one are one entry
            name = "reward" if role.precision == "scorer" else role.name
            frozen[name] = (frozen.get(name, (0, ""))[0] + recipe.copies(role.name), precision.of(role, chosen))
    rows, tokens = recipe.micro_step(per_device)
    parameters = memory.lora_parameters(size, recipe.lora.r) * recipe.adapters() if recipe.lora else size.parameters
    return size, memory.plan(
        size,
        dtype=chosen.weights,
        mixed=chosen.products != "float32",
        trainable=parameters,
        zero_stage=recipe.zero.stage,
        world_size=ranks,
        offload_optimizer=recipe.zero.offload_optimizer,
        offload_param=recipe.zero.offload_param,
        frozen=frozen,
        trained_copies=sum(recipe.copies(role) for role in trained),
        rows=rows,
        tokens=tokens or memory.batch_tokens(gpu),
        checkpointing=bool(recipe.trainer.get("gradient_checkpointing", gpu)),
    )


def _size(recipe: Recipe, depth: int = 0) -> memory.Sizes | None:
    """The model's dimensions: from its files, the recipe, or the recipe of an upstream run that does not exist yet."""
    contents = kind.look(recipe.model.path)
    counted = recipe.model.parameters or (kind.parameters(recipe.model.path) if contents.kind == "causal-lm" else None)
    if counted:
        return memory.sizes(counted, contents.config)
    if contents.kind == "adapter" and contents.base:
        return memory.sizes(kind.parameters(contents.base), kind.look(contents.base).config)
    upstream = stage_of_run(recipe.model.path)
    if contents.kind == "missing" and upstream and depth < 4:
        try:
            _, above = check.load(upstream, [f"recipe={recipe_of(upstream, recipe.model.path)}"])
        except AlignError:
            return None
        return _size(above, depth + 1)
    return None
