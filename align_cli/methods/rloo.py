"""RLOO on TRL's trainer, with our rollouts."""

from __future__ import annotations

from typing import Any

from trl import RLOOTrainer

from align_cli.methods.rollouts import GroupRollouts


class GroupTrainer(GroupRollouts, RLOOTrainer):
    """RLOOTrainer over K samples a prompt, which lie side by side."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        made = super()._generate_single_turn(*args, **kwargs)
        # GRPOTrainer's form, which the mixin follows, adds log-probabilities
        return made[0] if isinstance(made, tuple) else made

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rollout = super()._generate_and_score_completions(inputs)
        self.note_kl()
        return rollout
