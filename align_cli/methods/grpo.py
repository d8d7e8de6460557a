"""GRPO on TRL's trainer, with our rollouts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from align_cli.methods.rollouts import GroupRollouts


class RelativeTrainer(GroupRollouts, GRPOTrainer):
    """GRPOTrainer over K samples a prompt, which lie side by side."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        self.note_kl()
        return loss
