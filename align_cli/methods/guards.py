"""Watchers of an online run: what was seen, for how long, and what is done about it. After every rollout, on all ranks.

Collapse signs and over-optimisation: arXiv 2210.10760; trl#41, #204, #2387.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from align_cli.recipe.rewards import Guard

STATE = "online.json"
"""What a checkpoint remembers beside the trainer's own state: β, how often each guard has seen its sign, the bests."""
STEP_UP = 1.5
"""Factor by which raise_kl raises β each rollout."""


class Guards(TrainerCallback):
    """Looks at the trainer's latest figures between rollouts."""

    def __init__(self, guards: Sequence[Guard], trainer: Any, say: Callable[[str], None]):
        self.guards, self.trainer, self.say = guards, trainer, say
        self.seen = [0] * len(guards)
        self.best: dict[str, float] = {}
        self.raised = 0
        self.saved_best = -float("inf")
        self.reason: str | None = None
        self.back = False

    def sign(self, guard: Guard, figures: dict[str, float]) -> str:
        """What a guard finds wrong with the figures, or the empty string."""
        if guard.metric == "nan":
            broken = [name for name, value in figures.items() if not math.isfinite(value)]
            return f"{' and '.join(sorted(broken))} {'is' if len(broken) == 1 else 'are'} no number" if broken else ""
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
        """The guards whose patience is at its end, with what they saw; remembers the bests."""
        for name in ("reward", *(guard.metric for guard in self.guards if guard.drop is not None)):
            if name in figures:
                self.best[name] = max(self.best.get(name, -float("inf")), figures[name])
        due = []
        for at, guard in enumerate(self.guards):
            found = self.sign(guard, figures)
            self.seen[at] = self.seen[at] + 1 if found else 0
            if self.seen[at] >= (1 if guard.metric == "nan" else guard.patience):
                due.append((guard, found))
        return due

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.trainer.updates_per_rollout:
            return
        due = self.look(self.trainer.latest)
        if not any(guard.act == "raise_kl" for guard, _ in due) and self.raised:
            self.trainer.kl_coefficient /= STEP_UP
            self.raised -= 1
        for guard, found in due:
            if guard.act == "warn":
                self.say(f"guard: step {state.global_step}: {found}")
            elif guard.act == "raise_kl":
                self.trainer.kl_coefficient *= STEP_UP
                self.raised += 1
                self.say(f"guard: step {state.global_step}: {found}; β is now {self.trainer.kl_coefficient:.4g}")
            elif self.reason is None:
                self.back = guard.act == "rollback"
                self.reason = f"step {state.global_step}: {found}"
                self.say(f"guard: {self.reason}; the run ends here{', at its best checkpoint' if self.back else ''}")
                control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        figure = self.trainer.latest.get("gold_reward", self.trainer.latest.get("reward", 0.0))
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if figure > self.saved_best:
            # what is named here is spared when old checkpoints are removed
            self.saved_best, state.best_model_checkpoint = figure, str(folder)
        if state.is_world_process_zero:
            kept = {"beta": self.trainer.kl_coefficient, "seen": self.seen, "best": self.best, "raised": self.raised}
            kept |= {"saved_best": self.saved_best, "best_checkpoint": state.best_model_checkpoint}
            (folder / STATE).write_text(json.dumps(kept))

    def on_train_begin(self, args, state, control, **kwargs):
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        if state.global_step and file.is_file():
            kept = json.loads(file.read_text())
            self.trainer.kl_coefficient = kept["beta"]
            self.seen, self.best, self.raised = kept["seen"], kept["best"], kept["raised"]
            self.saved_best, state.best_model_checkpoint = kept["saved_best"], kept["best_checkpoint"]

    def roll_back(self) -> bool:
        """Load the best checkpoint's weights, if a guard asked for it and there is one; whether it was so."""
        best = self.trainer.state.best_model_checkpoint
        if self.back and best and Path(best).is_dir():
            self.trainer._load_best_model()
            self.say(f"rolled back to {best}")
            return True
        return False
