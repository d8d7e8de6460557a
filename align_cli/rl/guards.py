"""Guards: watch a run's metrics and act on signs of collapse or over-optimisation.

`Guards` implements the checks and is also used by the rounds of DPO; `GuardCallback` calls it after every rollout, on
all ranks. Signs of collapse and over-optimisation: arXiv 2210.10760; trl#41, #204, #2387. To add a guard, name its
metric in `recipe.rewards.Guard.metric` and record it in `rollouts.Rollouts._watch`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from align_cli import distributed
from align_cli.compat import libraries
from align_cli.recipe.rewards import Guard

if TYPE_CHECKING:
    from align_cli.rl.rollouts import Rollouts

STATE = "online.json"
"""File in a checkpoint with the guards' state: β, consecutive violations of each guard, best values."""
STEP_UP = 1.5
"""Factor by which raise_kl raises β per step."""


class Guards:
    """The state of all guards and their actions."""

    def __init__(self, guards: Sequence[Guard], say: Callable[[str], None]):
        self.guards, self.say = guards, say
        self.seen = [0] * len(guards)
        self.best: dict[str, float] = {}
        self.raised = 0
        """Number of steps by which β is currently raised."""
        self.finding = ""
        """Why a guard ends the run, or the empty string."""
        self.reason: str | None = None
        """The finding with its place, for the manifest; None while no guard ended the run."""
        self.rollback = False
        """Whether the run rolls back to its best checkpoint when it ends."""

    def sign(self, guard: Guard, figures: dict[str, float]) -> str:
        """What violates a guard in these metrics, or the empty string."""
        if guard.metric == "nan":
            broken = sorted(name for name, value in figures.items() if not math.isfinite(value))
            return f"{' and '.join(broken)} {'is' if len(broken) == 1 else 'are'} NaN or infinite" if broken else ""
        value = figures.get(guard.metric)
        if value is None:
            return ""
        if value != value:
            return f"{guard.metric} is NaN"
        if guard.above is not None and value > guard.above:
            return f"{guard.metric} {value:.4g} is above {guard.above:g}"
        if guard.below is not None and value < guard.below:
            return f"{guard.metric} {value:.4g} is below {guard.below:g}"
        best, rising = self.best.get(guard.metric, value), figures.get("reward", 0.0) >= self.best.get("reward", 0.0)
        if guard.drop is not None and best - value > guard.drop and rising:
            return f"{guard.metric} {value:.4g} fell from {best:.4g} while the reward rose to {figures['reward']:.4g}"
        return ""

    def look(self, figures: dict[str, float]) -> list[tuple[Guard, str]]:
        """Guards whose patience is exhausted, with their findings. Also updates the best values."""
        for name in ("reward", *(guard.metric for guard in self.guards if guard.drop is not None)):
            if name in figures:
                self.best[name] = max(self.best.get(name, -float("inf")), figures[name])
        due = []
        for at, guard in enumerate(self.guards):
            finding = self.sign(guard, figures)
            self.seen[at] = self.seen[at] + 1 if finding else 0
            if self.seen[at] >= (1 if guard.metric == "nan" else guard.patience):
                due.append((guard, finding))
        return due

    def act(self, figures: dict[str, float], place: str, beta: float) -> float:
        """Apply the guards to the metrics of a `place` ("step 12"). Returns the new β. Warnings are printed. A guard
        that ends the run sets `reason`, `finding` and `rollback`; the caller must end the run and report it."""
        due = self.look(figures)
        if self.raised and not any(guard.act == "raise_kl" for guard, _ in due):
            beta, self.raised = beta / STEP_UP, self.raised - 1
        for guard, finding in due:
            if guard.act == "warn":
                self.say(f"guard: {place}: {finding}")
            elif guard.act == "raise_kl":
                beta, self.raised = beta * STEP_UP, self.raised + 1
                self.say(f"guard: {place}: {finding}; β is now {beta:.4g}")
            elif self.reason is None:
                self.finding, self.reason = finding, f"{place}: {finding}"
                self.rollback = guard.act == "rollback"
        return beta


class GuardCallback(TrainerCallback):
    """Calls the guards between rollouts and keeps their state in checkpoints."""

    def __init__(self, guards: Guards, trainer: Rollouts):
        self.guards, self.trainer = guards, trainer
        self.saved_best = -float("inf")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.trainer.updates_per_rollout:
            return
        guards, trainer, ended = self.guards, self.trainer, self.guards.reason is not None
        trainer.settle()
        trainer.kl_coefficient = guards.act(trainer.latest, f"step {state.global_step}", trainer.kl_coefficient)
        if guards.reason is not None and not ended:
            at_best = ", at its best checkpoint" if guards.rollback else ""
            guards.say(f"guard: {guards.reason}; the run ends here{at_best}")
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        figure = self.trainer.latest.get("gold_reward", self.trainer.latest.get("reward", 0.0))
        folder, guards = Path(args.output_dir) / f"checkpoint-{state.global_step}", self.guards
        if figure > self.saved_best:
            # the trainer keeps this checkpoint when it removes old ones
            self.saved_best, state.best_model_checkpoint = figure, str(folder)
        if state.is_world_process_zero:
            record = {"beta": self.trainer.kl_coefficient, "seen": guards.seen, "best": guards.best}
            record |= {"raised": guards.raised, "saved_best": self.saved_best}
            (folder / STATE).write_text(json.dumps(record | {"best_checkpoint": state.best_model_checkpoint}))

    def on_train_begin(self, args, state, control, **kwargs):
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        record = distributed.from_rank_0(
            lambda: json.loads(file.read_text()) if state.global_step and file.is_file() else None
        )
        if record is not None:
            guards = self.guards
            self.trainer.kl_coefficient = record["beta"]
            guards.seen, guards.best, guards.raised = record["seen"], record["best"], record["raised"]
            self.saved_best, state.best_model_checkpoint = record["saved_best"], record["best_checkpoint"]

    def roll_back(self) -> bool:
        """Load the best checkpoint's weights if a guard asks for it and one exists. Returns whether it did."""
        best = self.trainer.state.best_model_checkpoint
        if self.guards.rollback and best and distributed.from_rank_0(Path(best).is_dir):
            libraries.load_best_model(self.trainer)
            self.guards.say(f"rolled back to {best}")
            return True
        return False
