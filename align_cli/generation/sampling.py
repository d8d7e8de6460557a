"""Sampling whose result depends on the row alone: not on its neighbours, not on the rank, not on what ran before.

Every row draws one number from a hash of its own seed and the position, and takes the token at which the summed
probabilities pass it. So one process and two ranks sample the same text, and a resumed run samples what the killed one
would have.

Shapes: b rows, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

WORD = 0xFFFFFFFF


@dataclass
class Sampler:
    """How responses are sampled."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch: int = 64
    """Prompts that are answered at a time."""
    greedy: bool = False
    """The most probable token each time; temperature, top_p and top_k mean nothing then."""


@torch.no_grad()
def respond(
    model: Any,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    *,
    sampler: Sampler,
    ends: Sequence[int],
    pad: int,
) -> list[list[int]]:
    """A response's token ids for every prompt's, up to and with the first token of `ends`; row i is drawn by seeds[i].

    Prompts of like length are answered together, `sampler.batch` at a time, so that little is padding.
    """
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    responses: list[list[int]] = [[]] * len(prompts)
    training = model.training
    model.eval()
    for start in range(0, len(order), sampler.batch):
        part = order[start : start + sampler.batch]
        made = _generate(model, [prompts[at] for at in part], [seeds[at] for at in part], sampler, ends, pad)
        for at, response in zip(part, made, strict=True):
            responses[at] = response
    model.train(training)
    return responses


def _generate(
    model: Any, prompts: list[list[int]], seeds: list[int], sampler: Sampler, ends: Sequence[int], pad: int
) -> list[list[int]]:
    p = max(map(len, prompts))
    ids = torch.tensor([[pad] * (p - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (p - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    settings = {"max_new_tokens": sampler.max_new_tokens, "do_sample": False, "use_cache": True}
    config = GenerationConfig(**settings, eos_token_id=list(ends), pad_token_id=pad, disable_compile=True)
    choose = SeededSampling(seeds, temperature=sampler.temperature, top_p=sampler.top_p, top_k=sampler.top_k, start=p)
    # the last token's state is a strided view, for which torch on a CPU copies the head's weights once a row
    whole = model.get_output_embeddings().register_forward_pre_hook(lambda head, given: (given[0].contiguous(),))
    try:
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([] if sampler.greedy else [choose]),
        )[:, p:].tolist()
    finally:
        whole.remove()
    cut = [next((at + 1 for at, token in enumerate(row) if token in ends), len(row)) for row in made]
    return [row[:end] for row, end in zip(made, cut, strict=True)]


def row_seed(*parts: int) -> int:
    """32 bits of a seed, a rollout's number and a row's number."""
    state = 0x9E3779B9
    for part in parts:
        state = int(_mixed(torch.tensor((state ^ (part & WORD)) & WORD)))
    return state


def uniform(seeds: Tensor, position: int) -> Tensor:
    """(b,) float64 numbers in (0, 1), the same on every device: a hash of seed (b,) and position."""
    bits = _mixed(_mixed((seeds + position * 0x85EBCA6B) & WORD))
    return (bits.double() + 0.5) / 2**32


def _mixed(bits: Tensor) -> Tensor:
    """A 32-bit finalizer (lowbias32, Wellons 2018), in int64 so that no product overflows."""
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x7FEB352D) & WORD
    bits = bits ^ (bits >> 15)
    bits = (bits * 0x846CA68B) & WORD
    return bits ^ (bits >> 16)


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling at a temperature, from the top k tokens or the top p of probability."""

    def __init__(self, seeds: list[int], *, temperature: float, top_p: float, top_k: int, start: int):
        self.seeds, self.temperature, self.start = torch.tensor(seeds), temperature, start
        self.warpers: list[LogitsProcessor] = []
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(b, v) logits -> (b, v) with 0 at the sample and -∞ elsewhere."""
        scores = scores.float() / self.temperature
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        summed = scores.softmax(1).double().cumsum(1)
        drawn = uniform(self.seeds.to(scores.device), input_ids.shape[1] - self.start)
        # the first sum above it, so that what has no probability is never taken
        sample = torch.searchsorted(summed, drawn.unsqueeze(1) * summed[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, sample, 0.0)
