"""GRPO on TRL's trainer, with our rollouts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from align_cli.methods.rollouts import Rollouts


class RelativeTrainer(Rollouts, GRPOTrainer):
    """GRPOTrainer over K samples a prompt, which lie side by side."""

    @property
    def kl_coefficient(self) -> float:
        """β."""
        return self.beta

    @kl_coefficient.setter
    def kl_coefficient(self, beta: float) -> None:
        self.beta = beta

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        per_token = self._metrics["train"]["kl"]
        if self.model.training:
            if per_token:
                # nats a sequence, as PPO counts them
                self.note("kl", per_token.pop() * self.latest["response_length"])
            self.note("beta", self.beta)
        return loss
