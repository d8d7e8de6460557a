"""Computes advantages from scores: the part of PPO between a rollout and its loss. Imports torch only.

Shapes: b samples, t response tokens; `mask` is (b, t), 1 on response tokens, which start in the first column.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_estimate(log_ratio: Tensor, how: str) -> Tensor:
    """Per-token estimate of KL(π‖π_ref) from log π - log π_ref at sampled tokens (Schulman, "Approximating KL").

    k1 is unbiased, k2 = x²/2 has less variance, k3 = e^-x - 1 + x is unbiased and never negative.
    """
    if how == "k1":
        return log_ratio
    if how == "k2":
        return log_ratio.square() / 2
    if how == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"unknown KL estimator {how}")


def shaped_rewards(scores: Tensor, log_ratio: Tensor, mask: Tensor, *, beta: float, estimator: str = "k1") -> Tensor:
    """(b, t) r_t = -β·KL_t, plus the (b,) score on the last response token (InstructGPT, eq. 2)."""
    rewards = -beta * kl_estimate(log_ratio, estimator) * mask
    last = (mask.sum(1).long() - 1).clamp(min=0).unsqueeze(1)
    return rewards.scatter_add(1, last, scores.to(rewards).unsqueeze(1)) * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(b, t) advantages and returns: A_t = Σ (γλ)^l δ_{t+l}, δ_t = r_t + γ·V_{t+1} - V_t (arXiv 1506.02438, eq. 16).

    The value after the last response token is 0: the episode ends there.
    """
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta = (rewards + gamma * following - values) * mask
    advantages, running = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])
    for t in range(delta.shape[1] - 1, -1, -1):
        running = delta[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages * mask, (advantages + values) * mask


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """(3,) count, sum and sum of squares over response tokens, to be summed over ranks for mean and variance."""
    chosen = values.double() * mask
    return torch.stack([mask.double().sum(), chosen.sum(), chosen.square().sum()])


def whiten(values: Tensor, mask: Tensor, total: Tensor) -> Tensor:
    """Values scaled to mean 0 and variance 1 over all response tokens. `total` is the sum of `moments` over ranks."""
    count, first, second = total.unbind()
    mean = first / count
    deviation = ((second / count - mean.square()).clamp(min=0) + 1e-8).sqrt()
    return ((values - mean) / deviation * mask).to(values.dtype)


class KLController:
    """β, fixed or adaptive: β ← β·(1 + clip(KL/target - 1, ±0.2)·n/horizon) (lm-human-preferences, §2.2)."""

    def __init__(self, beta: float, target: float | None = None, horizon: int = 10_000):
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl: float, episodes: int) -> None:
        """Update β, given the mean `kl` in nats per sequence of `episodes` sequences."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * episodes / self.horizon
