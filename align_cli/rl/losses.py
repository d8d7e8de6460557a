"""Reinforcement learning losses that TRL lacks. Imports torch only."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½·max((V - R)², (V_old + clip(V - V_old, ±ε) - R)²) per token (openai/baselines, ppo2)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.max((values - returns).square(), (clipped - returns).square()) / 2
