"""Samples responses of the current policy on all ranks and computes their log-probabilities, for the rounds of DPO and
SPIN.

Shapes: n rows, t tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from align_cli.data import chat
from align_cli.generation.engine import TransformersEngine
from align_cli.generation.sampling import Sampler
from align_cli.model import load, log_probs, zero
from align_cli.recipe.preferences import DpoRecipe, SpinRecipe
from align_cli.training.job import Job
from align_cli.training.journal import Unit
from align_cli.training.placement import frozen, policy

SCORED_TOKENS = 8192
"""Maximum number of tokens per forward pass."""


class FrozenPolicy:
    """The job's current policy, frozen: samples responses and computes log-probabilities."""

    def __init__(self, job: Job[DpoRecipe | SpinRecipe], tokenizer: PreTrainedTokenizerBase, args: TrainingArguments):
        self.job, self.tokenizer = job, tokenizer
        settings = job.recipe.generation
        model = policy(job, tokenizer)
        self.ends = load.set_ends(model, chat.generation_ends(tokenizer))
        add_fused_lm_head(model, temperature=settings.temperature, outputs=("log_probs", "entropy"))
        # used only to place models; it never trains
        self.trainer = Trainer(model=frozen(model), args=args, processing_class=tokenizer)
        self.model, self.device = model, self.trainer.accelerator.device
        sampler = Sampler.of(settings)
        self.engine = TransformersEngine(self._whole, sampler, self.ends, tokenizer.pad_token_id)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[PreTrainedModel]:
        with zero.on_device(self.model, self.device), self.trainer.accelerator.autocast():
            yield self.model

    def respond(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[list[int]]:
        """A response to each prompt's token ids; row i uses seeds[i]. Every rank must pass the same number of rows."""
        return self.engine.respond(prompts, seeds).ids

    def text(self, ids: list[int]) -> str:
        """A response as text, without its end token."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def ended(self, ids: list[int]) -> bool:
        """Whether a response ends with an end token."""
        return bool(ids) and ids[-1] in self.ends

    @torch.no_grad()
    def log_probs(
        self, model: Module, prompts: list[list[int]], responses: list[list[int]]
    ) -> list[tuple[float, float]]:
        """For each response its summed log-probability under `model`, and the mean entropy of its tokens (0 if the
        model returns none). Every rank must pass the same number of rows."""
        size, values = max(SCORED_TOKENS // self.job.recipe.data.max_length, 1), []
        order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]) + len(responses[at]))
        whole = zero.on_device(model, self.device) if model is self.model else contextlib.nullcontext()
        with whole, self.trainer.accelerator.autocast():
            for start in range(0, len(order), size):
                rows = [(prompts[at], responses[at]) for at in order[start : start + size]]
                values += self._scored(model, rows)
        return [value for _, value in sorted(zip(order, values, strict=True))]

    def _scored(self, model: Module, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, float]]:
        t = max(len(prompt) + len(response) for prompt, response in rows)
        pad, device = self.tokenizer.pad_token_id, self.device
        ids = torch.tensor([[*p, *r, *[pad] * (t - len(p) - len(r))] for p, r in rows], device=device)
        mask = torch.tensor([[1] * len(p + r) + [0] * (t - len(p + r)) for p, r in rows], device=device)
        response = torch.tensor([[0] * len(p) + [1] * len(r) + [0] * (t - len(p + r)) for p, r in rows], device=device)
        sums, entropies = log_probs.of_responses(model, ids, mask, response)
        summed = entropies.tolist() if entropies is not None else [0.0] * len(rows)
        return [(s, e / max(len(r), 1)) for s, e, (_, r) in zip(sums.tolist(), summed, rows, strict=True)]


def units(rows: int, size: int) -> list[Unit]:
    """Batches of `size` rows that are answered together, independent of the number of ranks."""
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]
