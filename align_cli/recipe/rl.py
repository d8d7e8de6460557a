"""The sections of stages that sample from the policy while they train: PPO, RLOO and GRPO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

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
from align_cli.recipe.sections import (
    Count,
    Fraction,
    Lora,
    OtherModel,
    Positive,
    Recipe,
    Rollout,
    Source,
    as_source,
    section,
)
from align_cli.recipe.stages import RowKind


@section
class PpoMethod:
    """PPO from a reward model: maximise E[r(x, y)] - β·KL(π‖π_ref) (InstructGPT, arXiv 2203.02155, eq. 2)."""

    beta: Annotated[float, Field(ge=0)] = 0.05
    """β, the price of a nat of KL to the reference. At 0 a policy games its reward."""
    target_kl: Positive | None = None
    """Nats a sequence that an adaptive β keeps to (lm-human-preferences uses 6); null keeps β fixed."""
    horizon: Count = 10_000
    """Episodes over which an adaptive β moves."""
    kl: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the per-token KL in the reward."""
    gamma: Fraction = 1.0
    """Discount."""
    lam: Fraction = 0.95
    """λ of generalized advantage estimation (arXiv 1506.02438)."""
    clip: Positive = 0.2
    """ε of the clipped ratio (arXiv 1707.06347)."""
    value_clip: Positive = 0.2
    """How far a value may move from the rollout's."""
    vf_coef: Positive = 0.1
    """Weight of the value loss."""
    epochs: Count = 4
    """Passes over a rollout."""
    minibatches: Count = 1
    """Optimizer steps a pass; data.batch_size / minibatches episodes in each."""
    whiten: bool = True
    """Advantages with mean 0 and variance 1 over all ranks."""
    missing_eos: float | None = -1.0
    """Score of a response that does not end, in place of the reward model's; null leaves the score."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken off the score for every token."""
    ema: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Decay an update of a moving average of the policy's weights, which the run leaves in place of the last ones
    (0.992 in InstructGPT, appendix C.4); null leaves the last."""
    ptx_coef: Annotated[float, Field(ge=0)] = 0.0
    """γ of PPO-ptx: weight of the LM loss on `ptx` rows (27.8 in InstructGPT)."""
    ptx: Annotated[Source | None, BeforeValidator(as_source, json_schema_input_type=str | Source | None)] = None
    """Demonstrations for PPO-ptx."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if (self.ptx_coef > 0) != (self.ptx is not None):
            yield "method.ptx", "and method.ptx_coef go together; set both or neither"


@section
class RlooMethod:
    """REINFORCE, leave-one-out: the other K-1 samples of a prompt are the baseline (arXiv 2402.14740)."""

    k: Annotated[int, Field(ge=2)] = 4
    """Samples a prompt."""
    beta: Annotated[float, Field(ge=0)] = 0.05
    """β, the price of a nat of KL to the reference, taken off the score of the whole response."""
    clip: Positive = 0.2
    """ε of the clipped sequence ratio, where a rollout is used more than once."""
    epochs: Count = 1
    """Passes over a rollout."""
    minibatches: Count = 1
    """Optimizer steps a pass."""
    normalize_advantages: bool = False
    """Divide advantages by their standard deviation."""
    missing_eos: float | None = -1.0
    """Score of a response that does not end, in place of the reward model's; null leaves the score."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken off the score for every token."""
    ema: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Decay an update of a moving average of the policy's weights, which the run leaves in place of the last ones
    (0.992 in InstructGPT, appendix C.4); null leaves the last."""


@section
class GrpoMethod:
    """Group-relative policy optimization: the other samples of a prompt are the baseline, their spread the scale, and
    the KL to the reference is in the loss (arXiv 2402.03300, eq. 3)."""

    k: Annotated[int, Field(ge=2)] = 8
    """Samples a prompt."""
    beta: Annotated[float, Field(ge=0)] = 0.04
    """β, weight of the KL (k3) in the loss; 0 holds no reference."""
    clip: Positive = 0.2
    """ε of the clipped ratio."""
    clip_high: Positive | None = None
    """ε above 1, where it differs (0.28 in DAPO, arXiv 2503.14476)."""
    epochs: Count = 1
    """Passes over a rollout."""
    minibatches: Count = 1
    """Optimizer steps a pass."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the prompt's rewards, of the whole rollout's, or by nothing, as
    Dr. GRPO does (arXiv 2503.20783)."""
    loss: Literal["grpo", "dapo", "dr-grpo", "bnpo"] = "dapo"
    """What the token losses are averaged over: grpo, each response by itself, which favours short ones; dapo, all
    tokens of a step; dr-grpo, the longest length a response may have; bnpo, all tokens of a micro-batch."""
    missing_eos: float | None = None
    """Score of a response that does not end, in place of the reward; null leaves the reward."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken off the score for every token."""
    ema: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Decay an update of a moving average of the policy's weights, which the run leaves in place of the last ones
    (0.992 in InstructGPT, appendix C.4); null leaves the last."""


@section
class OnlineRecipe(Recipe):
    """Stages that sample from the policy while they train."""

    method: PpoMethod | RlooMethod | GrpoMethod
    reward: Rewards
    """A finished `align rm` run, a check against a column of the data, a Python function, or several with weights."""
    reference: OtherModel | None = None
    """Default: the starting policy."""
    gold: Gold = None
    """A held-out reward model that is watched and never optimised: if it falls while the reward rises, the policy is
    over-optimised (arXiv 2210.10760)."""
    generation: Generation = Field(default_factory=Generation)
    guards: list[Guard] = Field(default_factory=list)
    """Watchers of the run."""

    def rollout(self) -> Rollout:
        return Rollout(k=self.method.k, minibatches=self.method.minibatches, epochs=self.method.epochs)

    def needs_reference(self) -> bool:
        return self.method.beta > 0

    def reference_path(self) -> str | None:
        return self.reference.path if self.reference else None

    def copies(self, role: str) -> int:
        if role == "reward":
            return sum(source.path is not None for source in self.reward)
        if role == "gold":
            return int(self.gold is not None and self.gold.path is not None)
        return Recipe.copies(self, role)

    def reward_sources(self) -> list[tuple[str, RewardSource]]:
        return keyed(self.reward)

    def reward_models(self) -> list[tuple[str, str]]:
        return Recipe.reward_models(self) + gold_models(self.gold)

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from room_rules(self.generation, self.data)
        if self.data.batch_size is None:
            yield "data.batch_size", "is missing; set it to the episodes of a rollout, over all ranks"
        if isinstance(self.data.eval, (list, float)):
            yield "data.eval", "does not work in stages that sample; watch metrics.jsonl, or set samples"
        if self.trainer.get("max_steps", -1) == 0:
            yield "trainer.max_steps", "is 0; give the number of updates"
        yield from reward_rules(self.reward)
        yield from guard_rules(self.guards, self.gold)


@section
class PpoRecipe(OnlineRecipe):
    """align ppo"""

    stage: ClassVar[str] = "ppo"
    value: OtherModel | None = None
    """Where the value function starts; default: the (first) reward model, or the policy where rewards are functions."""
    method: PpoMethod = Field(default_factory=PpoMethod)

    def rollout(self) -> Rollout:
        return Rollout(k=1, minibatches=self.method.minibatches, epochs=self.method.epochs)

    def needs_reference(self) -> bool:
        return True

    def copies(self, role: str) -> int:
        # under LoRA, reference, reward model and value function are adapters of the policy's backbone
        if self.lora is not None and role in ("reference", "reward", "value"):
            return 0
        return 1 if role == "value" else OnlineRecipe.copies(self, role)

    def adapters(self) -> int:
        return 2 if self.lora else 0

    def alternative(self) -> PpoRecipe:
        return replace(self, lora=None if self.lora else Lora())

    def backbone_models(self) -> list[tuple[str, str]]:
        gold = gold_models(self.gold)
        return [entry for entry in self.reward_models() if entry not in gold] if self.lora else []

    def reward_models(self) -> list[tuple[str, str]]:
        value = [("value.path", self.value.path)] if self.value else []
        return Recipe.reward_models(self) + value + gold_models(self.gold)

    def method_sources(self) -> list[tuple[str, list[Source], RowKind]]:
        return [("method.ptx", [self.method.ptx], "demonstrations")] if self.method.ptx is not None else []

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

    stage: ClassVar[str] = "rloo"
    method: RlooMethod = Field(default_factory=RlooMethod)


@section
class GrpoRecipe(OnlineRecipe):
    """align grpo"""

    stage: ClassVar[str] = "grpo"
    method: GrpoMethod = Field(default_factory=GrpoMethod)

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from OnlineRecipe.rules(self)
        if self.reference is not None and not self.needs_reference():
            yield "reference", "has no effect at method.beta=0; remove it, or raise method.beta"
