"""Quality of a reward model on held-out groups, compared with the baseline "the longer response wins".

Shapes: p compared pairs, as (winner, loser).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 4
"""Number of bins of |Δr|, so quarters. The calibration error uses ten bins of its own."""


@dataclass
class Pairs:
    """Compared pairs of held-out groups."""

    difference: Tensor
    """(p,) r_winner - r_loser."""
    longer: Tensor
    """(p,) tokens of the winner minus tokens of the loser."""
    group: Tensor
    """(p,) index of the pair's group."""


def pairs(scores: list[list[float]], levels: list[list[int]], lengths: list[list[int]]) -> Pairs:
    """Every pair of responses that a group ranks; tied responses form no pair."""
    compared = [
        (scores[g][i] - scores[g][j], lengths[g][i] - lengths[g][j], g)
        for g, order in enumerate(levels)
        for i in range(len(order))
        for j in range(len(order))
        if order[i] < order[j]
    ]
    table = torch.tensor(compared, dtype=torch.float64).reshape(-1, 3)
    return Pairs(table[:, 0], table[:, 1], table[:, 2].long())


def measure(compared: Pairs) -> dict[str, Any]:
    """Metrics by name; accuracies count equal scores as half. Empty without pairs.

    accuracy and its standard error (clustered by group, since the pairs of one prompt are correlated), longer_wins,
    accuracy where the winner is the longer / shorter response and by quarter of |Δr|, the expected calibration error
    of σ(Δr) (arXiv 1706.04599, ten bins), and Spearman(Δr, Δlength) over both orders of every pair.
    """
    difference, longer = compared.difference, compared.longer
    if not len(difference):
        return {}
    right = _wins(difference)
    figures = {
        "accuracy": right.mean().item(),
        "accuracy_se": _standard_error(right, compared.group),
        "longer_wins": _wins(longer).mean().item(),
        "pairs": len(difference),
        "groups": len(compared.group.unique()),
        "margin": difference.mean().item(),
    }
    for name, of in (("longer", longer > 0), ("shorter", longer < 0)):
        if of.any():
            figures[f"accuracy_winner_{name}"] = right[of].mean().item()
            figures[f"pairs_winner_{name}"] = int(of.sum())
    order = difference.abs().argsort(stable=True)
    if len(order) >= BINS:
        for number, part in enumerate(order.tensor_split(BINS), 1):
            figures[f"accuracy_quarter_{number}"] = right[part].mean().item()
    figures["calibration_error"] = _calibration_error(difference, right)
    both = torch.cat([difference, -difference]), torch.cat([longer, -longer])
    figures["spearman_length"] = _correlation(*map(_ranks, both))
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in figures.items()}


def lines(figures: dict[str, Any]) -> list[str]:
    """Lines to print. The last line is a warning if the model is not clearly better than judging by length."""
    if not figures:
        return ["held-out: no pairs to compare"]
    error = figures["accuracy_se"]
    shown = [
        f"held-out pairs: accuracy {figures['accuracy']:.3f} ± {error:.3f}, compared with {figures['longer_wins']:.3f} "
        f'for "the longer one wins" ({figures["pairs"]} pairs of {figures["groups"]} prompts)'
    ]
    by_length = [
        f"{figures[f'accuracy_winner_{name}']:.3f} where the winner is the {name} one "
        f"({figures[f'pairs_winner_{name}']} pairs)"
        for name in ("longer", "shorter")
        if f"accuracy_winner_{name}" in figures
    ]
    if by_length:
        shown.append(f"  accuracy {', '.join(by_length)}")
    if "accuracy_quarter_1" in figures:
        quarters = " ".join(f"{figures[f'accuracy_quarter_{n}']:.3f}" for n in range(1, BINS + 1))
        shown.append(f"  accuracy by |Δr|, smallest quarter first: {quarters}")
    shown.append(
        f"  calibration error {figures['calibration_error']:.3f}, "
        f"Spearman(Δr, Δlength) {figures['spearman_length']:+.2f}"
    )
    if figures["accuracy"] <= max(figures["longer_wins"], 1 - figures["longer_wins"], 0.5):
        shown.append("  This reward model does no better than judging by length: do not optimise against it.")
    elif figures["accuracy"] - error <= max(figures["longer_wins"], 1 - figures["longer_wins"], 0.5):
        shown.append("  It beats judging by length by less than one standard error: hold out more pairs to be sure.")
    return shown


def _wins(difference: Tensor) -> Tensor:
    return (difference.sign() + 1) / 2


def _standard_error(right: Tensor, group: Tensor) -> float:
    """Standard error of the mean over pairs, clustered by group (Liang & Zeger 1986)."""
    groups = group.unique()
    if len(groups) < 2:
        return float((right.var(unbiased=False) / len(right)).sqrt())
    residual = right - right.mean()
    sums = torch.stack([residual[group == one].sum() for one in groups])
    return float((sums.square().sum() * len(groups) / (len(groups) - 1)).sqrt() / len(right))


def _calibration_error(difference: Tensor, right: Tensor, bins: int = 10) -> float:
    """Σ_bins share · |accuracy - confidence|, confidence = σ(|Δr|) from 0.5 to 1."""
    confidence = difference.abs().sigmoid()
    which = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    total = 0.0
    for one in which.unique():
        inside = which == one
        total += inside.double().mean().item() * (right[inside].mean() - confidence[inside].mean()).abs().item()
    return total


def _ranks(values: Tensor) -> Tensor:
    """Average ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if scale > 0 else 0.0
