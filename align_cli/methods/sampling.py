"""Sampling whose result depends on the row alone: not on its neighbours, not on the rank, not on what ran before.

Every row draws Gumbel noise from a hash of its own seed, the position and the token; the greatest noisy logit is a
sample of the softmax (Gumbel 1954; Maddison et al., arXiv 1411.0030). So one process and two ranks sample the same
text, and a resumed run samples what the killed one would have.

Shapes: b rows, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

WORD = 0xFFFFFFFF


def row_seed(*parts: int) -> int:
    """32 bits of a seed, a rollout's number and a row's number."""
    state = 0x9E3779B9
    for part in parts:
        state = int(_mixed(torch.tensor((state ^ (part & WORD)) & WORD)))
    return state


def uniform(seeds: Tensor, position: int, v: int) -> Tensor:
    """(b, v) numbers in (0, 1), the same on every device: a hash of seed (b,), position and token."""
    tokens = torch.arange(v, device=seeds.device)
    state = _mixed((seeds + position * 0x85EBCA6B) & WORD).unsqueeze(1)
    bits = _mixed(_mixed((state ^ (tokens * 0x9E3779B1)) & WORD))
    return ((bits >> 8).float() + 0.5) / 2**24


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
        """(b, v) logits -> (b, v) noisy logits, whose argmax is the sample."""
        scores = scores.float() / self.temperature
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        noise = uniform(self.seeds.to(scores.device), input_ids.shape[1] - self.start, scores.shape[1])
        return scores - (-noise.log()).log().to(scores.dtype)
