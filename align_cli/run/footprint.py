"""Estimates a run's memory per rank, and its files, before anything is loaded. Imports no torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from align_cli.errors import AlignError
from align_cli.model import kind, memory, precision
from align_cli.model.memory import GIB
from align_cli.preferences import plan as rounds
from align_cli.recipe import check
from align_cli.recipe.sections import Recipe
from align_cli.run import devices
from align_cli.run.directory import RunDirectory
from align_cli.run.upstream import recipe_of, stage_of_run


def footprint(recipe: Recipe, per_device: int, ranks: int) -> tuple[memory.Sizes | None, list[memory.Part]]:
    """The model's dimensions and the memory of one rank; (None, []) if the size is unknown before loading."""
    size, gpu = _size(recipe), devices.gpus() > 0
    chosen = precision.choose(recipe, devices.machine(recipe.launch))
    if size is None:
        return None, []
    frozen: dict[str, tuple[int, str]] = {}
    for role in recipe.spec.models:
        if not role.trained:
            # reward models and the gold one are one entry
            name = "reward" if role.precision == "scorer" else role.name
            frozen[name] = (frozen.get(name, (0, ""))[0] + recipe.copies(role.name), precision.of(role, chosen))
    rows, tokens = recipe.micro_step(per_device)
    return size, memory.plan(
        size,
        dtype=chosen.weights,
        mixed=chosen.products != "float32",
        trainable=_trainable(recipe, size),
        zero_stage=recipe.zero.stage,
        world_size=ranks,
        offload_optimizer=recipe.zero.offload_optimizer,
        offload_param=recipe.zero.offload_param,
        frozen=frozen,
        trained_copies=_trained_copies(recipe),
        rows=rows,
        tokens=tokens or memory.batch_tokens(gpu),
        checkpointing=bool(recipe.trainer.get("gradient_checkpointing", gpu)),
    )


@dataclass(frozen=True)
class Storage:
    """What a run writes to its disk, in bytes."""

    checkpoint: int
    """One resumable checkpoint; an estimate."""
    model: int
    """The weights of one finished model; loops keep one per round."""
    models: int
    kept: int
    """Most checkpoints kept at a time. An older one is deleted once the next one is whole, so one more may exist."""
    held: int
    """Checkpoints that an unfinished run has on the disk already, in bytes."""
    free: int

    @property
    def needed(self) -> int:
        """Most bytes written at a time: checkpoints alone, or checkpoints and the last model."""
        earlier = (self.models - 1) * self.model
        return max(0, earlier + self.kept * self.checkpoint + max(self.checkpoint, self.model) - self.held)

    def problem(self) -> str:
        """Why the run cannot start; the empty string if the disk is large enough."""
        if self.needed <= self.free:
            return ""
        return (
            f"its disk has {self.free / GIB:.0f} GiB free, but {self.kept + 1} checkpoints of about "
            f"{self.checkpoint / GIB:.0f} GiB and the model need {self.needed / GIB:.0f}; free space, set run_dir= to "
            "another disk, or set trainer.save_strategy='no'"
        )

    def described(self) -> str:
        """The plan's entry."""
        peak = f"at most {self.kept + 1} at a time" if self.kept else "only if it is stopped"
        models = f"{self.models} models of" if self.models > 1 else "model"
        return (
            f"≈ {self.checkpoint / GIB:.1f} GiB a checkpoint, {peak}; {models} {self.model / GIB:.1f} GiB; "
            f"{self.free / GIB:.0f} GiB free"
            + ("" if self.needed <= self.free else f", {self.needed / GIB:.0f} needed")
        )


def storage(recipe: Recipe, size: memory.Sizes) -> Storage:
    """What a run of this recipe writes into its directory."""
    dtype = precision.choose(recipe, devices.machine(recipe.launch)).weights
    trainable = _trainable(recipe, size) * _trained_copies(recipe)
    run, trainer = RunDirectory(recipe.run_dir), recipe.trainer
    place = next(folder for folder in (run.path, *run.path.absolute().parents) if folder.is_dir())
    held = sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
    only_model = trainer.get("save_only_model", False)
    written = trainable * memory.BYTES[dtype]
    return Storage(
        checkpoint=written if only_model else memory.checkpoint(trainable, dtype=dtype, zero_stage=recipe.zero.stage),
        model=written,
        models=rounds.count(recipe),
        # without a limit all are kept, of which there may be any number; a limit of 1 keeps 2 (training.arguments)
        kept=0 if trainer.get("save_strategy") == "no" else max(2, trainer.get("save_total_limit", 2) or 2),
        held=held,
        free=shutil.disk_usage(place).free,
    )


def _trainable(recipe: Recipe, size: memory.Sizes) -> int:
    """Trained parameters of one copy of the model."""
    return memory.lora_parameters(size, recipe.lora.r) * recipe.adapters() if recipe.lora else size.parameters


def _trained_copies(recipe: Recipe) -> int:
    return sum(recipe.copies(role.name) for role in recipe.spec.models if role.trained)


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
