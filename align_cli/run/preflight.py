"""All checks that can be made before weights are read. Fills the plan of a run. Imports no torch.

The valid part of an invalid recipe is checked, too, so that a bad key in one section does not hide a broken file in
another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from align_cli.compat import chat_date
from align_cli.constitutional import plan as constitutional
from align_cli.data.count import of_constitution
from align_cli.data.groups import check_sources
from align_cli.data.prompts import sample_problems
from align_cli.errors import AlignError, RecipeError
from align_cli.model import precision, saved_tokenizer, targets, templates
from align_cli.model.saved_tokenizer import SavedTokenizer
from align_cli.preferences import plan as rounds
from align_cli.recipe import check, constitution
from align_cli.recipe.constitutional import CaiRecipe
from align_cli.rewards import function
from align_cli.run import batch, devices, lengths, manifest, schedule, settings
from align_cli.run.directory import RunDirectory
from align_cli.run.footprint import footprint, storage
from align_cli.run.plan import Plan
from align_cli.run.upstream import (
    backbone_problems,
    existing,
    generator_problems,
    policy_problems,
    reward_problems,
)


def load(stage: str, arguments: list[str], *, starting: bool, render: bool = True) -> Plan:
    """Compose a recipe and check everything that it names.

    With `starting`, upstream runs that are not finished are errors; otherwise they are listed in the plan's `todo`.
    Without `render`, rows are not checked against the chat template, so the caller must handle rows that it rejects.
    Raises AlignError with all problems, from the recipe's keys to the rows of its files.
    """
    composed = check.compose(stage, arguments)
    lines: list[str] = []
    try:
        recipe, valid = check.check(composed), True
    except RecipeError as error:
        recipe, valid = check.partial(composed), False
        lines += error.lines
    launch = devices.resolved(recipe.launch)
    if valid:
        recipe = replace(recipe, launch=launch)
    plan = Plan(composed, recipe, "absent")
    look = _Look(plan, lines, starting)
    look.at_models()
    if recipe.model is not None and recipe.data is not None:
        lines += lengths.fit(plan)
        look.recipe = plan.recipe
    tokenizer = look.at_template()
    look.at_data(tokenizer if render else None)
    look.at_method_sources(tokenizer if render else None)
    if isinstance(recipe, CaiRecipe):
        look.at_constitution(recipe)
    look.at_judges()
    lines += devices.problems(launch)
    if valid and not lines:
        look.at_run()
    if valid and not lines and not starting and render:
        # a run that starts asks once it knows that there is something to do
        lines += settings.problems(recipe)
    if lines:
        raise AlignError(*dict.fromkeys(lines))
    return plan


class _Look:
    """Fills a plan, and adds problems to `lines`. The recipe may be partial: an invalid model or data is None."""

    def __init__(self, plan: Plan, lines: list[str], starting: bool):
        self.plan, self.recipe, self.lines, self.starting = plan, plan.recipe, lines, starting

    def at_models(self) -> None:
        """The trained model, and all other models of the recipe."""
        recipe, where = self.recipe, (self.starting, self.plan.todo)
        if recipe.model is not None:
            self.lines += policy_problems("model.path", recipe.model.path, *where)
            self.lines += templates.problems(recipe.model.path, recipe.model.chat_template)
            self.lines += targets.problems(recipe.model.path, recipe.lora)
        for key, path in recipe.reward_models():
            self.lines += reward_problems(key, path, *where)
        for key, entry in recipe.reward_functions():
            self.lines += function.problems(key, entry)
        if recipe.model is not None:
            for key, path in recipe.backbone_models():
                self.lines += backbone_problems(key, path, recipe.model.path)
        if (reference := recipe.reference_path()) is not None:
            self.lines += policy_problems("reference.path", reference, *where)
        for key, source in recipe.generators():
            self.lines += generator_problems(key, source, *where)

    def at_constitution(self, recipe: CaiRecipe) -> None:
        """The constitution of `align cai`, and the rows of an earlier run."""
        lines, counts = constitutional.constitution_problems(recipe.method)
        self.lines += lines
        self.plan.counts += counts
        self.lines += constitutional.row_problems(recipe.method)

    def at_judges(self) -> None:
        """Judges used as rewards, and their constitutions, which the manifest lists as data sources."""
        for key, source in self.recipe.judges():
            if any(source.rules()):
                continue  # the recipe's check reports it
            self.lines += generator_problems(f"{key}.judge", source.judge, self.starting, self.plan.todo)
            try:
                principles = constitution.chosen(source.constitution, source.principles, key)
                self.plan.counts.append(of_constitution(principles))
            except RecipeError as error:
                self.lines += error.lines

    def at_template(self) -> SavedTokenizer | None:
        """Check the tokenizer and its template. Returns the tokenizer if its files are available."""
        model = self.recipe.model
        if model is None or (model.chat_template and templates.problems(model.path, model.chat_template)):
            return None
        try:
            path = self.plan.tokenizer_path()
        except AlignError:  # `at_models` reports the problems of the upstream run
            return None
        tokenizer = saved_tokenizer.read(model, path)
        if tokenizer is None:
            return None
        new = saved_tokenizer.missing(model, tokenizer)
        if new and self.recipe.lora:
            self.lines.append(templates.frozen(new))
        if tokenizer.eos_token is None and saved_tokenizer.closing(tokenizer) is None:
            self.lines.append(templates.endless(path))
        return tokenizer

    def at_data(self, tokenizer: SavedTokenizer | None) -> None:
        """The sources of `data`, when to evaluate on them, and the sample prompts."""
        recipe, data, plan = self.recipe, self.recipe.data, self.plan
        if data is None:
            return
        present, plan.pending = existing(data, self.lines, self.starting, plan.todo)
        if present is not None:
            lines, plan.counts = rounds.sources(recipe, present, tokenizer)
            self.lines += lines
        trainer = recipe.trainer or {}
        self.lines += schedule.problems(trainer, evaluated=data.eval is not None)
        if data.streaming and schedule.steps_given(trainer) <= 0:
            self.lines.append("data.streaming: the number of steps is unknown; set trainer.max_steps=…")
        problems = sample_problems(recipe.samples, tokenizer)
        self.lines += problems
        if recipe.samples is not None and tokenizer is not None and not problems:
            self.lines += lengths.sample_problems(plan, tokenizer)

    def at_method_sources(self, tokenizer: SavedTokenizer | None) -> None:
        """Sources of a method: method.center_on of rm, method.ptx of ppo, method.harmless and method.helpful of cai."""
        data, plan = self.recipe.data, self.plan
        for _, sources, rows in self.recipe.method_sources() if data is not None else ():
            more = replace(data, train=sources, eval=None)
            present, pending = existing(more, self.lines, self.starting, plan.todo)
            plan.pending += pending
            if present is not None:
                lines, counts = check_sources(present, rows, tokenizer=tokenizer)
                self.lines += lines
                plan.counts += counts

    def at_run(self) -> None:
        """State of the run directory, batch arithmetic and memory; requires a valid recipe."""
        recipe, plan = self.recipe, self.plan
        run = RunDirectory(recipe.run_dir)
        plan.state = run.state()
        if plan.state == "foreign":
            self.lines.append(f"run_dir: {run.path} is not empty and not a run; set run_dir= to another directory")
        plan.ranks = devices.world_size(recipe.launch)
        try:
            resumed = run.batch() if plan.state == "unfinished" and not recipe.force else None
            plan.batch = batch.resumed(recipe, plan.ranks, resumed)
        except RecipeError as error:
            self.lines += error.lines
        self.lines += rounds.problems(recipe, plan.counts)
        if plan.batch is None:
            return
        if plan.steps_per_epoch() == 0:
            self.lines.append(self._nothing_to_train())
        per_device = plan.batch.per_device
        self.lines += [f"{key}: {problem}" for key, problem in recipe.batch_problems(per_device, plan.ranks)]
        if recipe.trainer.get("save_only_model"):
            plan.notes.append("trainer.save_only_model: a stopped run cannot resume from checkpoints of weights")
        machine = devices.machine(recipe.launch)
        self.lines += precision.problems(recipe, machine)
        plan.notes += precision.notes(recipe, machine)
        plan.size, plan.memory = footprint(recipe, per_device, plan.ranks)
        if plan.size is not None:
            plan.storage = storage(recipe, plan.size)
        if (other := recipe.alternative()) is not None:
            plan.other_memory = footprint(other, per_device, plan.ranks)[1]
        for count in plan.counts:
            plan.notes += count.lines()

    def _nothing_to_train(self) -> str:
        """The line for rows that do not make one step."""
        plan, recipe = self.plan, self.recipe
        held = ", less the held-out share," if isinstance(recipe.data.eval, float) else ""
        if recipe.rollout():
            what = f"a rollout takes {plan.prompts_per_rollout()} prompts"
            remedy = "add prompts or lower data.batch_size"
        else:
            what = f"a batch takes {plan.batch.per_device * plan.ranks} rows, and incomplete ones are dropped"
            remedy = "set trainer.dataloader_drop_last=false, or add rows"
        rows = sum(count.elements(recipe.pairing()) for count in plan.counts[: len(recipe.data.train)])
        return f"data.train: {rows} rows{held} do not make one step: {what}; {remedy}"


def date_of(plan: Plan) -> str | None:
    """The date inserted by the chat template, or None if it inserts none: the recipe's date, the date on which the
    unfinished run started, or today."""
    import yaml

    recipe = plan.recipe
    run = RunDirectory(recipe.run_dir)
    if recipe.data.date is not None:
        return recipe.data.date
    if run.state() == "unfinished":
        return (yaml.safe_load(run.recipe.read_text(encoding="utf-8")).get("data") or {}).get("date")
    source = templates.source(plan.tokenizer_path(), recipe.model.chat_template)
    return chat_date.today() if source is None or chat_date.writes_date(source) else None


def changed_inputs(made: dict[str, Any]) -> list[str]:
    """A line for every parent and Python reward function of a manifest that is missing or has changed."""
    return manifest.changed_parents(made) + [
        f"{entry['entry']} has changed since"
        for entry in made.get("code", [])
        if function.fingerprint(entry["entry"])["sha256"] != entry["sha256"]
    ]


def unchanged(plan: Plan) -> tuple[bool, list[str]]:
    """Whether the existing run matches this recipe, and the differences if it does not."""
    import yaml

    run = RunDirectory(plan.recipe.run_dir)
    made = manifest.read(run.path) or {}
    try:
        old = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        old = None
    if not isinstance(old, dict):  # edited by hand: must not be resumed as if it were this recipe
        return False, [f"{run.recipe} cannot be read"]
    tree = check.to_tree(plan.recipe)
    if tree["data"]["date"] is None and isinstance(old.get("data"), dict):
        # the run keeps the date on which it started
        tree["data"]["date"] = old["data"].get("date")
        old["data"].setdefault("date", None)
    differs = manifest.differing_keys(old, tree)
    if made:
        differs += manifest.missing_files(run, made) + changed_inputs(made)
        differs += manifest.differing_data(
            [(entry["source"], entry["fingerprint"]) for entry in made.get("data", [])], plan.counts
        )
    return not differs, differs
