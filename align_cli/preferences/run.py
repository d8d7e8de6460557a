"""A run of `align orpo` or `align simpo`: one trainer on pairs, and a reference only if a loss needs one."""

from __future__ import annotations

from dataclasses import asdict

import torch
from transformers import TrainingArguments
from trl.trainer.utils import disable_dropout_in_model

from align_cli.data import chat
from align_cli.model import load, memory
from align_cli.model.log_probs import scoring
from align_cli.model.lora import adapted, peft_config
from align_cli.preferences.losses import Term
from align_cli.preferences.trainer import PreferenceTrainer, pair_row
from align_cli.recipe.preferences import PairRecipe
from align_cli.training import placement
from align_cli.training.datasets import datasets
from align_cli.training.job import Job, Outcome
from align_cli.training.loop import run_to_end
from align_cli.training.steps import step_arguments


def train(job: Job[PairRecipe]) -> Outcome:
    """Train on pairs with the recipe's mixture of losses, answer the samples before and after, save."""
    recipe, data, method = job.recipe, job.recipe.data, job.recipe.method
    tokenizer = load.tokenizer(recipe.model, job.base)
    args = step_arguments(TrainingArguments, job)

    def tokenized(groups, tally):
        limits = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
        return map(pair_row, chat.dpo_rows(tokenizer, groups, how=method.pairs, **limits, tally=tally))

    rows = datasets(job, "preferences", tokenizer, {"pairs": method.pairs, "shared": True}, tokenized)
    policy = scoring(placement.policy(job, tokenizer))
    # dropout would add noise to the difference of a pair's log-probabilities; an adapter's own dropout is kept
    disable_dropout_in_model(policy)
    if recipe.lora:
        adapter = peft_config(recipe.lora, load.new_tokens(tokenizer))
        policy = adapted(policy, adapter, checkpointing=args.gradient_checkpointing)
    trainer = PreferenceTrainer(
        model=policy,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.eval,
        processing_class=tokenizer,
        terms=[Term(**asdict(term)) for term in method.terms()],
        compares=recipe.needs_reference(),
        layout=method.layout,
        record=job.run.path / ".layout",
        batch_tokens=method.batch_tokens or memory.batch_tokens(torch.cuda.is_available()),
        say=job.say,
    )
    if trainer.compares and (reference := placement.separate_reference(job, tokenizer)) is not None:
        trainer.reference = placement.placing(trainer)(scoring(reference))
    return run_to_end(trainer, tokenizer, job, rows.counts)
