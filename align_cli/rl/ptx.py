"""PPO-ptx: demonstrations whose LM loss is added to PPO's (InstructGPT, arXiv 2203.02155, eq. 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align_cli.data import chat
from align_cli.recipe.rl import PpoRecipe
from align_cli.rl.ppo import PPOTrainer
from align_cli.training.datasets import further
from align_cli.training.job import Job


def batches(
    job: Job[PpoRecipe], tokenizer: PreTrainedTokenizerBase, trainer: PPOTrainer
) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of demonstrations, seeded by the update's number, so that a resumed run gets the same."""
    data = job.recipe.data

    def tokenized(groups, tally):
        return chat.sft_rows(tokenizer, groups, max_length=data.max_length, last_turn_only=False, tally=tally)

    rows, _ = further(job, replace(data, train=[job.recipe.method.ptx]), "demonstrations", tokenizer, {}, tokenized)
    draw = torch.Generator()
    while True:
        draw.manual_seed(job.recipe.seed * 1_000_003 + trainer.state.global_step * 4099 + trainer.micro_step % 4099)
        drawn = torch.randint(len(rows), (job.per_device * job.ranks,), generator=draw).tolist()
        own = [rows[at] for at in drawn[job.rank * job.per_device : (job.rank + 1) * job.per_device]]
        t = max(len(row["input_ids"]) for row in own)
        ids = torch.tensor([row["input_ids"] + [tokenizer.pad_token_id] * (t - len(row["input_ids"])) for row in own])
        labels = torch.tensor([row["labels"] + [chat.IGNORED] * (t - len(row["labels"])) for row in own])
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (t - len(row["input_ids"])) for row in own])
        device = trainer.accelerator.device
        yield {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
