"""The plan of a run: what `align check` prints. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from align_cli.constitutional import plan as constitutional
from align_cli.data.groups import Count
from align_cli.data.load import is_local
from align_cli.model import kind, memory
from align_cli.recipe import check
from align_cli.recipe.compose import Composed
from align_cli.recipe.constitutional import CaiRecipe
from align_cli.recipe.sections import Recipe
from align_cli.run import batch
from align_cli.run.footprint import Storage
from align_cli.run.upstream import recipe_of, stage_of_run


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
    """Memory of the recipe's alternative: PPO's four models on one backbone, or as separate models."""
    storage: Storage | None = None
    """What the run writes to its disk; None if the model's size is unknown."""
    notes: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    """Data files that upstream runs have not written yet."""

    def tokenizer_path(self) -> str:
        """Where to load the tokenizer from: model.path, or if that run does not exist yet, its own initial model."""
        path, depth = self.recipe.model.path, 0
        while kind.look(path).kind in ("missing", "unfinished") and (stage := stage_of_run(path)) and depth < 4:
            path, depth = check.load(stage, [f"recipe={recipe_of(stage, path)}"])[1].model.path, depth + 1
        return path

    def steps(self) -> int | None:
        """Number of optimizer steps, or None if the number of rows is unknown."""
        recipe, trainer = self.recipe, self.recipe.trainer
        if (limit := trainer.get("max_steps", -1)) > 0:
            return limit
        if isinstance(recipe, CaiRecipe) and self.batch is not None and self._known():
            return constitutional.steps(recipe, self.counts, self.batch.total)
        steps = self.steps_per_epoch()
        return None if steps is None else math.ceil(steps * trainer.get("num_train_epochs", 3.0))

    def _known(self) -> list[Count]:
        """The counts of data.train, or none if some of its rows are unknown."""
        sources = self.recipe.data.train
        # counts exist for local sources only; those of data.train come first
        known = self.counts[: len(sources)] if all(map(is_local, sources)) else []
        return [] if any(count.partial for count in known) or self.pending else known

    def steps_per_epoch(self) -> int | None:
        """Number of optimizer steps in which all rows are used once, or None if it is unknown. 0 if the rows do not
        make a rollout, or not a batch on every rank with dataloader_drop_last."""
        recipe, trainer, known = self.recipe, self.recipe.trainer, self._known()
        if not known or self.batch is None or recipe.packs() or isinstance(recipe, CaiRecipe):
            return None
        how = recipe.pairing()
        rows = sum(count.elements(how) * source.weight for count, source in zip(known, recipe.data.train, strict=True))
        if isinstance(recipe.data.eval, float):
            rows *= 1 - recipe.data.eval
        if rollout := recipe.rollout():
            # incomplete rollouts are dropped; each rollout has epochs × minibatches updates
            return round(rows) // self.prompts_per_rollout() * rollout.epochs * rollout.minibatches
        if trainer.get("dataloader_drop_last"):
            batches = round(rows) // (self.batch.per_device * self.ranks)
            return math.ceil(batches / self.batch.accumulation)
        return math.ceil(round(rows) / self.batch.total)

    def prompts_per_rollout(self) -> int:
        """Number of prompts that one rollout of an online stage takes."""
        rollout = self.recipe.rollout()
        return self.batch.total * rollout.minibatches // rollout.k

    def roughly(self) -> bool:
        """Whether `steps` depends on random choices: held-out prompts, or rows drawn for a fractional weight."""
        data = self.recipe.data
        drawn = isinstance(data.eval, float) or any(source.weight % 1 for source in data.train)
        return drawn and self.recipe.trainer.get("max_steps", -1) <= 0
