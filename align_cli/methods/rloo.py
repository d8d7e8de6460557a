"""RLOO on TRL's trainer, with our rollouts."""

from __future__ import annotations

from typing import Any

from trl import RLOOTrainer

from align_cli.methods.rollouts import Rollouts


class GroupTrainer(Rollouts, RLOOTrainer):
    """RLOOTrainer over K samples a prompt, which lie side by side."""

    @property
    def kl_coefficient(self) -> float:
        """β."""
        return self.beta

    @kl_coefficient.setter
    def kl_coefficient(self, beta: float) -> None:
        self.beta = beta

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        made = super()._generate_single_turn(*args, **kwargs)
        # GRPOTrainer's form, which the mixin follows, adds log-probabilities
        return made[0] if isinstance(made, tuple) else made

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rollout = super()._generate_and_score_completions(inputs)
        per_token = self._metrics["train"]["kl"]
        if self.model.training and per_token:
            # nats a sequence, as PPO counts them
            self.note("kl", per_token.pop() * self.latest["response_length"])
        if self.model.training:
            self.note("beta", self.beta)
        return rollout
