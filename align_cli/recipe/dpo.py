"""The sections of DPO, offline and in rounds, and of SPIN, which is DPO against a model's own replies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from align_cli.recipe.online import Generation, room_rules
from align_cli.recipe.rewards import guard_rules, reward_rules
from align_cli.recipe.sections import Count, Positive, section

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


def sampling_rules(generation: Generation, data: Any, where: str) -> Iterator[tuple[str, str]]:
    """What concerns sampling between trainings: its engine, and room for an answer."""
    yield from room_rules(generation, data)
    if generation.engine not in ("auto", "hf"):
        yield "generation.engine", f"is {generation.engine}, but {where} sample by hf; set generation.engine=auto"
    if data.streaming:
        yield "data.streaming", f"is not for {where}, which choose from whole sources; remove it"


def round_rules(recipe: Any) -> Iterator[tuple[str, str]]:
    """What concerns iterative DPO and the sections that only it has."""
    rounds = recipe.method.rounds
    if rounds is None:
        for key in ("reward", "gold", "guards"):
            if getattr(recipe, key):
                yield key, f"has no use on given preferences; set method.rounds to sample, or remove {key}"
        return
    yield from sampling_rules(recipe.generation, recipe.data, "rounds")
    if recipe.reward is None:
        yield (
            "reward",
            "is missing, and rounds score their own answers; name a finished `align rm` run, such as ${stage:rm}, or a "
            "judge",
        )
    if isinstance(recipe.data.eval, float):
        yield "data.eval", "is a share of prompts, which hold no preferences; name preferences to watch, or null"
    sources = len(recipe.data.train)
    if recipe.method.fresh == "sources" and sources != rounds:
        yield (
            "data.train",
            f"names {sources} sources for {rounds} rounds; give one each, or set method.fresh=slices",
        )
    yield from reward_rules(recipe.reward or [], rounds=True)
    yield from guard_rules(recipe.guards, recipe.gold)


def spin_rules(recipe: Any) -> Iterator[tuple[str, str]]:
    """What concerns SPIN and another section."""
    yield from sampling_rules(recipe.generation, recipe.data, "iterations")
    if recipe.method.stop_when_alike and recipe.data.eval is None:
        yield (
            "data.eval",
            "is missing: whether replies can still be told apart shows on held-out ones; set data.eval=0.05, or "
            "method.stop_when_alike=false",
        )
    if recipe.method.learning_rate is not None and "learning_rate" in recipe.trainer:
        yield "trainer.learning_rate", "stands beside method.learning_rate; keep one of the two"
