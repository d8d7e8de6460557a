"""The methods that learn from preferences without sampling: ORPO, SimPO, mixtures with them, KTO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from align_cli.recipe.sections import Count, Positive, section

Weight = Annotated[float, Field(ge=0)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
Pairs = Literal["best-worst", "all", "adjacent"]
REFERENCED = ("dpo", "dpo-norm")
"""Losses that compare with a reference, and so hold a second model."""


@section
class PreferenceLoss:
    """A loss that is added to a method's own."""

    loss: Literal["nll", "odds-ratio", "simpo", "cpo", "dpo", "dpo-norm"]
    """nll: -l̄p of the chosen response; odds-ratio: ORPO's second term; simpo; cpo: -log σ(β(lp_w - lp_l)), arXiv
    2401.08417; dpo; dpo-norm: DPO on means a token. The last two hold a reference."""
    weight: Weight = 1.0
    """What it counts for in the sum."""
    beta: Positive = 0.1
    """β of simpo, cpo, dpo and dpo-norm."""
    gamma_ratio: Weight = 0.0
    """γ/β of simpo."""
    label_smoothing: Smoothing = 0.0
    """Assumed probability that a label is flipped; for simpo, cpo, dpo and dpo-norm."""


@section
class PairMethod:
    """What losses over pairs of responses share."""

    pairs: Pairs = "best-worst"
    """Which pairs a ranking of K > 2 gives: one, all K(K-1)/2, or K-1 neighbours."""
    also: list[PreferenceLoss] = Field(default_factory=list)
    """Losses added to the method's own, such as {loss: nll, weight: 0.1}."""
    layout: Literal["auto", "shared", "rows"] = "auto"
    """shared: the prompt goes through the model once for both of its responses (4-D mask); rows: once for each. auto
    tries shared on the first pair, and keeps it if the model gives the same."""
    batch_tokens: Count | None = None
    """Tokens, padding included, that go through the model at a time on a device. Memory follows from it, the result
    does not. null: 16384 on a GPU, 2048 without one."""

    def terms(self) -> list[PreferenceLoss]:
        """Every loss of the mixture."""
        return list(self.also)

    def needs_reference(self) -> bool:
        """Whether a loss of the mixture compares with a reference."""
        return any(term.loss in REFERENCED and term.weight for term in self.terms())

    def rules(self) -> Iterator[tuple[str, str]]:
        if not any(term.weight for term in self.terms()):
            yield "method.weight", "is 0, and no loss is left; raise it, or name another under method.also"
        names = [term.loss for term in self.terms()]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield "method.also", f"makes {name} stand in the mixture twice; give each loss once, with its weight"


@section
class OrpoMethod(PairMethod):
    """Odds ratio preference optimization: NLL(chosen) - α·log σ(log odds ratio) (arXiv 2403.07691, eq. 6). No
    reference, and no SFT stage before it."""

    alpha: Weight = 0.1
    """Weight of the odds-ratio term: λ in the paper, beta in TRL."""

    def terms(self) -> list[PreferenceLoss]:
        """NLL, the odds ratio, and what was added."""
        return [PreferenceLoss(loss="nll"), PreferenceLoss(loss="odds-ratio", weight=self.alpha), *self.also]


@section
class SimpoMethod(PairMethod):
    """Simple preference optimization: -log σ(β(l̄p_w - l̄p_l) - γ), l̄p the mean log-probability a token (arXiv
    2405.14734, eq. 6). No reference."""

    beta: Positive = 2.0
    """β, the scale of the reward."""
    gamma_ratio: Weight = 0.5
    """γ/β, as the paper's table quotes it: the margin in mean log-probability a token."""
    label_smoothing: Smoothing = 0.0
    """Assumed probability that a label is flipped."""
    weight: Weight = 1.0
    """Weight of SimPO's own loss; 0 leaves the losses of `also` alone, so that CPO, say, can be run by itself."""

    def terms(self) -> list[PreferenceLoss]:
        """SimPO and what was added."""
        own = PreferenceLoss(
            loss="simpo",
            weight=self.weight,
            beta=self.beta,
            gamma_ratio=self.gamma_ratio,
            label_smoothing=self.label_smoothing,
        )
        return [own, *self.also]


def pair_rules(method: PairMethod, reference: Any, data: Any) -> Iterator[tuple[str, str]]:
    """What concerns a pair method and another section."""
    if reference is not None and not method.needs_reference():
        yield (
            "reference",
            "is held by no loss of this recipe; remove it, or add one that compares with it, such as "
            "method.also=[{loss: dpo}]",
        )
    if data.streaming:
        yield "data.streaming", "is not for this stage, whose steps are filled from pairs in memory; remove it"


@section
class KtoMethod:
    """Kahneman-Tversky optimization: single responses that are good or bad (arXiv 2402.01306, eq. 7, 8)."""

    loss: Literal["kto", "apo-zero"] = "kto"
    """apo-zero is the unpaired form of APO (arXiv 2408.06266), which needs no estimate of the KL."""
    beta: Positive = 0.1
    """β: how soon a response counts as good or bad enough."""
    desirable_weight: Positive = 1.0
    """λ_D. Eq. 8 wants λ_D·n_D / (λ_U·n_U) between 1 and 4/3, n being the rows of each kind."""
    undesirable_weight: Positive = 1.0
    """λ_U."""
    split: Literal["best-worst", "best-rest"] = "best-worst"
    """What a ranking gives: its best response as a good one, and as bad ones its worst, or all that are worse."""


def kto_rules(method: KtoMethod, data: Any, trainer: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What concerns KTO and another section."""
    if data.streaming:
        yield "data.streaming", "is not for kto, which pairs rows with their neighbours; remove it"
    if method.loss == "kto" and 1 in (trainer.get("per_device_train_batch_size"), data.batch_size):
        yield "data.batch_size", "must leave each device two rows or more, between which the KL is estimated; raise it"
