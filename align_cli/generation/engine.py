"""Engines: token ids of prompts in, token ids of responses out.

PPO, RLOO and GRPO, the rounds of DPO and SPIN, and the local generators of Constitutional AI all sample through one.
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
    """Responses of one call."""

    ids: list[list[int]]
    """Up to and including the first end token, if a response has one."""
    log_probs: Any = None
    """Sampling log-probabilities, where the engine gives them (vLLM)."""


class Engine(Protocol):
    """Samples responses."""

    def respond(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Sampled:
        """A response for every prompt; row i is drawn by seeds[i] where the engine can."""


@dataclass
class TransformersEngine:
    """`generate` of transformers, each row sampled by its own seed (engine: hf)."""

    model: Callable[[], AbstractContextManager[PreTrainedModel]]
    """Opens the model for generation: whole on this rank, in its precision."""
    sampler: Sampler
    ends: Sequence[int]
    """Token ids that end a response."""
    pad: int

    def respond(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Sampled:
        """As Engine.respond. Under ZeRO-3 with as many prompts on every rank."""
        with self.model() as model:
            return Sampled(respond(model, prompts, seeds, sampler=self.sampler, ends=self.ends, pad=self.pad))


@dataclass
class TrlEngine:
    """What a TRL trainer generates by itself: continuous batching, or vLLM (engines: batched, vllm)."""

    generate: Callable[[list[list[int]]], Any]
    """The trainer's own generation: ids, or (ids, log-probabilities)."""

    def respond(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Sampled:
        """As Engine.respond; the engine draws by its own generator."""
        made = self.generate(list(prompts))
        return Sampled(*made) if isinstance(made, tuple) else Sampled(made)
