"""The sections of the preference methods: DPO (offline and in rounds), SPIN, ORPO, SimPO and KTO."""

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
    gold_functions,
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
    """A loss, or a list of losses that are summed with `loss_weights`."""
    loss_weights: list[float] | None = None
    """One weight per loss; null: all weights are 1."""
    beta: Positive = 0.1
    """Strength of the KL constraint to the reference (β in eq. 7; τ for ipo)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed probability that a label is flipped; for cdpo, robust, exo_pair, aot and aot_unpaired."""
    pairs: Literal["best-worst", "best-random", "all", "adjacent"] = "best-worst"
    """Which pairs to build from a ranking of K > 2 responses: the best and the worst, the best and a random other one,
    all K(K-1)/2, or the K-1 adjacent ones. Responses with equal scores are not paired."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities once and cache them on disk, also for later runs. Training then holds
    one model fewer."""
    rounds: Count | None = None
    """Number of rounds of iterative DPO (RLHF Workflow, arXiv 2405.07863), each with its own run directory. A round
    answers fresh prompts of data.train with the current policy, scores the answers with `reward`, and trains on the
    resulting pairs. Its reference is the policy at the start of the round, unless `reference` is set. null: offline
    DPO, where data.train holds preferences."""
    prompts: Count | None = None
    """Prompts per round; null: split those of data.train equally between the rounds."""
    fresh: Literal["slices", "sources"] = "slices"
    """Source of a round's prompts. slices: disjoint, seeded parts of data.train; sources: round n uses the n-th source
    of data.train."""
    k: Annotated[int, Field(ge=2)] = 4
    """Answers per prompt in a round."""
    min_gap: Annotated[float, Field(ge=0)] = 0.0
    """In rounds, two answers are paired only if their scores differ by more than this; 0 excludes only ties."""
    missing_eos: float | None = -1.0
    """In rounds, the score of a truncated answer (no end token), which replaces its own score; a truncated answer is
    never the chosen one of a pair. null: treat it like any other answer."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss):
            yield (
                "method.loss_weights",
                f"has {len(self.loss_weights)} weights for {len(self.loss)} losses; give one per loss",
            )
        if "exo_pair" in self.loss and self.label_smoothing == 0:
            yield "method.label_smoothing", "must be above 0 for exo_pair; the paper uses 1e-3"
        if "cdpo" in self.loss and len(self.loss) > 1:
            yield "method.loss", "cdpo cannot be mixed with other losses; use robust or sigmoid in the mixture"


@section
class SpinMethod:
    """Self-play fine-tuning (arXiv 2401.01335, eq. 4.7): prefers human replies to those of the previous iterate."""

    iterations: Count = 3
    """Number of iterations, each with its own run directory; they are numbered from 0 as in the paper."""
    beta: Positive | Annotated[list[Positive], Field(min_length=1)] = 0.1
    """Strength of the KL constraint to the previous iterate (λ in the paper): one value, or one per iteration."""
    learning_rate: Positive | Annotated[list[Positive], Field(min_length=1)] | None = None
    """Learning rate: one value, or one per iteration. null: trainer.learning_rate."""
    prompts: Count | None = None
    """Number of demonstrations to use, a seeded choice that is the same in every iteration; null: all."""
    mix_previous: bool = True
    """Also train on the previous iteration's pairs, as in the paper, which doubles the data."""
    stop_when_alike: bool = True
    """Stop after an iteration whose accuracy on held-out pairs exceeds ½ by at most its standard error: the trained
    model cannot tell human replies from those of its initial policy. Requires data.eval."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities before each training, so that training holds one model fewer."""

    def at(self, iteration: int) -> tuple[float, float | None]:
        """(β, learning rate) of an iteration; the rate is None if trainer.learning_rate applies."""
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
    """Problems of sampling between trainings: the engine, room for an answer, streaming."""
    yield from room_rules(generation, data)
    if generation.engine not in ("auto", "hf"):
        yield "generation.engine", f"is {generation.engine}, but {where} support only hf; set generation.engine=auto"
    if data.streaming:
        yield "data.streaming", f"does not work with {where}, which choose rows from whole sources; remove it"


@section
class ReferenceRecipe(Recipe):
    """Stages whose loss may use a reference model."""

    reference: OtherModel | None = None
    """Reference model. Default: the initial policy."""

    def reference_path(self) -> str | None:
        return self.reference.path if self.reference else None


@section
class DpoRecipe(ReferenceRecipe):
    """align dpo"""

    stage: ClassVar[str] = "dpo"
    reference: OtherModel | None = None
    """Reference model. Default: the initial policy; with method.rounds, the policy at the start of each round."""
    method: DpoMethod = Field(default_factory=DpoMethod)
    reward: Rewards | None = None
    """Scores the answers of method.rounds: a finished `align rm` run, a judge, or a weighted list of rewards."""
    gold: Gold = None
    """A held-out reward model whose score is logged between rounds but not optimised."""
    generation: Generation = Field(default_factory=Generation)
    guards: list[Guard] = Field(default_factory=list)
    """Guards on the metrics of a round's answers, checked before the round trains. Patience counts rounds; raise_kl
    changes β once per round."""

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

    def reward_functions(self) -> list[tuple[str, str]]:
        return Recipe.reward_functions(self) + gold_functions(self.gold)

    def rules(self) -> Iterator[tuple[str, str]]:
        rounds = self.method.rounds
        if rounds is None:
            for key, given in (("reward", self.reward), ("gold", self.gold), ("guards", self.guards)):
                if given:
                    yield key, f"has no effect in offline DPO; set method.rounds, or remove {key}"
            return
        yield from sampling_rules(self.generation, self.data, "rounds")
        if self.reward is None:
            yield (
                "reward",
                "is missing, but method.rounds needs it to score answers; name a finished `align rm` run, such as "
                "${stage:rm}, or a judge",
            )
        if isinstance(self.data.eval, float):
            yield "data.eval", "is a fraction of prompts, but evaluation needs preferences; name a source, or set null"
        sources = len(self.data.train)
        if self.method.fresh == "sources" and sources != rounds:
            yield (
                "data.train",
                f"names {sources} sources for {rounds} rounds; give one per round, or set method.fresh=slices",
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
                "is missing, but method.stop_when_alike needs held-out replies; set data.eval=0.05, or "
                "method.stop_when_alike=false",
            )
        if self.method.learning_rate is not None and "learning_rate" in self.trainer:
            yield "trainer.learning_rate", "is set together with method.learning_rate; keep one of the two"


Weight = Annotated[float, Field(ge=0)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
Pairs = Literal["best-worst", "all", "adjacent"]
REFERENCED = ("dpo", "dpo-norm")
"""Losses that need a reference model."""


@section
class PreferenceLoss:
    """A loss added to the loss of the method."""

    loss: Literal["nll", "odds-ratio", "simpo", "cpo", "dpo", "dpo-norm"]
    """nll: -l̄p of the chosen response; odds-ratio: ORPO's second term; simpo; cpo: -log σ(β(lp_w - lp_l)), arXiv
    2401.08417; dpo; dpo-norm: DPO on mean log-probabilities per token. dpo and dpo-norm load a reference model."""
    weight: Weight = 1.0
    """Weight in the sum of losses."""
    beta: Positive = 0.1
    """β, for simpo, cpo, dpo and dpo-norm."""
    gamma_ratio: Weight = 0.0
    """γ/β, for simpo."""
    label_smoothing: Smoothing = 0.0
    """Assumed probability that a label is flipped; for simpo, cpo, dpo and dpo-norm."""


@section
class PairMethod:
    """Settings shared by losses on pairs of responses."""

    pairs: Pairs = "best-worst"
    """Which pairs to build from a ranking of K > 2 responses: the best and the worst, all K(K-1)/2, or the K-1 adjacent
    ones."""
    also: list[PreferenceLoss] = Field(default_factory=list)
    """Losses added to the loss of the method, such as {loss: nll, weight: 0.1}."""
    layout: Literal["auto", "shared", "rows"] = "auto"
    """shared: one forward pass of the prompt for both responses (4-D mask); rows: one per response. auto: compare the
    two on the first pairs, and use shared if the results agree and, on a GPU, if it is the faster one. The manifest
    names the choice."""
    batch_tokens: Count | None = None
    """Maximum tokens (padding included) per forward pass on each device. It affects memory, not the result. null: 16384
    on a GPU, 2048 on a CPU."""

    def terms(self) -> list[PreferenceLoss]:
        """Every loss of the mixture."""
        return list(self.also)

    def needs_reference(self) -> bool:
        """Whether a loss of the mixture needs a reference model."""
        return any(term.loss in REFERENCED and term.weight for term in self.terms())

    def rules(self) -> Iterator[tuple[str, str]]:
        if not any(term.weight for term in self.terms()):
            yield "method.weight", "is 0, so no loss remains; raise it, or add a loss to method.also"
        names = [term.loss for term in self.terms()]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield "method.also", f"repeats the loss {name}; give each loss once, with its weight"


@section
class OrpoMethod(PairMethod):
    """Odds ratio preference optimization: NLL(chosen) - α·log σ(log odds ratio) (arXiv 2403.07691, eq. 6). It
    needs no reference model and no SFT stage before it."""

    alpha: Weight = 0.1
    """Weight of the odds-ratio term: λ in the paper, beta in TRL."""

    def terms(self) -> list[PreferenceLoss]:
        """NLL, the odds ratio, and the losses of `also`."""
        return [PreferenceLoss(loss="nll"), PreferenceLoss(loss="odds-ratio", weight=self.alpha), *self.also]


@section
class SimpoMethod(PairMethod):
    """Simple preference optimization: -log σ(β(l̄p_w - l̄p_l) - γ), where l̄p is the mean log-probability
    per token (arXiv 2405.14734, eq. 6). It needs no reference model."""

    beta: Positive = 2.0
    """β, the scale of the reward."""
    gamma_ratio: Weight = 0.5
    """γ/β, as in the paper's table: the margin in mean log-probability per token."""
    label_smoothing: Smoothing = 0.0
    """Assumed probability that a label is flipped."""
    weight: Weight = 1.0
    """Weight of the SimPO loss; 0 trains on the losses of `also` only, for example on CPO alone."""

    def terms(self) -> list[PreferenceLoss]:
        """SimPO and the losses of `also`."""
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
    """Reference model, for losses that need one. Default: the initial policy."""
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
                "is not used by any loss of this recipe; remove it, or add a loss that needs it, such as "
                "method.also=[{loss: dpo}]",
            )
        if self.data.streaming:
            yield "data.streaming", "does not work here: batches are filled from pairs in memory; remove it"


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
    """Kahneman-Tversky optimization on single responses labelled good or bad (arXiv 2402.01306, eq. 7, 8)."""

    loss: Literal["kto", "apo-zero"] = "kto"
    """apo-zero: the unpaired form of APO (arXiv 2408.06266), which needs no KL estimate."""
    beta: Positive = 0.1
    """β: how quickly the loss saturates as a response's implied reward grows; higher is faster."""
    desirable_weight: Positive = 1.0
    """λ_D. Eq. 8 recommends λ_D·n_D / (λ_U·n_U) between 1 and 4/3, where n is the number of rows of each kind."""
    undesirable_weight: Positive = 1.0
    """λ_U."""
    split: Literal["best-worst", "best-rest"] = "best-worst"
    """How a ranking becomes labels: its best response is good; best-worst: its worst is bad; best-rest: all
    worse ones are bad."""


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
            yield "data.streaming", "does not work in kto, which pairs each row with its neighbour; remove it"
        rows = (self.trainer.get("per_device_train_batch_size"), self.data.batch_size)
        if self.method.loss == "kto" and 1 in rows:
            yield (
                "data.batch_size",
                "must give each device two rows or more, between which the KL is estimated; raise it",
            )

    def batch_problems(self, per_device: int, ranks: int) -> Iterator[tuple[str, str]]:
        if self.method.loss == "kto" and per_device < 2:
            yield (
                "data.batch_size",
                f"gives each of {ranks} ranks one row at a time, but kto estimates the KL between two or more; set "
                f"data.batch_size={2 * ranks} or a multiple",
            )
