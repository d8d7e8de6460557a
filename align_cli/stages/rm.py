"""align rm: a reward model from rankings, -1/C(K,2) Σ log σ(r_i - r_j) over all pairs of a prompt's K responses.

    align rm recipe=demo.yaml

InstructGPT, arXiv 2203.02155, eq. 1. Differs from common trainers: a ranking takes K forward passes, or one row that
holds the prompt once; `data.batch_size` counts prompts; an ensemble is several heads on one trunk.
"""

from __future__ import annotations

import torch
from trl import RewardConfig
from trl.trainer.utils import disable_dropout_in_model

from align_cli.data import rankings
from align_cli.model import load, memory, reward_head
from align_cli.model.lora import adapted, peft_config
from align_cli.recipe.reward_model import RmRecipe
from align_cli.reward_model import ensemble, quality, scale
from align_cli.reward_model.trainer import Objective, RankingTrainer
from align_cli.training.checkpoints import finish
from align_cli.training.datasets import datasets
from align_cli.training.job import Job, Outcome
from align_cli.training.loop import loop
from align_cli.training.steps import step_arguments


def run(job: Job[RmRecipe]) -> Outcome:
    """Train, evaluate on held-out groups, center the scores, save. Returns the metrics and the row counts."""
    recipe, data, method = job.recipe, job.recipe.data, job.recipe.method
    tokenizer = load.tokenizer(recipe.model, job.base)
    args = step_arguments(RewardConfig, job)
    seeds = method.seeds or [recipe.seed]

    def tokenized(groups, tally):
        for group in groups:
            tally.add("ties", rankings.ties(group))
            rows = rankings.rm_rows(
                tokenizer,
                [group],
                max_length=data.max_length,
                max_prompt_length=data.max_prompt_length,
                tally=tally,
            )
            for row in rows:
                yield row | ({"heads": ensemble.drawn(row, seeds)} if len(seeds) > 1 else {})

    train, held_out, counts, counted = datasets(
        job, "preferences", tokenizer, {"levels": True, "heads": seeds}, tokenized
    )
    demonstrations = scale.demonstrations(tokenizer, job)
    if tied := counted.get("ties", 0):
        job.say(f"{tied} pairs of responses are tied and not compared")
    model = reward_head.from_policy(
        recipe.model, tokenizer, dtype=job.dtype, seeds=seeds, path=job.base, adapter=recipe.lora is not None
    )
    if recipe.lora:
        config = peft_config(recipe.lora, load.new_tokens(tokenizer), "SEQ_CLS")
        model = adapted(model, config, checkpointing=args.gradient_checkpointing)
    if args.disable_dropout:
        disable_dropout_in_model(model)
    trainer = RankingTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        objective=Objective(method.loss, margin=method.margin, center=method.center),
        layout=method.layout,
        record=job.run.path / ".layout",
        batch_tokens=method.batch_tokens or memory.batch_tokens(torch.cuda.is_available()),
        say=job.say,
    )
    metrics, stopped_by = loop(trainer, job)
    if stopped_by is not None:
        return Outcome(metrics, counts, stopped_by)
    if held_out is not None:
        figures = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
        for line in quality.lines(figures):
            job.say(line)
    scores = scale.measured(trainer, demonstrations, job, train)
    finish(trainer, tokenizer, job)
    return Outcome(
        metrics | {"ties": counted.get("ties", 0)},
        counts,
        extra={"reward": scores | {"heads": len(seeds)}, "layout": trainer.layout},
    )
