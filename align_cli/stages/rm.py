"""align rm: a reward model from rankings, -1/C(K,2) Σ log σ(r_i - r_j) over all pairs of a prompt's K responses.

    align rm recipe=demo.yaml

InstructGPT, arXiv 2203.02155, eq. 1. Departs from the usual trainers: a ranking costs K forward passes, or one row with
the prompt held once; `data.batch_size` counts prompts; an ensemble is several heads on one trunk.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from trl import RewardConfig
from trl.trainer.utils import disable_dropout_in_model

from align_cli.data import chat, rankings
from align_cli.data.groups import read_groups
from align_cli.methods import quality
from align_cli.methods.reward import Objective, RankingTrainer
from align_cli.model import load, memory, reward
from align_cli.model.lora import peft_config
from align_cli.stages import training
from align_cli.stages.job import Job, Outcome, fold_in

CENTERED_ON = 512
"""Responses that the mean and the spread of the scores are taken over."""


def run(job: Job) -> Outcome:
    """Train, measure on held-out groups, center, save. Returns the metrics and the row counts."""
    recipe, data, method = job.recipe, job.recipe.data, job.recipe.method
    tokenizer = load.tokenizer(recipe.model, job.base)
    args = training.arguments(
        RewardConfig,
        job,
        # one batch of the data loader is all that this rank adds to a step; the trainer cuts it by tokens
        per_device_train_batch_size=job.per_device * job.accumulation,
        gradient_accumulation_steps=1,
        remove_unused_columns=False,
    )
    seeds, tied = method.seeds or [recipe.seed], 0

    def tokenized(groups, tally):
        nonlocal tied
        for group in groups:
            tied += rankings.ties(group)
            rows = rankings.rm_rows(
                tokenizer,
                [group],
                max_length=data.max_length,
                max_prompt_length=data.max_prompt_length,
                tally=tally,
            )
            for row in rows:
                yield row | ({"heads": _drawn(row, seeds)} if len(seeds) > 1 else {})

    train, held_out, counts = training.datasets(job, "preferences", tokenized)
    demonstrations = _demonstrations(tokenizer, job)
    if tied:
        job.say(f"{tied} pairs of responses are tied and are in no comparison")
    model = reward.from_policy(recipe.model, tokenizer, dtype=job.dtype, seeds=seeds, path=job.base)
    if recipe.lora:
        model = get_peft_model(model, peft_config(recipe.lora, load.new_tokens(tokenizer), "SEQ_CLS"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                # a bfloat16 head would round its small updates away
                parameter.data = parameter.data.float()
        if args.gradient_checkpointing:
            # checkpointed blocks whose inputs need no gradient would train nothing
            model.enable_input_require_grads()
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
        batch_tokens=method.batch_tokens or memory.batch_tokens(torch.cuda.is_available()),
        say=job.say,
    )
    metrics, stopped_by = training.loop(trainer, job)
    if stopped_by is not None:
        return Outcome(metrics, counts, stopped_by)
    if held_out is not None:
        figures = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
        for line in quality.lines(figures):
            job.say(line)
    scale = _scale(trainer, demonstrations, job, train)
    training.finish(trainer, tokenizer, job)
    return Outcome(metrics | {"ties": tied}, counts, extra={"reward": scale | {"heads": len(seeds)}})


def _drawn(row: dict[str, Any], seeds: list[int]) -> list[int]:
    """How often each head of an ensemble learns from a group: Poisson(1), the bootstrap of a stream (Oza 2005), by
    content, so that ranks and resumed runs agree."""
    drawn = []
    for seed in seeds:
        draw, count, product = random.Random(f"{seed} {row['prompt_ids']} {row['responses']}"), 0, 1.0
        while (product := product * draw.random()) > math.exp(-1):
            count += 1
        drawn.append(count)
    return drawn


def _demonstrations(tokenizer: Any, job: Job) -> list[dict[str, Any]]:
    """The rows of method.center_on, each with its one response. Raises DataError for a file of which too little can be
    used, before anything is trained."""
    data, tally, rows = job.recipe.data, chat.Tally(), []
    if job.recipe.method.center_on is None:
        return rows
    read = read_groups(replace(data, train=[job.recipe.method.center_on], eval=None), "demonstrations", 0)
    for group in read.train[:CENTERED_ON]:
        fit = chat.fitting(tokenizer, replace(group, responses=group.responses[:1]), data.max_length, None, tally)
        if fit is not None:
            prompt, (answer, *_) = fit
            rows.append({"prompt_ids": prompt, "responses": [answer[: data.max_length - len(prompt)]]})
    for line in fold_in(read.counts, tally, data.max_dropped):
        job.say(line)
    return rows


def _scale(trainer: RankingTrainer, demonstrations: list[dict[str, Any]], job: Job, train: Dataset) -> dict[str, Any]:
    """Mean and standard deviation of the scores, and the shift that puts demonstrations at 0 on average (InstructGPT,
    appendix C.2). A head with a bias takes the shift in; others leave it to whoever scores, in the manifest."""
    source = job.recipe.method.center_on
    if source is None:
        rows, on = (
            list(train.take(CENTERED_ON)) if not job.recipe.data.streaming else list(train.take(64)),
            "data.train",
        )
    else:
        rows, on = demonstrations, source.path
    found = torch.tensor([heads for group in trainer.score_all(rows) for heads in group])
    mean = found.mean(0)
    shift = -mean if source is not None else torch.zeros_like(mean)
    head = getattr(trainer.accelerator.unwrap_model(trainer.model), reward.HEAD)
    bias = getattr(head, "bias", None)
    if bias is not None:
        with torch.no_grad(), reward.whole(bias):
            bias += shift.to(bias)
    job.say(
        f"scores of {len(found)} responses of {on}: mean {mean.mean():.3f}, standard deviation {found.std():.3f}"
        + (f"; shifted by {shift.mean():+.3f}, so that their mean is 0" if source is not None else "")
    )
    return {
        "on": on,
        "responses": len(found),
        "mean": [round(value, 6) for value in mean.tolist()],
        "std": [round(value, 6) for value in found.std(0).tolist()],
        "shift": [round(value, 6) for value in shift.tolist()],
        "shift_in_weights": bias is not None,
    }
