"""Sampling that depends on the row alone: not on other rows of the batch, the rank, or earlier calls.

At each position a row draws one uniform number from a hash of its seed and the position, and takes the first token at
which the cumulative probability exceeds it. One process and two ranks therefore sample the same text, and a resumed run
samples the same text as an uninterrupted one.

Shapes: b rows, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from align_cli.errors import TrainingError
from align_cli.recipe.constitutional import CaiGeneration
from align_cli.recipe.generation import Generation

WORD = 0xFFFFFFFF


@dataclass
class Sampler:
    """Sampling settings."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch: int = 64
    """Prompts per `generate` call."""
    greedy: bool = False
    """Take the most probable token; temperature, top_p and top_k are then ignored."""

    @classmethod
    def of(cls, settings: Generation | CaiGeneration, limit: int | None = None) -> Sampler:
        """From a recipe's `generation:`; `limit` replaces max_new_tokens, and a temperature of 0 is greedy."""
        return cls(
            limit or settings.max_new_tokens,
            settings.temperature or 1.0,
            settings.top_p,
            settings.top_k,
            settings.batch,
            greedy=not settings.temperature,
        )


@torch.no_grad()
def respond(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    *,
    sampler: Sampler,
    ends: Sequence[int],
    pad: int,
) -> list[list[int]]:
    """Response token ids for each prompt, up to and including the first token in `ends`; row i uses seeds[i].

    Prompts of similar length are batched together, `sampler.batch` at a time, to reduce padding.
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
    model: PreTrainedModel, prompts: list[list[int]], seeds: list[int], sampler: Sampler, ends: Sequence[int], pad: int
) -> list[list[int]]:
    p = max(map(len, prompts))
    ids = torch.tensor([[pad] * (p - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (p - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    settings = {"max_new_tokens": sampler.max_new_tokens, "do_sample": False, "use_cache": True}
    settings["suppress_tokens"] = model.generation_config.suppress_tokens
    config = GenerationConfig(**settings, eos_token_id=list(ends), pad_token_id=pad, disable_compile=True)
    choose = SeededSampling(seeds, temperature=sampler.temperature, top_p=sampler.top_p, top_k=sampler.top_k, start=p)
    # the last token's state is a strided view; on a CPU, torch would then copy the head's weights once per row
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
    if not choose.finite:
        raise TrainingError(
            "generation: the model's logits are NaN or infinite, so that nothing can be sampled; lower "
            "trainer.learning_rate, or look at the model's weights"
        )
    cut = [next((at + 1 for at, token in enumerate(row) if token in ends), len(row)) for row in made]
    return [row[:end] for row, end in zip(made, cut, strict=True)]


def row_seed(*parts: int) -> int:
    """A 32-bit seed from several numbers, e.g. the run's seed, the rollout's number and the row's number."""
    state = 0x9E3779B9
    for part in parts:
        state = int(_mixed(torch.tensor((state ^ (part & WORD)) & WORD)))
    return state


def uniform(seeds: Tensor, position: int) -> Tensor:
    """(b,) float64 numbers in (0, 1), identical on every device: a hash of the (b,) seeds and the position."""
    bits = _mixed(_mixed((seeds + position * 0x85EBCA6B) & WORD))
    return (bits.double() + 0.5) / 2**32


def _mixed(bits: Tensor) -> Tensor:
    """A 32-bit hash finalizer (lowbias32, Wellons 2018), computed in int64 so that products do not overflow."""
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x7FEB352D) & WORD
    bits = bits ^ (bits >> 15)
    bits = (bits * 0x846CA68B) & WORD
    return bits ^ (bits >> 16)


class SeededSampling(LogitsProcessor):
    """Turns greedy decoding into sampling with temperature, top-k and top-p."""

    def __init__(self, seeds: list[int], *, temperature: float, top_p: float, top_k: int, start: int):
        self.seeds, self.temperature, self.start = torch.tensor(seeds), temperature, start
        self.finite: Tensor | bool = True
        """Whether all probabilities so far were numbers; read at the end, since reading waits for the device."""
        self.warpers: list[LogitsProcessor] = []
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(b, v) logits -> (b, v) with 0 at the sampled token and -∞ elsewhere."""
        scores = scores.float() / self.temperature
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        summed = scores.softmax(1).double().cumsum(1)
        self.finite = self.finite & summed[:, -1].isfinite().all()
        drawn = uniform(self.seeds.to(scores.device), input_ids.shape[1] - self.start)
        # right=True takes the first sum above the draw, so that a token of probability 0 is never sampled
        sample = torch.searchsorted(summed, drawn.unsqueeze(1) * summed[:, -1:], right=True)
        sample = sample.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, sample, 0.0)
