"""Supervised fine-tuning on the recipe's `data`, shared by stages: mean -log p over response tokens."""

from __future__ import annotations

from trl import SFTConfig, SFTTrainer

from align_cli.data import chat
from align_cli.model import load
from align_cli.model.lora import peft_config
from align_cli.training.arguments import arguments
from align_cli.training.datasets import datasets
from align_cli.training.job import Job, Outcome
from align_cli.training.loop import run_to_end


def run(job: Job, *, packing: bool = False, last_turn_only: bool = False) -> Outcome:
    """Train, answer the samples before and after, save. Returns the metrics and the row counts."""
    recipe = job.recipe
    tokenizer = load.tokenizer(recipe.model, job.base)
    args = arguments(SFTConfig, job, packing=packing, shuffle_dataset=False)

    def tokenized(groups, tally):
        return chat.sft_rows(
            tokenizer, groups, max_length=recipe.data.max_length, last_turn_only=last_turn_only, tally=tally
        )

    train, held_out, counts = datasets(job, "demonstrations", tokenized)
    trainer = SFTTrainer(
        model=load.policy(recipe.model, tokenizer, dtype=job.dtype, path=job.base),
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config(recipe.lora, load.new_tokens(tokenizer)),
    )
    return run_to_end(trainer, tokenizer, job, counts)
