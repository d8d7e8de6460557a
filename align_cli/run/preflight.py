"""Everything that can be found wrong before weights are read, and the plan of what would run. Imports no torch.

The sections of a recipe are looked at one by one, so that a bad key in one does not hide a broken file in another.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from align_cli.data.groups import Count, check_sources
from align_cli.data.load import is_local
from align_cli.errors import AlignError, RecipeError
from align_cli.model import kind, memory, templates
from align_cli.recipe import check as recipe_check
from align_cli.recipe import places
from align_cli.recipe.compose import Composed, default_run_dir
from align_cli.recipe.schema import STAGES, Recipe
from align_cli.recipe.sections import Data, Launch, Model, OtherModel, Samples
from align_cli.run import batch, devices, manifest
from align_cli.run.directory import RunDirectory

NEEDS = {"sft": "demonstrations", "rm": "preferences", "dpo": "preferences"}
"""What each stage asks of its rows."""

OTHERS = ("reference",)
"""Top-level sections that name another model."""


@dataclass
class Plan:
    """What `align check` prints."""

    composed: Composed
    recipe: Recipe
    state: str
    todo: list[str] = field(default_factory=list)
    """Commands that must run before this one."""
    ranks: int = 1
    batch: batch.Batch | None = None
    counts: list[Count] = field(default_factory=list)
    size: memory.Sizes | None = None
    memory: list[memory.Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tokenizer_path(self) -> str:
        """Where a tokenizer can be had while the upstream run is still to be made: the model it will start from."""
        path, depth = self.recipe.model.path, 0
        while kind.look(path).kind in ("missing", "unfinished") and (stage := _stage_of_run(path)) and depth < 4:
            path, depth = recipe_check.load(stage, [f"recipe={_recipe_of(stage, path)}"])[1].model.path, depth + 1
        return path

    def steps(self) -> int | None:
        """Optimizer steps, where the number of rows is known."""
        trainer = self.recipe.trainer
        if (limit := trainer.get("max_steps", -1)) > 0:
            return limit
        sources = self.recipe.data.train
        # counts are of local sources, those of data.train first
        known = self.counts[: len(sources)] if all(map(is_local, sources)) else []
        if not known or any(count.partial for count in known) or self.batch is None:
            return None
        how = self.recipe.method.pairs if self.composed.stage == "dpo" else "best-worst"
        rows = sum(count.elements(how) * source.weight for count, source in zip(known, sources, strict=True))
        if isinstance(self.recipe.data.eval, float):
            rows *= 1 - self.recipe.data.eval
        return math.ceil(math.ceil(rows / self.batch.total) * trainer.get("num_train_epochs", 3.0))


def load(stage: str, arguments: list[str], *, starting: bool) -> Plan:
    """Compose, check and look at everything the recipe names.

    `starting` refuses upstream runs that are not finished; a check takes them as steps still to do. Raises AlignError
    with every problem, from the recipe's keys to the rows of its files.
    """
    composed = recipe_check.compose(stage, arguments)
    lines: list[str] = []
    recipe = None
    try:
        recipe = recipe_check.check(composed)
    except RecipeError as error:
        lines += error.lines
    plan = Plan(composed, recipe, "absent")
    _look_at_models(plan, lines, starting)
    _look_at_data(plan, lines)
    launch = _section(Launch, composed.tree.get("launch", {}))
    if launch is not None:
        lines += devices.problems(launch)
    if recipe is not None and not lines:
        _look_at_run(plan, lines)
    if lines:
        raise AlignError(*dict.fromkeys(lines))
    return plan


def _section(cls: type, tree: Any) -> Any:
    """A section by itself, or None if it does not validate (the whole recipe's check says why)."""
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError:
        return None


def _look_at_models(plan: Plan, lines: list[str], starting: bool) -> None:
    tree = plan.composed.tree
    model = _section(Model, tree.get("model"))
    if model is not None:
        lines += _policy_problems(plan, "model.path", model.path, starting)
        lines += templates.problems(model.path, model.chat_template)
    for role in OTHERS:
        other = _section(OtherModel, tree.get(role))
        if other is not None:
            lines += _policy_problems(plan, f"{role}.path", other.path, starting)


def _policy_problems(plan: Plan, key: str, path: str, starting: bool) -> list[str]:
    """Why a path cannot serve as a causal language model."""
    held = kind.look(path)
    stage = _stage_of_run(path)
    if held.kind in ("missing", "unfinished") and stage is not None:
        command = f"align {stage} recipe={_recipe_of(stage, path)}"
        if held.kind == "missing":
            try:
                places.find(stage, _recipe_of(stage, path))
            except RecipeError as error:
                return [f"{key}: {path} is not there, and no recipe makes it ({error.lines[0]})"]
            if not starting:
                plan.todo.append(command)
                return []
        verb = "is not there" if held.kind == "missing" else "is not finished"
        return [f"{key}: {path} {verb}; run `{command}` first"]
    if held.kind == "reward-model" or held.reward:
        return [f"{key}: {path} is a reward model (a scalar head); name the SFT run it came from"]
    if held.kind == "adapter":
        if held.base is None or (kind.look(held.base).kind not in ("causal-lm", "hub")):
            return [
                f"{key}: {path} is an adapter whose base {held.base or '(unnamed)'} is not there; "
                "put the base back, or name a model merged by `align merge`"
            ]
        return []
    if held.kind == "missing":
        near = _near_directory(path)
        return [f"{key}: {path}: no such directory{near}; name a model directory, a finished run or a hub id"]
    if held.kind == "unfinished":
        return [f"{key}: {path} is not finished; run its stage again to finish it"]
    if held.kind == "other":
        mend = (
            "save it with save_pretrained (safetensors)" if held.config else "name a model directory or a finished run"
        )
        return [f"{key}: {path}: {held.finding}; {mend}"]
    return []


def _stage_of_run(path: str) -> str | None:
    """The stage whose default run directory this is."""
    path = os.path.normpath(path)
    parts = Path(path).parts
    return (
        parts[-1] if len(parts) == 3 and path == default_run_dir(parts[1], parts[-1]) and parts[-1] in STAGES else None
    )


def _recipe_of(stage: str, path: str) -> str:
    """What to write after recipe= to make that run."""
    unfinished = Path(path) / "recipe.yaml"
    return str(unfinished) if unfinished.is_file() else f"{Path(path).parts[1]}.yaml"


def _near_directory(path: str) -> str:
    from align_cli.errors import did_you_mean

    siblings = (
        [str(entry) for entry in Path(path).parent.glob("*") if entry.is_dir()] if Path(path).parent.is_dir() else []
    )
    return did_you_mean(path, siblings).rstrip("?")


def _look_at_data(plan: Plan, lines: list[str]) -> None:
    tree = plan.composed.tree
    data = _section(Data, tree.get("data"))
    if data is None:
        return
    found, plan.counts = check_sources(data, NEEDS[plan.composed.stage])
    lines += found
    trainer = tree.get("trainer")
    if data.eval is None and isinstance(trainer, dict) and trainer.get("eval_strategy", "no") not in ("no", False):
        lines.append("trainer.eval_strategy: there is nothing to evaluate on; set data.eval, a source or a fraction")
    if data.streaming and _steps_given(tree.get("trainer")) <= 0:
        lines.append("data.streaming: needs to know when to stop; set trainer.max_steps=…")
    samples = tree.get("samples")
    samples = _section(Samples, {"prompts": samples} if isinstance(samples, (str, list)) else samples)
    if samples is not None and isinstance(samples.prompts, str) and not Path(samples.prompts).is_file():
        lines.append(
            f"samples.prompts: {samples.prompts}: no such file; name one with a `prompt` column, or list prompts"
        )


def _steps_given(trainer: Any) -> float:
    """trainer.max_steps, where it is a number."""
    steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
    return steps if isinstance(steps, (int, float)) else 0


def _look_at_run(plan: Plan, lines: list[str]) -> None:
    """State of the run directory, batch arithmetic and memory; needs a recipe without problems."""
    stage, recipe = plan.composed.stage, plan.recipe
    run = RunDirectory(recipe.run_dir)
    plan.state = run.state()
    if plan.state == "foreign":
        lines.append(f"run_dir: {run.path} is not empty and no run; set run_dir= to another directory")
    plan.ranks = devices.world_size(recipe.launch)
    try:
        plan.batch = batch.arithmetic(stage, recipe, plan.ranks)
    except RecipeError as error:
        lines += error.lines
    if plan.batch is None:
        return
    _plan_memory(plan)
    for count in plan.counts:
        plan.notes += [line for line in count.lines()]


def _plan_memory(plan: Plan) -> None:
    recipe, stage = plan.recipe, plan.composed.stage
    plan.size = _size(stage, recipe)
    if plan.size is None:
        return
    trainable = memory.lora_parameters(plan.size, recipe.lora.r) if recipe.lora else plan.size.parameters
    separate = stage == "dpo" and not recipe.method.precompute_reference and (recipe.lora is None or recipe.reference)
    plan.memory = memory.plan(
        plan.size,
        dtype=resolve_dtype(recipe),
        mixed=bool(recipe.trainer.get("bf16") or recipe.trainer.get("fp16") or devices.gpus()),
        trainable=trainable,
        zero_stage=recipe.zero.stage,
        world_size=plan.ranks,
        offload_optimizer=recipe.zero.offload_optimizer,
        offload_param=recipe.zero.offload_param,
        frozen_copies=1 if separate else 0,
        rows=plan.batch.per_device * (2 if stage == "dpo" else 1),
        tokens=recipe.data.max_length,
        checkpointing=bool(recipe.trainer.get("gradient_checkpointing", devices.gpus() > 0)),
    )


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
    upstream = _stage_of_run(recipe.model.path)
    if held.kind == "missing" and upstream and depth < 4:
        try:
            named = _recipe_of(upstream, recipe.model.path)
            places.find(upstream, named)
            _, above = recipe_check.load(upstream, [f"recipe={named}"])
        except AlignError:
            return None
        return _size(upstream, above, depth + 1)
    return None


def unchanged(plan: Plan) -> tuple[bool, list[str]]:
    """Whether a finished run is what this recipe would make, and what differs if it is not."""
    import yaml

    run = RunDirectory(plan.recipe.run_dir)
    made = manifest.read(run.path) or {}
    old = yaml.safe_load(run.recipe.read_text(encoding="utf-8")) if run.recipe.is_file() else {}
    differs = manifest.differing_keys(old, recipe_check.to_tree(plan.recipe))
    if made:
        differs += manifest.missing_files(run, made) + manifest.changed_parents(made)
        today = {count.source: count.fingerprint for count in plan.counts}
        for entry in made.get("data", []):
            if entry["source"] in today and entry["fingerprint"] != today[entry["source"]]:
                differs.append(f"data {entry['source']} has changed since")
    return not differs, differs
