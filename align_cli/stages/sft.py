"""align sft: supervised fine-tuning, mean -log p over response tokens (InstructGPT, arXiv 2203.02155).

    align sft recipe=demo.yaml

Departs from TRL's defaults: conversations are trained on the assistant's turns only, not on every token, and rows
that are cut or dropped are counted.
"""

from __future__ import annotations

from trl import SFTConfig, SFTTrainer

from align_cli.data import chat
from align_cli.model import load
from align_cli.model.lora import peft_config
from align_cli.stages import training
from align_cli.stages.job import Job, Outcome


def run(job: Job) -> Outcome:
    """Train, answer the samples before and after, save. Returns the metrics and the row counts."""
    recipe, method = job.recipe, job.recipe.method
    tokenizer = load.tokenizer(recipe.model, job.base)
    args = training.arguments(SFTConfig, job, packing=method.packing, shuffle_dataset=False)

    def tokenized(groups, tally):
        last = method.train_on == "last-turn"
        return chat.sft_rows(tokenizer, groups, max_length=recipe.data.max_length, last_turn_only=last, tally=tally)

    train, held_out, counts = training.datasets(job, "demonstrations", tokenized)
    trainer = SFTTrainer(
        model=load.policy(recipe.model, tokenizer, dtype=job.dtype, path=job.base),
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config(recipe.lora),
    )
    return training.run_to_end(trainer, tokenizer, job, counts)
