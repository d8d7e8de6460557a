"""A reward: the scores of one source, normalised, aggregated and weighted.

Shapes: b responses, n scores of an ensemble.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align_cli.errors import TrainingError

Messages = list[dict[str, str]]
Scorer = Callable[[list[Any], list[str]], Tensor]
"""(prompts as messages, or cells; responses as text) -> (b, n) scores, n > 1 for an ensemble."""


@dataclass
class Reward:
    """One source of reward, its weight, and how to combine an ensemble's scores."""

    score: Scorer
    weight: float = 1.0
    aggregate: str = "mean"
    """mean, worst, or minus-std (mean - k·std)."""
    k: float = 1.0
    mean: Tensor | float = 0.0
    std: Tensor | float = 1.0
    """(n,) mean and std of the normalisation (score - mean) / std."""
    clip: float | None = None
    name: str = "reward"
    """The recipe key that it comes from, for messages."""
    cell: str | None = None
    """Row column that the scorer gets instead of the prompts, with the cells to compare responses with."""

    def __call__(
        self, prompts: list[Any], texts: list[str], rows: list[dict[str, Any]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(b,) weighted scores, and (b,) spread of the ensemble (0 without one)."""
        compared = [json.loads(row[self.cell]) for row in rows] if self.cell else prompts
        each = self.score(compared, texts).float().cpu()
        if not each.isfinite().all():
            broken = int((~each.isfinite().all(1)).sum())
            raise TrainingError(
                f"{self.name}: gave scores that are not finite for {broken} of {len(texts)} responses; the policy "
                "would learn nothing from them, or lose its weights; look at the weights of this reward"
            )
        each = (each - self.mean) / self.std
        spread = each.std(1) if each.shape[1] > 1 else torch.zeros(len(each), device=each.device)
        one = each.mean(1)
        if self.aggregate == "worst":
            one = each.min(1).values
        elif self.aggregate == "minus-std":
            one = one - self.k * spread
        if self.clip is not None:
            one = one.clamp(-self.clip, self.clip)
        return self.weight * one, spread
