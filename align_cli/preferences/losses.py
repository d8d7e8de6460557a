"""Preference losses as functions of response log-probabilities. Imports torch only.

`preference_loss` covers ORPO, SimPO, CPO, DPO, length-normalised DPO and any mixture of them: each is a function of
(lp_w, lp_l), the responses' lengths and, for some methods, the reference's log-probabilities. SPIN is `dpo_loss` with
the previous iterate's reply as the rejected response.

Shapes: b pairs. lp is a summed response log-probability, l̄p its mean per token; w chosen, l rejected. Everything is
computed in float32 for any input dtype: ORPO's odds lose all precision in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

CERTAIN = -1e-6
"""The highest l̄p that has finite odds in float32."""


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - eˣ) for x < 0, accurate at both ends (Mächler 2012). Takes and returns float32 or a wider dtype."""
    x = x.clamp(max=CERTAIN)
    # the branch that is not taken must not put NaN into the gradient
    near = x > -math.log(2)
    small, large = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, (-small.expm1()).log(), (-large.exp()).log1p())


def log_odds(chosen_mean: Tensor, rejected_mean: Tensor) -> Tensor:
    """(b,) log [odds(w) / odds(l)], odds = p / (1 - p), p = exp(l̄p) (ORPO, arXiv 2403.07691, eq. 3, 7)."""
    chosen, rejected = chosen_mean.float(), rejected_mean.float()
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def odds_ratio_loss(chosen_mean: Tensor, rejected_mean: Tensor) -> Tensor:
    """(b,) -log σ(log-odds), ORPO's second term (arXiv 2403.07691, eq. 7); the first is `nll_loss`."""
    return -logsigmoid(log_odds(chosen_mean, rejected_mean))


def nll_loss(chosen_mean: Tensor) -> Tensor:
    """(b,) -l̄p of the chosen response: SFT on it (ORPO, eq. 6; CPO's behaviour cloning, arXiv 2401.08417)."""
    return -chosen_mean.float()


def simpo_loss(
    chosen_mean: Tensor, rejected_mean: Tensor, *, beta: float, gamma_ratio: float, label_smoothing: float = 0.0
) -> Tensor:
    """(b,) -log σ(β(l̄p_w - l̄p_l) - γ), γ = β·gamma_ratio (SimPO, arXiv 2405.14734, eq. 6)."""
    margin = chosen_mean.float() - rejected_mean.float()
    return _smoothed(beta * (margin - gamma_ratio), label_smoothing)


def dpo_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """(b,) -log σ(β(chosen_ratio - rejected_ratio)), with ratios lp - ref (DPO, arXiv 2305.18290, eq. 7; SPIN,
    arXiv 2401.01335, eq. 4.7), their means per token (length-normalised DPO, arXiv 2411.15124), or lp only (CPO,
    arXiv 2401.08417). With label smoothing ε it is conservative DPO."""
    return _smoothed(beta * (chosen_ratio.float() - rejected_ratio.float()), label_smoothing)


def _smoothed(logits: Tensor, epsilon: float) -> Tensor:
    """-(1-ε)·log σ(x) - ε·log σ(-x)."""
    return -(1 - epsilon) * logsigmoid(logits) - epsilon * logsigmoid(-logits)


@dataclass(frozen=True)
class Side:
    """The chosen or the rejected responses of b pairs."""

    sums: Tensor
    """(b,) lp under the policy."""
    lengths: Tensor
    """(b,) tokens."""
    reference: Tensor | None = None
    """(b,) lp under the reference."""

    @property
    def mean(self) -> Tensor:
        """(b,) l̄p."""
        return self.sums.float() / self.lengths.clamp(min=1)

    @property
    def ratio(self) -> Tensor:
        """(b,) log π/π_ref of the response."""
        if self.reference is None:
            raise ValueError("this loss compares with a reference, but its log-probabilities were not computed")
        return self.sums.float() - self.reference.float()

    @property
    def mean_ratio(self) -> Tensor:
        """(b,) log π/π_ref per token."""
        return self.ratio / self.lengths.clamp(min=1)


@dataclass(frozen=True)
class Term:
    """One loss of a mixture."""

    loss: str
    weight: float = 1.0
    beta: float = 0.1
    gamma_ratio: float = 0.0
    label_smoothing: float = 0.0


def _nll(term: Term, chosen: Side, rejected: Side) -> tuple[Tensor, Tensor]:
    return nll_loss(chosen.mean), torch.zeros_like(chosen.mean)


def _odds_ratio(term: Term, chosen: Side, rejected: Side) -> tuple[Tensor, Tensor]:
    return odds_ratio_loss(chosen.mean, rejected.mean), log_odds(chosen.mean, rejected.mean)


def _simpo(term: Term, chosen: Side, rejected: Side) -> tuple[Tensor, Tensor]:
    settings = {"beta": term.beta, "gamma_ratio": term.gamma_ratio, "label_smoothing": term.label_smoothing}
    return simpo_loss(chosen.mean, rejected.mean, **settings), term.beta * (chosen.mean - rejected.mean)


def _logistic(of: Callable[[Side], Tensor]) -> Callable[[Term, Side, Side], tuple[Tensor, Tensor]]:
    def term_of(term: Term, chosen: Side, rejected: Side) -> tuple[Tensor, Tensor]:
        better, worse = of(chosen), of(rejected)
        loss = dpo_loss(better, worse, beta=term.beta, label_smoothing=term.label_smoothing)
        return loss, term.beta * (better - worse)

    return term_of


LOSSES: dict[str, Callable[[Term, Side, Side], tuple[Tensor, Tensor]]] = {
    "nll": _nll,
    "odds-ratio": _odds_ratio,
    "simpo": _simpo,
    "cpo": _logistic(lambda side: side.sums.float()),
    "dpo": _logistic(lambda side: side.ratio),
    "dpo-norm": _logistic(lambda side: side.mean_ratio),
}
"""Name -> (b,) losses and (b,) margins of a term, before its weight."""


def preference_loss(terms: Sequence[Term], chosen: Side, rejected: Side) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(b,) losses of a mixture, (b,) its margin, and (b,) each term's loss before its weight.

    The margin, which the mixture pushes above 0, is the weighted sum of its terms' margins. If NLL is the only term,
    it is the difference of l̄p.
    """
    total, margin, each = torch.zeros_like(chosen.mean), torch.zeros_like(chosen.mean), {}
    for term in terms:
        loss, ahead = LOSSES[term.loss](term, chosen, rejected)
        total, margin = total + term.weight * loss, margin + term.weight * ahead
        each[term.loss] = loss
    if all(term.loss == "nll" or not term.weight for term in terms):
        margin = chosen.mean - rejected.mean
    return total, margin, each
