"""Generation engines: token ids of prompts in, token ids of responses out.

PPO, RLOO, GRPO, the rounds of DPO and SPIN, and local generators (judges, Constitutional AI) all sample through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel

from align_cli.generation.sampling import Sampler, respond


@dataclass(frozen=True)
class Sampled:
    """Sampled responses of one call."""

    ids: list[list[int]]
    """Up to and including the first end token, if a response has one."""
    log_probs: Any = None
    """Sampling log-probabilities, if the engine returns them (vLLM)."""


class Engine(Protocol):
    """Samples responses."""

    def respond(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Sampled:
        """Sample one response per prompt; row i uses seeds[i] if the engine supports per-row seeds."""


@dataclass
class TransformersEngine:
    """transformers' `generate`, with one seed per row (engine: hf)."""

    model: Callable[[], AbstractContextManager[PreTrainedModel]]
    """Context manager that yields the model ready for generation: unsharded on this rank, under its autocast."""
    sampler: Sampler
    ends: Sequence[int]
    """Token ids that end a response."""
    pad: int

    def respond(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Sampled:
        """As Engine.respond. Under ZeRO-3, every rank must pass the same number of prompts."""
        with self.model() as model:
            return Sampled(respond(model, prompts, seeds, sampler=self.sampler, ends=self.ends, pad=self.pad))


@dataclass
class TrlEngine:
    """Generation built into a TRL trainer: continuous batching or vLLM (engines: batched, vllm)."""

    generate: Callable[[list[list[int]]], Any]
    """The trainer's generation function; returns ids, or (ids, log-probabilities)."""

    def respond(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Sampled:
        """As Engine.respond, but ignores `seeds`: the engine uses its own random generator."""
        made = self.generate(list(prompts))
        return Sampled(*made) if isinstance(made, tuple) else Sampled(made)
