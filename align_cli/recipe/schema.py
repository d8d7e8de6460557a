"""The typed recipe of every stage: the shared sections and what the stage itself is about. Unknown keys are refused.

Cross-field rules stand beside the fields they concern (`rules`), and their messages name the fix. Rules that need
the disk (an upstream run, a data file) are in `run/preflight.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from align_cli.recipe.cai import CaiGeneration, CaiMethod, cai_rules
from align_cli.recipe.dpo import DpoMethod, SpinMethod, round_rules, spin_rules
from align_cli.recipe.online import (
    Generation,
    GrpoMethod,
    PpoMethod,
    RlooMethod,
    online_rules,
)
from align_cli.recipe.preferences import KtoMethod, OrpoMethod, SimpoMethod, kto_rules, pair_rules
from align_cli.recipe.rewards import Gold, Guard, Rewards, guard_rules, reward_rules
from align_cli.recipe.sections import (
    Count,
    Data,
    Launch,
    Lora,
    Model,
    OtherModel,
    Samples,
    Source,
    Zero,
    as_samples,
    as_source,
    section,
)
from align_cli.recipe.speaker import OptionalSpeaker


@section
class SftMethod:
    """Supervised fine-tuning: mean -log p over response tokens (InstructGPT, arXiv 2203.02155)."""

    train_on: Literal["all-turns", "last-turn"] = "all-turns"
    """Which assistant turns of a conversation are trained; everything else is masked."""
    packing: bool = False
    """Put several rows into one sequence of max_length; rows do not see each other."""


@section
class RmMethod:
    """A reward model from rankings (InstructGPT, arXiv 2203.02155, eq. 1)."""

    loss: Literal["ranking", "pairwise", "plackett-luce", "best-of-k"] = "ranking"
    """ranking: all pairs of a prompt are one element of the mean; pairwise: every pair is; plackett-luce: the
    likelihood of the whole order; best-of-k: cross-entropy of the best response against the others."""
    margin: float | Literal["scores"] | None = None
    """By how much the better reward must be ahead: a number, or `scores` for the difference of the source's scores
    (Llama 2, arXiv 2307.09288). For ranking and pairwise."""
    center: Annotated[float, Field(ge=0)] = 0.0
    """Weight of (r_i + r_j)², which keeps rewards near zero (arXiv 2312.09244, which uses 0.01)."""
    center_on: Annotated[Source | None, BeforeValidator(as_source, json_schema_input_type=str | Source | None)] = None
    """Demonstrations whose mean score is put at 0 after training; null shifts nothing."""
    layout: Literal["auto", "shared", "rows"] = "auto"
    """shared: the prompt goes through the model once for all of its responses (4-D mask); rows: once for each. auto
    tries shared on the first rows, and keeps it if the model gives the same."""
    batch_tokens: Count | None = None
    """Tokens, padding included, that go through the model at a time on a device. Memory follows from it, the result
    does not. null: 16384 on a GPU, 2048 without one."""
    seeds: list[Annotated[int, Field(ge=0)]] | None = None
    """An ensemble: one head a seed on the common trunk, each drawn and bootstrapped by its seed. null: one head."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.margin is not None and self.loss not in ("ranking", "pairwise"):
            yield "method.margin", f"means nothing to {self.loss}; remove it, or set method.loss=ranking"
        if self.seeds is not None and len(set(self.seeds)) < max(len(self.seeds), 1):
            yield "method.seeds", "must differ from each other; give each head its own"


@section
class Recipe:
    """A stage's settings after composition; the keys every stage has."""

    name: str
    """Run name; default the recipe file's."""
    model: Model
    data: Data
    seed: Annotated[int, Field(ge=0)] = 42
    """Seeds data order, splits, adapters and sampling."""
    run_dir: str
    """Where the run's files go; default runs/<name>/<stage>."""
    force: bool = False
    """Run again although a finished, unchanged run is there."""
    lora: Lora | None = None
    zero: Zero = Field(default_factory=Zero)
    launch: Launch = Field(default_factory=Launch)
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Any field of the stage's TRL config, checked against it."""
    samples: Annotated[
        Samples | None, BeforeValidator(as_samples, json_schema_input_type=str | list[str] | Samples | None)
    ] = None


@section
class SftRecipe(Recipe):
    """align sft"""

    method: SftMethod = Field(default_factory=SftMethod)


@section
class DpoRecipe(Recipe):
    """align dpo"""

    method: DpoMethod = Field(default_factory=DpoMethod)
    reference: OtherModel | None = None
    """Default: the starting policy; with method.rounds, each round's start."""
    reward: Rewards | None = None
    """What scores the answers of method.rounds: a finished `align rm` run, or several with weights."""
    gold: Gold = None
    """A held-out reward model that is watched between rounds and never optimised."""
    generation: Generation = Field(default_factory=Generation)
    guards: list[Guard] = Field(default_factory=list)
    """Watchers of a round's answers, before it trains. Patience counts rounds; raise_kl raises β from that round on."""

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from round_rules(self)


@section
class SpinRecipe(Recipe):
    """align spin"""

    method: SpinMethod = Field(default_factory=SpinMethod)
    generation: Generation = Field(default_factory=Generation)

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from spin_rules(self)


@section
class PairRecipe(Recipe):
    """Stages whose loss is a function of a pair's log-probabilities."""

    reference: OtherModel | None = None
    """For losses that compare with one; default: the starting policy."""

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from pair_rules(self.method, self.reference, self.data)


@section
class OrpoRecipe(PairRecipe):
    """align orpo"""

    method: OrpoMethod = Field(default_factory=OrpoMethod)


@section
class SimpoRecipe(PairRecipe):
    """align simpo"""

    method: SimpoMethod = Field(default_factory=SimpoMethod)


@section
class KtoRecipe(Recipe):
    """align kto"""

    method: KtoMethod = Field(default_factory=KtoMethod)
    reference: OtherModel | None = None
    """Default: the starting policy."""

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from kto_rules(self.method, self.data, self.trainer)


@section
class RmRecipe(Recipe):
    """align rm"""

    method: RmMethod = Field(default_factory=RmMethod)

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.samples is not None:
            yield "samples", "a reward model answers nothing; remove it, or use `align score` on the finished run"
        if self.data.streaming:
            yield "data.streaming", "is not for rm, whose steps are filled from whole groups in memory; remove it"


@section
class OnlineRecipe(Recipe):
    """Stages that sample from the policy."""

    reward: Rewards
    """A finished `align rm` run, a check against a column of the data, a Python function, or several with weights."""
    reference: OtherModel | None = None
    """Default: the starting policy."""
    gold: Gold = None
    """A held-out reward model that is watched and never optimised: its falling while the reward rises is
    over-optimisation (arXiv 2210.10760)."""
    generation: Generation = Field(default_factory=Generation)
    guards: list[Guard] = Field(default_factory=list)
    """Watchers of the run."""

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from online_rules(self.generation, self.data, self.trainer)
        yield from reward_rules(self.reward)
        yield from guard_rules(self.guards, self.gold)


@section
class PpoRecipe(OnlineRecipe):
    """align ppo"""

    value: OtherModel | None = None
    """Where the value function starts; default: the (first) reward model, or the policy where rewards are functions."""
    method: PpoMethod = Field(default_factory=PpoMethod)

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from OnlineRecipe.rules(self)
        models = [source for source in self.reward if source.path is not None]
        if self.lora is not None and len(models) > 1:
            yield "reward", f"names {len(models)} models, but one backbone plays one; keep one, or remove lora"
        if self.lora is not None and self.reference is not None:
            yield "reference", "is the backbone with its adapters off under lora; remove it, or remove lora"


@section
class RlooRecipe(OnlineRecipe):
    """align rloo"""

    method: RlooMethod = Field(default_factory=RlooMethod)


@section
class GrpoRecipe(OnlineRecipe):
    """align grpo"""

    method: GrpoMethod = Field(default_factory=GrpoMethod)

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from OnlineRecipe.rules(self)
        if self.reference is not None and not self.method.needs_reference():
            yield "reference", "is compared with by nothing at method.beta=0; remove it, or raise method.beta"


@section
class CaiRecipe(Recipe):
    """align cai"""

    method: CaiMethod = Field(default_factory=CaiMethod)
    generation: CaiGeneration = Field(default_factory=CaiGeneration)
    writer: OptionalSpeaker = None
    """Who gives first answers, critiques and revisions; default: the model as it starts."""
    feedback: OptionalSpeaker = None
    """Who judges pairs; default: the model that was trained, or as it starts where it was not."""

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from cai_rules(self)


STAGES: dict[str, type[Recipe]] = {
    "sft": SftRecipe,
    "rm": RmRecipe,
    "ppo": PpoRecipe,
    "rloo": RlooRecipe,
    "grpo": GrpoRecipe,
    "dpo": DpoRecipe,
    "orpo": OrpoRecipe,
    "simpo": SimpoRecipe,
    "kto": KtoRecipe,
    "cai": CaiRecipe,
    "spin": SpinRecipe,
}
"""Every stage that a recipe can be written for."""

GROUPS = ("model", "data", "lora", "zero")
"""Config groups: a plain name on the command line or in `defaults` picks a file of recipes/<group>/."""
