"""Supervised fine-tuning on the recipe's `data`, shared by stages: mean -log p over response tokens."""

from __future__ import annotations

from datasets import Dataset
from trl import SFTConfig, SFTTrainer, pack_dataset

from align_cli.data import chat
from align_cli.model import load
from align_cli.model.lora import peft_config
from align_cli.training.arguments import arguments
from align_cli.training.datasets import datasets
from align_cli.training.job import Job, Outcome
from align_cli.training.loop import run_to_end
from align_cli.training.placement import policy


def run(job: Job, *, packing: bool = False, last_turn_only: bool = False) -> Outcome:
    """Train, answer the samples before and after, save. Returns the metrics and the row counts."""
    recipe = job.recipe
    tokenizer = load.tokenizer(recipe.model, job.base)
    # TRL would truncate and filter the rows again, into a copy; a stream is left to it
    ready = {} if recipe.data.streaming else {"dataset_kwargs": {"skip_prepare_dataset": True}}
    args = arguments(SFTConfig, job, packing=packing, shuffle_dataset=False, **ready)
    packs = {"train": packing, "eval": packing if args.eval_packing is None else args.eval_packing}

    def tokenized(groups, tally):
        return chat.sft_rows(
            tokenizer, groups, max_length=recipe.data.max_length, last_turn_only=last_turn_only, tally=tally
        )

    def arranged(name: str, rows: Dataset) -> Dataset:
        if not packs[name]:
            return rows
        return pack_dataset(rows, args.max_length, args.packing_strategy, {"num_proc": args.dataset_num_proc})

    settings = {"last_turn_only": last_turn_only, "packs": packs, "packing": args.packing_strategy}
    rows = datasets(job, "demonstrations", tokenizer, settings, tokenized, arranged if any(packs.values()) else None)
    trainer = SFTTrainer(
        model=policy(job, tokenizer),
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.eval,
        processing_class=tokenizer,
        peft_config=peft_config(recipe.lora, load.new_tokens(tokenizer)),
    )
    return run_to_end(trainer, tokenizer, job, rows.counts)
