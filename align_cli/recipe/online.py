"""The sections of stages that sample from the policy: generation, PPO, RLOO and GRPO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from align_cli.recipe.sections import Count, Fraction, Positive, Source, as_source, section


@section
class Generation:
    """How responses are sampled. Scoring uses the same temperature."""

    max_new_tokens: Count = 128
    """Longest response, in tokens."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in scoring alike."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens that holds so much probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from so many most probable tokens; 0 from all."""
    engine: Literal["auto", "hf", "batched", "vllm"] = "auto"
    """hf: `generate`, every row sampled by a seed of its own, so that ranks and resumed runs agree; batched:
    transformers' continuous batching; vllm: colocated, or a server with trainer.vllm_mode. auto is hf."""
    batch: Count = 64
    """Prompts that are answered at a time on a device (hf)."""


def room_rules(generation: Generation, data: Any) -> Iterator[tuple[str, str]]:
    """What is wrong where prompt and response do not fit into data.max_length."""
    room = data.max_length - generation.max_new_tokens
    if room < 1:
        yield (
            "generation.max_new_tokens",
            f"is {generation.max_new_tokens} and leaves no room for a prompt in data.max_length={data.max_length}; "
            f"raise data.max_length or set generation.max_new_tokens below {data.max_length}",
        )
    if data.max_prompt_length is not None and data.max_prompt_length > room >= 1:
        yield (
            "data.max_prompt_length",
            f"is {data.max_prompt_length}, but {generation.max_new_tokens} new tokens of data.max_length="
            f"{data.max_length} leave {room}; set data.max_prompt_length={room}",
        )


def online_rules(generation: Generation, data: Any, trainer: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What concerns stages that sample while they train."""
    yield from room_rules(generation, data)
    if data.batch_size is None:
        yield "data.batch_size", "is missing; set it to the episodes of a rollout, over all ranks"
    if isinstance(data.eval, (list, float)):
        yield "data.eval", "is not for stages that sample; watch metrics.jsonl, or set samples"
    if trainer.get("max_steps", -1) == 0:
        yield "trainer.max_steps", "is 0; give the number of updates"


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

    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.beta > 0
