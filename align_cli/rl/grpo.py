"""GRPO on TRL's trainer, with our rollouts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module
from trl import GRPOTrainer

from align_cli.rl.rollouts import GroupRollouts


class GrpoTrainer(GroupRollouts, GRPOTrainer):
    """GRPOTrainer on K adjacent samples per prompt."""

    def policy_loss(self, model: Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss; also records our KL metrics."""
        loss = super().policy_loss(model, inputs)
        self.note_kl()
        return loss
