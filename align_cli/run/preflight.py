"""Everything that can be found wrong before weights are read, and the plan of what would run. Imports no torch.

The sections of a recipe are looked at one by one, so that a bad key in one does not hide a broken file in another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from align_cli.compat import chat_date
from align_cli.data.groups import Count, check_sources
from align_cli.data.load import is_local
from align_cli.data.prompts import sample_problems
from align_cli.errors import AlignError, RecipeError
from align_cli.model import function, kind, memory, saved_tokenizer, templates
from align_cli.model.saved_tokenizer import SavedTokenizer
from align_cli.recipe import check as recipe_check
from align_cli.recipe.cai import CaiMethod
from align_cli.recipe.compose import Composed
from align_cli.recipe.schema import Recipe
from align_cli.recipe.sections import Data, Launch, Lora, Model, OtherModel, Samples, Source, as_source
from align_cli.recipe.speaker import Speaker
from align_cli.run import batch, constitutional, devices, loops, manifest, rewards, schedule
from align_cli.run.directory import RunDirectory
from align_cli.run.footprint import footprint
from align_cli.run.upstream import (
    backbone_problems,
    policy_problems,
    recipe_of,
    reward_problems,
    stage_of_run,
    there_already,
)

NEEDS = {
    "sft": "demonstrations",
    "rm": "preferences",
    "ppo": "prompts",
    "rloo": "prompts",
    "grpo": "prompts",
    "dpo": "preferences",
    "orpo": "preferences",
    "simpo": "preferences",
    "kto": "labels",
    "cai": "prompts",
    "spin": "demonstrations",
}
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
    other_memory: list[memory.Part] = field(default_factory=list)
    """PPO's: of the same recipe with its four models on one backbone, or the other way round."""
    notes: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    """Data files that a run which is still to be made will write."""

    def tokenizer_path(self) -> str:
        """Where a tokenizer can be had while the upstream run is still to be made: the model it will start from."""
        path, depth = self.recipe.model.path, 0
        while kind.look(path).kind in ("missing", "unfinished") and (stage := stage_of_run(path)) and depth < 4:
            path, depth = recipe_check.load(stage, [f"recipe={recipe_of(stage, path)}"])[1].model.path, depth + 1
        return path

    def steps(self) -> int | None:
        """Optimizer steps, where the number of rows is known."""
        trainer = self.recipe.trainer
        if (limit := trainer.get("max_steps", -1)) > 0:
            return limit
        sources = self.recipe.data.train
        # counts are of local sources, those of data.train first
        known = self.counts[: len(sources)] if all(map(is_local, sources)) else []
        if not known or any(count.partial for count in known) or self.batch is None or self.pending:
            return None
        if self.composed.stage == "cai":
            return constitutional.steps(self.recipe, self.counts, self.batch.total)
        if getattr(self.recipe.method, "packing", False) or trainer.get("dataloader_drop_last"):
            return None
        how = getattr(self.recipe.method, "pairs", None) or getattr(self.recipe.method, "split", "best-worst")
        rows = sum(count.elements(how) * source.weight for count, source in zip(known, sources, strict=True))
        if isinstance(self.recipe.data.eval, float):
            rows *= 1 - self.recipe.data.eval
        steps = math.ceil(round(rows) / self.batch.total)
        if pieces := getattr(self.recipe.method, "minibatches", 0):
            # of a stage that samples: only whole rollouts, each with so many updates
            prompts = self.batch.total * pieces // getattr(self.recipe.method, "k", 1)
            steps = round(rows) // prompts * self.recipe.method.epochs * pieces
        return math.ceil(steps * trainer.get("num_train_epochs", 3.0))

    def roughly(self) -> bool:
        """Whether `steps` depends on which prompts are held out, and which rows a fractional weight takes."""
        data = self.recipe.data
        drawn = isinstance(data.eval, float) or any(source.weight % 1 for source in data.train)
        return drawn and self.recipe.trainer.get("max_steps", -1) <= 0


def load(stage: str, arguments: list[str], *, starting: bool, render: bool = True) -> Plan:
    """Compose, check and look at everything the recipe names.

    `starting` refuses upstream runs that are not finished; a check takes them as steps still to do. Without `render`,
    rows that the chat template refuses are left to whoever reads them. Raises AlignError with every problem, from the
    recipe's keys to the rows of its files.
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
    tokenizer = _look_at_template(plan, lines)
    _look_at_data(plan, lines, starting, tokenizer if render else None)
    _look_at_demonstrations(plan, lines, starting, tokenizer if render else None)
    if stage == "cai":
        _look_at_constitution(plan, lines, starting)
    found, laws = rewards.judge_problems(plan.composed.tree, starting, plan.todo)
    lines, plan.counts = lines + found, plan.counts + laws
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
        lines += policy_problems("model.path", model.path, starting, plan.todo)
        lines += templates.problems(model.path, model.chat_template)
    for role, path in rewards.reward_models(tree):
        lines += reward_problems(role, path, starting, plan.todo)
    for role, entry in rewards.functions(tree):
        lines += function.problems(role, entry)
    if plan.composed.stage == "ppo" and tree.get("lora") and model is not None:
        for role, path in rewards.reward_models(tree):
            lines += backbone_problems(role, path, model.path) if not role.startswith("gold") else []
    for role in OTHERS:
        other = _section(OtherModel, tree.get(role))
        if other is not None:
            lines += policy_problems(f"{role}.path", other.path, starting, plan.todo)


def _look_at_constitution(plan: Plan, lines: list[str], starting: bool) -> None:
    """What `align cai` names beside models and data."""
    tree = plan.composed.tree
    for key in ("writer", "feedback"):
        named = tree.get(key)
        speaker = _section(Speaker, {"path": named} if isinstance(named, str) else named)
        if speaker is not None:
            lines += constitutional.speaker_problems(key, speaker, starting, plan.todo)
    method, data = _section(CaiMethod, tree.get("method", {})), _section(Data, tree.get("data"))
    if method is None:
        return
    for found, counts in (
        constitutional.sources(method, data) if data is not None else ([], []),
        constitutional.law(method),
    ):
        lines += found
        plan.counts += counts
    lines += constitutional.row_problems(method)


def _look_at_template(plan: Plan, lines: list[str]) -> SavedTokenizer | None:
    """The tokenizer's files where they are at hand, and what is wrong with its template."""
    tree = plan.composed.tree
    model = _section(Model, tree.get("model"))
    if model is None or (model.chat_template and templates.problems(model.path, model.chat_template)):
        return None
    try:
        path = plan.tokenizer_path() if plan.recipe is not None else model.path
    except AlignError:  # whoever looks at the models says what is wrong with the run that is named
        return None
    tokenizer = saved_tokenizer.read(model, path)
    if tokenizer is None:
        return None
    new = saved_tokenizer.missing(model, tokenizer)
    if new and tree.get("lora"):
        lines.append(templates.frozen(new))
    if tokenizer.eos_token is None and saved_tokenizer.closing(tokenizer) is None:
        lines.append(templates.endless(path))
    return tokenizer


def _look_at_data(plan: Plan, lines: list[str], starting: bool, tokenizer: SavedTokenizer | None) -> None:
    tree = plan.composed.tree
    data = _section(Data, tree.get("data"))
    if data is None:
        return
    there, plan.pending = there_already(data, lines, starting, plan.todo)
    if there is not None:
        need, cells = NEEDS[plan.composed.stage], rewards.compared(tree)
        found, plan.counts = loops.sources(plan.composed.stage, tree, there, need, cells, tokenizer)
        lines += found
    if isinstance(trainer := tree.get("trainer"), dict):
        lines += schedule.problems(trainer, evaluated=data.eval is not None)
    if data.streaming and schedule.steps_given(tree.get("trainer")) <= 0:
        lines.append("data.streaming: needs to know when to stop; set trainer.max_steps=…")
    samples = tree.get("samples")
    samples = {"prompts": samples} if isinstance(samples, (str, list)) else samples
    lines += sample_problems(_section(Samples, samples), tokenizer)


def _look_at_demonstrations(plan: Plan, lines: list[str], starting: bool, tokenizer: SavedTokenizer | None) -> None:
    """The further sources of a method: what scores are centered on, and what PPO-ptx trains on."""
    tree = plan.composed.tree
    data, method = _section(Data, tree.get("data")), tree.get("method")
    for key in ("center_on", "ptx"):
        named = method.get(key) if isinstance(method, dict) else None
        source = _section(Source, as_source(named)) if named is not None else None
        if source is None or data is None:
            continue
        there, pending = there_already(replace(data, train=[source], eval=None), lines, starting, plan.todo)
        plan.pending += pending
        if there is not None:
            lines += check_sources(there, "demonstrations", tokenizer=tokenizer)[0]


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
    lines += loops.problems(recipe, plan.counts)
    if plan.batch is None:
        return
    if stage == "kto" and recipe.method.loss == "kto" and plan.batch.per_device < 2:
        lines.append(
            f"data.batch_size: leaves each of {plan.ranks} ranks one row at a time, and kto estimates the KL between "
            f"two or more; set data.batch_size={2 * plan.ranks} or a multiple"
        )
    plan.size, plan.memory = footprint(stage, recipe, plan.batch.per_device, plan.ranks)
    if stage == "ppo":
        other = replace(recipe, lora=None if recipe.lora else Lora())
        plan.other_memory = footprint(stage, other, plan.batch.per_device, plan.ranks)[1]
    for count in plan.counts:
        plan.notes += [line for line in count.lines()]


def date_of(plan: Plan) -> str | None:
    """The date that the run's chat template writes, if it writes one: the recipe's, that of the run as it was begun,
    or today's."""
    import yaml

    recipe = plan.recipe
    run = RunDirectory(recipe.run_dir)
    if recipe.data.date is not None:
        return recipe.data.date
    if run.state() == "unfinished":
        return (yaml.safe_load(run.recipe.read_text(encoding="utf-8")).get("data") or {}).get("date")
    source = templates.source(plan.tokenizer_path(), recipe.model.chat_template)
    return chat_date.today() if source is None or chat_date.writes_date(source) else None


def unchanged(plan: Plan) -> tuple[bool, list[str]]:
    """Whether a finished run is what this recipe would make, and what differs if it is not."""
    import yaml

    run = RunDirectory(plan.recipe.run_dir)
    made = manifest.read(run.path) or {}
    try:
        old = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        old = None
    if not isinstance(old, dict):  # somebody's edit: not to be resumed as if it were this recipe
        return False, [f"{run.recipe} cannot be read"]
    tree = recipe_check.to_tree(plan.recipe)
    if tree["data"]["date"] is None and isinstance(old.get("data"), dict):
        # the run keeps the date on which it began
        tree["data"]["date"] = old["data"].get("date")
        old["data"].setdefault("date", None)
    differs = manifest.differing_keys(old, tree)
    if made:
        differs += manifest.missing_files(run, made) + manifest.changed_parents(made)
        differs += [
            f"{entry['entry']} has changed since"
            for entry in made.get("code", [])
            if function.fingerprint(entry["entry"])["sha256"] != entry["sha256"]
        ]
        today = {count.source: count.fingerprint for count in plan.counts}
        for entry in made.get("data", []):
            if entry["source"] in today and entry["fingerprint"] != today[entry["source"]]:
                differs.append(f"data {entry['source']} has changed since")
    return not differs, differs
