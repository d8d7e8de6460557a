"""Generation engines: token ids of prompts in, token ids of responses out.

PPO, RLOO, GRPO, the rounds of DPO and SPIN, and local generators (judges, Constitutional AI) all sample through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import Module, Parameter
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

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
class BatchedEngine:
    """transformers' continuous batching (engine: batched)."""

    model: Callable[[], AbstractContextManager[PreTrainedModel]]
    """As in TransformersEngine."""
    sampling: GenerationConfig
    batching: ContinuousBatchingConfig
    dtype: torch.dtype | None
    """Type of the weights that sample; None for the model's own. Autocast does not reach the engine's thread."""

    def respond(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Sampled:
        """As Engine.respond, but ignores `seeds`: the engine uses its own random generator."""
        with self.model() as model, cast(model, self.dtype), torch.no_grad():
            training = model.training
            made = model.generate_batch(
                list(prompts), generation_config=self.sampling, continuous_batching_config=self.batching
            )
            model.train(training)
        return Sampled([output.generated_tokens for output in made.values()])


@contextmanager
def cast(model: Module, dtype: torch.dtype | None) -> Iterator[None]:
    """A context in which the model has copies of its weights in `dtype`; its own are put aside and untouched.

    `model.to(dtype)` would round the trained weights for good, and DDP's hooks would be lost: they belong to a
    parameter of one type. Buffers keep their type: rotary frequencies need float32.
    """
    copies: dict[Parameter, Parameter] = {}
    places = []
    for module in model.modules() if dtype else ():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                if parameter not in copies:
                    copies[parameter] = Parameter(parameter.detach().to(dtype), requires_grad=False)
                places.append((module, name, parameter))
    try:
        for module, name, parameter in places:
            setattr(module, name, copies[parameter])
        yield
    finally:
        for module, name, parameter in places:
            setattr(module, name, parameter)


@dataclass
class TrlEngine:
    """Generation built into a TRL trainer: vLLM (engine: vllm)."""

    generate: Callable[[list[list[int]]], Any]
    """The trainer's generation function; returns ids, or (ids, log-probabilities)."""

    def respond(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> Sampled:
        """As Engine.respond, but ignores `seeds`: the engine uses its own random generator."""
        made = self.generate(list(prompts))
        return Sampled(*made) if isinstance(made, tuple) else Sampled(made)
