"""The sections of the online stages, which sample from the policy during training: PPO, RLOO and GRPO."""

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
    gold_functions,
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
    """KL penalty coefficient β, per nat of KL to the reference. 0 disables the penalty (expect reward hacking)."""
    target_kl: Positive | None = None
    """Target KL of an adaptive β, in nats per sequence (lm-human-preferences uses 6); null keeps β fixed."""
    horizon: Count = 10_000
    """Time scale of an adaptive β, in episodes."""
    kl: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the per-token KL in the reward."""
    gamma: Fraction = 1.0
    """Discount factor γ."""
    lam: Fraction = 0.95
    """λ of generalized advantage estimation (arXiv 1506.02438)."""
    clip: Positive = 0.2
    """ε of the clipped ratio (arXiv 1707.06347)."""
    value_clip: Positive = 0.2
    """Clip range of the value update: how far a value may move from its value at rollout time."""
    vf_coef: Positive = 0.1
    """Weight of the value loss."""
    epochs: Count = 4
    """Optimization passes over each rollout."""
    minibatches: Count = 1
    """Optimizer steps per pass, each on data.batch_size / minibatches episodes."""
    whiten: bool = True
    """Normalize advantages to mean 0 and variance 1 over all ranks."""
    missing_eos: float | None = -1.0
    """Score of a truncated response (no end token), which replaces its own score; null: keep its own score."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Penalty per response token, subtracted from the score."""
    ema: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Decay per update of an exponential moving average of the policy's weights, which is saved instead of the last
    weights (0.992 in InstructGPT, appendix C.4); null: save the last weights."""
    ptx_coef: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient γ of PPO-ptx: weight of the LM loss on `ptx` rows (27.8 in InstructGPT)."""
    ptx: Annotated[Source | None, BeforeValidator(as_source, json_schema_input_type=str | Source | None)] = None
    """Demonstrations for PPO-ptx."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if (self.ptx_coef > 0) != (self.ptx is not None):
            yield "method.ptx", "and method.ptx_coef go together; set both or neither"


@section
class RlooMethod:
    """REINFORCE leave-one-out: the baseline is the mean reward of the prompt's other K-1 samples (arXiv 2402.14740)."""

    k: Annotated[int, Field(ge=2)] = 4
    """Samples per prompt."""
    beta: Annotated[float, Field(ge=0)] = 0.05
    """KL penalty coefficient β, per nat of KL to the reference, subtracted from the score of the whole response. 0
    disables the penalty."""
    clip: Positive = 0.2
    """ε of the clipped sequence ratio; has an effect only if a rollout is used for several optimizer steps."""
    epochs: Count = 1
    """Optimization passes over each rollout."""
    minibatches: Count = 1
    """Optimizer steps per pass."""
    normalize_advantages: bool = False
    """Divide advantages by their standard deviation."""
    missing_eos: float | None = -1.0
    """Score of a truncated response (no end token), which replaces its own score; null: keep its own score."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Penalty per response token, subtracted from the score."""
    ema: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Decay per update of an exponential moving average of the policy's weights, which is saved instead of the last
    weights (0.992 in InstructGPT, appendix C.4); null: save the last weights."""


@section
class GrpoMethod:
    """Group-relative policy optimization: an advantage is a reward minus the mean of the prompt's samples, divided by
    their standard deviation; the KL to the reference is a term of the loss (arXiv 2402.03300, eq. 3)."""

    k: Annotated[int, Field(ge=2)] = 8
    """Samples per prompt."""
    beta: Annotated[float, Field(ge=0)] = 0.04
    """Weight β of the KL term in the loss: k3 times the importance ratio, or k3 alone, as in the paper, with
    trainer.use_bias_correction_kl=false. 0 disables it, and no reference model is loaded."""
    clip: Positive = 0.2
    """ε of the clipped ratio."""
    clip_high: Positive | None = None
    """Upper ε of the clipped ratio (0.28 in DAPO, arXiv 2503.14476); null: same as clip."""
    epochs: Count = 1
    """Optimization passes over each rollout."""
    minibatches: Count = 1
    """Optimizer steps per pass."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by. group: standard deviation of the prompt's rewards; batch: of the whole rollout's
    rewards; none: nothing, as in Dr. GRPO (arXiv 2503.20783)."""
    loss: Literal["grpo", "dapo", "dr-grpo", "bnpo"] = "dapo"
    """How token losses are averaged. grpo: per response, which favours short ones; dapo: over all tokens of a step;
    dr-grpo: sum divided by the maximum response length; bnpo: over all tokens of a micro-batch."""
    missing_eos: float | None = None
    """Reward of a truncated response (no end token), which replaces its own reward; null: keep its own reward."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Penalty per response token, subtracted from the score."""
    ema: Annotated[float | None, Field(gt=0, lt=1)] = None
    """Decay per update of an exponential moving average of the policy's weights, which is saved instead of the last
    weights (0.992 in InstructGPT, appendix C.4); null: save the last weights."""


@section
class OnlineRecipe(Recipe):
    """Stages that sample from the policy during training."""

    method: PpoMethod | RlooMethod | GrpoMethod
    reward: Rewards
    """A finished `align rm` run, a check against a data column, a Python function, or a weighted list of these."""
    reference: OtherModel | None = None
    """Reference model of the KL. Default: the initial policy."""
    gold: Gold = None
    """A held-out reward model whose score is logged but not optimised. If it falls while the reward rises, the policy
    is over-optimised (arXiv 2210.10760)."""
    generation: Generation = Field(default_factory=Generation)
    guards: list[Guard] = Field(default_factory=list)
    """Guards: conditions on logged metrics, and what to do when one holds."""

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

    def reward_functions(self) -> list[tuple[str, str]]:
        return Recipe.reward_functions(self) + gold_functions(self.gold)

    def rules(self) -> Iterator[tuple[str, str]]:
        yield from room_rules(self.generation, self.data)
        if self.data.batch_size is None:
            yield "data.batch_size", "is missing; set it to the number of episodes per rollout, over all ranks"
        if isinstance(self.data.eval, (list, float)):
            yield "data.eval", "does not work in online stages; watch metrics.jsonl, or set samples"
        if self.trainer.get("max_steps", -1) == 0:
            yield "trainer.max_steps", "is 0; give the number of updates"
        yield from reward_rules(self.reward)
        yield from guard_rules(self.guards, self.gold)


@section
class PpoRecipe(OnlineRecipe):
    """align ppo"""

    stage: ClassVar[str] = "ppo"
    value: OtherModel | None = None
    """Initial model of the value function. Default: the (first) reward model, or the policy if there is none."""
    method: PpoMethod = Field(default_factory=PpoMethod)

    def rollout(self) -> Rollout:
        return Rollout(k=1, minibatches=self.method.minibatches, epochs=self.method.epochs)

    def needs_reference(self) -> bool:
        return True

    def copies(self, role: str) -> int:
        # with LoRA, reference, reward model and value function are adapters on the policy's backbone
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
            yield "reward", f"names {len(models)} models, but lora supports only one; keep one, or remove lora"
        if self.lora is not None and self.reference is not None:
            yield "reference", "cannot be set with lora: the reference is the bare backbone; remove it, or remove lora"


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
