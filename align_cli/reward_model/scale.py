"""The scale of a reward model's scores, for its manifest: mean, standard deviation, and the shift that gives
demonstrations a mean score of 0 (InstructGPT, arXiv 2203.02155, appendix C.2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from align_cli.data import chat
from align_cli.model.reward_head import HEAD
from align_cli.model.zero import gathered
from align_cli.recipe.reward_model import RmRecipe
from align_cli.reward_model.trainer import RankingTrainer
from align_cli.training.datasets import further
from align_cli.training.job import Job
from align_cli.training.layout import Row

RESPONSES = 512
"""Number of responses for mean and standard deviation."""
STREAMED = 64
"""The same for streamed rows."""


def demonstrations(tokenizer: PreTrainedTokenizerBase, job: Job[RmRecipe]) -> list[Row]:
    """The rows of method.center_on, each with one response. Called before training; raises DataError if too few rows
    of the file can be used."""
    data = job.recipe.data
    if job.recipe.method.center_on is None:
        return []

    def tokenized(groups, tally):
        for group in groups[:RESPONSES]:
            fit = chat.fitting(tokenizer, replace(group, responses=group.responses[:1]), data.max_length, None, tally)
            if fit is not None:
                prompt, (answer, *_) = fit
                yield {"prompt_ids": prompt, "responses": [answer[: data.max_length - len(prompt)]]}

    section, settings = replace(data, train=[job.recipe.method.center_on]), {"responses": RESPONSES}
    rows, _ = further(job, section, "demonstrations", tokenizer, settings, tokenized)
    return list(rows or [])


def measured(
    trainer: RankingTrainer, centered_on: list[Row], job: Job[RmRecipe], train: Dataset | IterableDataset
) -> dict[str, Any]:
    """Mean and standard deviation of each head's scores, and the shift. If the head has a bias, the shift is added to
    it; otherwise it is in the manifest, and the code that scores applies it."""
    source = job.recipe.method.center_on
    if source is None:
        rows, name = list(train.take(STREAMED if job.recipe.data.streaming else RESPONSES)), "data.train"
    else:
        rows, name = centered_on, source.path
    scores = torch.tensor([heads for group in trainer.score_all(rows) for heads in group])
    mean = scores.mean(0)
    shift = -mean if source is not None else torch.zeros_like(mean)
    head = getattr(trainer.accelerator.unwrap_model(trainer.model), HEAD)
    bias = getattr(head, "bias", None)
    if bias is not None:
        with torch.no_grad(), gathered([bias], writing=True):
            bias += shift.to(bias)
    shifted = f"; shifted by {shift.mean():+.3f}, so that their mean is 0" if source is not None else ""
    job.say(
        f"scores of {len(scores)} responses of {name}: mean {mean.mean():.3f}, standard deviation {scores.std():.3f}"
        f"{shifted}"
    )
    return {
        "on": name,
        "responses": len(scores),
        "mean": [round(value, 6) for value in mean.tolist()],
        "std": [round(value, 6) for value in scores.std(0).tolist()],
        "shift": [round(value, 6) for value in shift.tolist()],
        "shift_in_weights": bias is not None,
    }
