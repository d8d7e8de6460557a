"""RLOO on TRL's trainer, with our rollouts."""

from __future__ import annotations

from typing import Any

from trl import RLOOTrainer

from align_cli.rl.rollouts import GroupRollouts


class RlooTrainer(GroupRollouts, RLOOTrainer):
    """RLOOTrainer on K adjacent samples per prompt."""

    gives_log_probs = False

    def rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout; also records our KL metrics."""
        rollout = super().rollout(inputs)
        self.note_kl()
        return rollout
