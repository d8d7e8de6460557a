"""Reward-model losses as pure functions of scores. Imports torch only.

Shapes: b groups, k responses of a group (padded to the largest). Every function returns (b,) losses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def pair_targets(levels: Tensor, probability: Tensor | None = None) -> Tensor:
    """(b, k, k) probability that response i beats response j; 0 in both directions if the two are not compared.

    `levels` is (b, k): 0 for the best responses, 1 for the next best, …, equal for ties, -1 for padding. If
    `probability` (b,) is not NaN, the group is a pair whose first response is better with that probability.
    """
    there = levels >= 0
    both = there.unsqueeze(2) & there.unsqueeze(1)
    targets = ((levels.unsqueeze(2) < levels.unsqueeze(1)) & both).float()
    if probability is not None:
        soft = ~probability.isnan()
        targets[soft, 0, 1] = probability[soft]
        targets[soft, 1, 0] = 1 - probability[soft]
    return targets


def ranking_loss(scores: Tensor, targets: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-1/C(K,2) Σ_{i before j} log σ(r_i - r_j - m): all pairs of a prompt as one element (InstructGPT, eq. 1).

    `scores` (b, k), `targets` from `pair_targets`, `margin` a number or (b, k, k), as in Llama 2 (arXiv 2307.09288,
    eq. 2). With two responses it is Bradley-Terry. Ties form no pair; the mean is over the remaining pairs. A soft
    target p gives -p·log σ(Δ) - (1-p)·log σ(-Δ).
    """
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)
    pairs = targets.sum((1, 2))
    return -(targets * logsigmoid(difference - margin)).sum((1, 2)) / pairs.clamp(min=1e-9)


def plackett_luce_loss(scores: Tensor, levels: Tensor) -> Tensor:
    """-log P(ranking) = Σ_i [logsumexp_{j not before i} r_j - r_i] (Plackett 1975).

    Tied responses share one denominator (Breslow). The last level contributes nothing.
    """
    there = levels >= 0
    behind = (levels.unsqueeze(1) >= levels.unsqueeze(2)) & there.unsqueeze(1)
    followed = ((levels.unsqueeze(1) > levels.unsqueeze(2)) & there.unsqueeze(1)).any(2)
    rivals = scores.unsqueeze(1).masked_fill(~behind, -torch.inf)
    # a padded response has no rivals, and logsumexp of all -∞ would put NaN into the gradient
    rivals = rivals.masked_fill(~there.unsqueeze(2), 0.0)
    return ((rivals.logsumexp(2) - scores) * (there & followed)).sum(1)


def best_of_k_loss(scores: Tensor, levels: Tensor) -> Tensor:
    """-log softmax(r)_best over a prompt's responses (lm-human-preferences, arXiv 1909.08593, eq. 1).

    Several best responses share the target equally.
    """
    log_shares = scores.masked_fill(levels < 0, -torch.inf).log_softmax(1)
    best = (levels == 0).float()
    return -(log_shares.masked_fill(levels != 0, 0.0) * best).sum(1) / best.sum(1).clamp(min=1)


def centering(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean of (r_i + r_j)² over the compared pairs, which keeps scores near zero (arXiv 2312.09244)."""
    compared = ((targets + targets.transpose(1, 2)) > 0).float()
    total = (scores.unsqueeze(2) + scores.unsqueeze(1)) ** 2
    return (compared * total).sum((1, 2)) / compared.sum((1, 2)).clamp(min=1)
