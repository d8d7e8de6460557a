"""The sections of the methods that learn from preferences: DPO (offline and in rounds), SPIN, ORPO, SimPO and KTO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from align_cli.recipe.generation import Generation, room_rules
from align_cli.recipe.rewards import (
    Gold,
    Guard,
    Rewards,
    RewardSource,
    gold_models,
    guard_rules,
    keyed,
    reward_rules,
)
from align_cli.recipe.sections import Count, Data, OtherModel, Positive, Recipe, section
from align_cli.recipe.stages import RowKind

DPO_LOSSES = Literal[
    "sigmoid",
    "cdpo",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


def _as_losses(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


@section
class DpoMethod:
    """Direct preference optimization (arXiv 2305.18290)."""

    loss: Annotated[
        list[DPO_LOSSES], BeforeValidator(_as_losses, json_schema_input_type=DPO_LOSSES | list[DPO_LOSSES])
    ] = Field(default_factory=lambda: ["sigmoid"], min_length=1)
    """Loss, or a list of losses that are added up with `loss_weights`."""
    loss_weights: list[float] | None = None
    """One weight a loss; null weighs all by 1."""
    beta: Positive = 0.1
    """Strength of the pull to the reference (β in eq. 7; τ for ipo)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed probability that a label is flipped; used by cdpo, robust, exo_pair, aot and aot_unpaired."""
    pairs: Literal["best-worst", "best-random", "all", "adjacent"] = "best-worst"
    """Which pairs a ranking of K > 2 gives: the best with the worst or with one drawn from the others, all K(K-1)/2,
    or K-1 neighbours. Equal scores make no pair."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities once, keep them on disk for later runs, and hold one model less."""
    rounds: Count | None = None
    """Iterative DPO (RLHF Workflow, arXiv 2405.07863): so many rounds, each a run directory of its own. A round answers
    fresh prompts of data.train with the policy as it then is, scores the answers with `reward`, and trains on the pairs
    with its own start as reference, unless `reference` names another. null: data.train holds preferences."""
    prompts: Count | None = None
    """Prompts a round; null shares those of data.train out equally."""
    fresh: Literal["slices", "sources"] = "slices"
    """Where a round's prompts come from. slices: disjoint, seeded parts of data.train; sources: round n takes the n-th
    source of data.train."""
    k: Annotated[int, Field(ge=2)] = 4
    """Answers to a prompt, in rounds."""
    min_gap: Annotated[float, Field(ge=0)] = 0.0
    """By how much the scores of a pair must differ, in rounds; at 0 only equal ones make none."""
    missing_eos: float | None = -1.0
    """Score of an answer that does not end, in place of the reward model's; such an answer is never the better one of a
    pair. null treats it as any other."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss):
            yield (
                "method.loss_weights",
                f"has {len(self.loss_weights)} weights for {len(self.loss)} losses; give one each",
            )
        if "exo_pair" in self.loss and self.label_smoothing == 0:
            yield "method.label_smoothing", "must be above 0 for exo_pair; the paper uses 1e-3"
        if "cdpo" in self.loss and len(self.loss) > 1:
            yield "method.loss", "cdpo cannot be mixed with other losses; use robust or sigmoid in the mixture"


@section
class SpinMethod:
    """Self-play fine-tuning (arXiv 2401.01335, eq. 4.7): the human reply against the previous iterate's own."""

    iterations: Count = 3
    """Iterations, counted from 0 as in the paper, each a run directory of its own."""
    beta: Positive | Annotated[list[Positive], Field(min_length=1)] = 0.1
    """Strength of the pull to the previous iterate (λ in the paper), or one for each iteration."""
    learning_rate: Positive | Annotated[list[Positive], Field(min_length=1)] | None = None
    """Learning rate, or one for each iteration; null: trainer.learning_rate in all of them."""
    prompts: Count | None = None
    """Demonstrations that are replied to, a seeded choice that is the same in every iteration; null all."""
    mix_previous: bool = True
    """Train on the pairs of the iteration before, too: the paper doubles its data so."""
    stop_when_alike: bool = True
    """End after an iteration whose trained model cannot tell human replies from its start's: accuracy on held-out pairs
    not above ½ by more than its standard error. Needs data.eval."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities before an iteration's training, and hold one model less."""

    def at(self, iteration: int) -> tuple[float, float | None]:
        """β and learning rate of an iteration, the latter None where the trainer's own holds."""
        beta, rate = (
            value[iteration] if isinstance(value, list) else value for value in (self.beta, self.learning_rate)
        )
        return beta, rate

    def rules(self) -> Iterator[tuple[str, str]]:
        for key in ("beta", "learning_rate"):
            given = getattr(self, key)
            if isinstance(given, list) and len(given) != self.iterations:
                yield (
                    f"method.{key}",
                    f"has {len(given)} entries for {self.iterations} iterations; give one each, or a single number",
                )


def sampling_rules(generation: Generation, data: Data, where: str) -> Iterator[tuple[str, str]]:
    """What concerns sampling between trainings: its engine, and room for an answer."""
    yield from room_rules(generation, data)
    if generation.engine not in ("auto", "hf"):
        yield "generation.engine", f"is {generation.engine}, but {where} sample by hf; set generation.engine=auto"
    if data.streaming:
        yield "data.streaming", f"is not for {where}, which choose from whole sources; remove it"


@section
class ReferenceRecipe(Recipe):
    """Stages whose loss may compare with a reference."""

    reference: OtherModel | None = None
    """Default: the starting policy."""

    def reference_path(self) -> str | None:
        return self.reference.path if self.reference else None


@section
class DpoRecipe(ReferenceRecipe):
    """align dpo"""

    stage: ClassVar[str] = "dpo"
    reference: OtherModel | None = None
    """Default: the starting policy; with method.rounds, each round's start."""
    method: DpoMethod = Field(default_factory=DpoMethod)
    reward: Rewards | None = None
    """What scores the answers of method.rounds: a finished `align rm` run, or several with weights."""
    gold: Gold = None
    """A held-out reward model that is watched between rounds and never optimised."""
    generation: Generation = Field(default_factory=Generation)
    guards: list[Guard] = Field(default_factory=list)
    """Watchers of a round's answers, before it trains. Patience counts rounds; raise_kl raises β from that round on."""

    def row_kind(self) -> RowKind:
        return "prompts" if self.method.rounds is not None else "preferences"

    def pairing(self) -> str:
        return self.method.pairs

    def micro_step(self, per_device: int) -> tuple[int, int | None]:
        return 2 * per_device, self.data.max_length

    def unused_keys(self) -> frozenset[str]:
        in_rounds = {"prompts", "fresh", "k", "min_gap", "missing_eos"}
        return frozenset(in_rounds if self.method.rounds is None else ())

    def needs_reference(self) -> bool:
        return True

    def copies(self, role: str) -> int:
        return 0 if role == "reference" and self.method.precompute_reference else Recipe.copies(self, role)

    def reward_sources(self) -> list[tuple[str, RewardSource]]:
        return keyed(self.reward)

    def reward_models(self) -> list[tuple[str, str]]:
        return Recipe.reward_models(self) + gold_models(self.gold)

    def rules(self) -> Iterator[tuple[str, str]]:
        rounds = self.method.rounds
        if rounds is None:
            for key, given in (("reward", self.reward), ("gold", self.gold), ("guards", self.guards)):
                if given:
                    yield key, f"has no use on given preferences; set method.rounds to sample, or remove {key}"
            return
        yield from sampling_rules(self.generation, self.data, "rounds")
        if self.reward is None:
            yield (
                "reward",
                "is missing, and rounds score their own answers; name a finished `align rm` run, such as "
                "${stage:rm}, or a judge",
            )
        if isinstance(self.data.eval, float):
            yield "data.eval", "is a share of prompts, which hold no preferences; name preferences to watch, or null"
        sources = len(self.data.train)
        if self.method.fresh == "sources" and sources != rounds:
            yield (
                "data.train",
                f"names {sources} sources for {rounds} rounds; give one each, or set method.fresh=slices",
            )
        yield from reward_rules(self.reward or [], rounds=True)
        yield from guard_rules(self.guards, self.gold)


@section
class SpinRecipe(Recipe):
    """align spin"""

    stage: ClassVar[str] = "spin"
    method: SpinMethod = Field(default_factory=SpinMethod)
    generation: Generation = Field(default_factory=Generation)

    def micro_step(self, per_device: int) -> tuple[int, int | None]:
        return 2 * per_device, self.data.max_length

    def needs_reference(self) -> bool:
        return True

    def copies(self, role: str) -> int:
        return 0 if role == "reference" and self.method.precompute_reference else Recipe.copies(self, role)

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from sampling_rules(self.generation, self.data, "iterations")
        if self.method.stop_when_alike and self.data.eval is None:
            yield (
                "data.eval",
                "is missing: whether replies can still be told apart shows on held-out ones; set data.eval=0.05, or "
                "method.stop_when_alike=false",
            )
        if self.method.learning_rate is not None and "learning_rate" in self.trainer:
            yield "trainer.learning_rate", "stands beside method.learning_rate; keep one of the two"


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


@section
class PairRecipe(ReferenceRecipe):
    """Stages whose loss is a function of a pair's log-probabilities."""

    reference: OtherModel | None = None
    """For losses that compare with one; default: the starting policy."""
    method: PairMethod

    def pairing(self) -> str:
        return self.method.pairs

    def micro_step(self, per_device: int) -> tuple[int, int | None]:
        return 1, self.method.batch_tokens

    def needs_reference(self) -> bool:
        return self.method.needs_reference()

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.reference is not None and not self.needs_reference():
            yield (
                "reference",
                "is used by no loss of this recipe; remove it, or add one that compares with it, such as "
                "method.also=[{loss: dpo}]",
            )
        if self.data.streaming:
            yield "data.streaming", "does not work here: steps are filled from pairs in memory; remove it"


@section
class OrpoRecipe(PairRecipe):
    """align orpo"""

    stage: ClassVar[str] = "orpo"
    method: OrpoMethod = Field(default_factory=OrpoMethod)


@section
class SimpoRecipe(PairRecipe):
    """align simpo"""

    stage: ClassVar[str] = "simpo"
    method: SimpoMethod = Field(default_factory=SimpoMethod)


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


@section
class KtoRecipe(ReferenceRecipe):
    """align kto"""

    stage: ClassVar[str] = "kto"
    method: KtoMethod = Field(default_factory=KtoMethod)

    def pairing(self) -> str:
        return self.method.split

    def needs_reference(self) -> bool:
        return True

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.data.streaming:
            yield "data.streaming", "does not work in kto, which pairs rows with their neighbours; remove it"
        rows = (self.trainer.get("per_device_train_batch_size"), self.data.batch_size)
        if self.method.loss == "kto" and 1 in rows:
            yield (
                "data.batch_size",
                "must leave each device two rows or more, between which the KL is estimated; raise it",
            )

    def batch_problems(self, per_device: int, ranks: int) -> Iterator[tuple[str, str]]:
        if self.method.loss == "kto" and per_device < 2:
            yield (
                "data.batch_size",
                f"leaves each of {ranks} ranks one row at a time, and kto estimates the KL between two or more; set "
                f"data.batch_size={2 * ranks} or a multiple",
            )
