"""Prompts for sampling, with the data cells that rewards compare the answers with."""

from __future__ import annotations

import json

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align_cli.data import chat
from align_cli.data.groups import Count, Group, read_groups
from align_cli.data.template import packed
from align_cli.errors import DataError, raise_all
from align_cli.recipe.sections import Data
from align_cli.rewards import checks
from align_cli.training.job import Job, fold_in

PROBLEMS = 20
"""Maximum number of printed problems."""


def dataset(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, list[Count]]:
    """(rows with `prompt` messages and the cells that rewards compare with, row counts). Only prompts that leave room
    for a response are kept; the counts are also printed. Raises DataError for an invalid cell."""
    prompts, counts = groups(job, tokenizer, job.recipe.data)
    rows = [{"prompt": packed(group.prompt, group.tools)} | cells(job, group) for group in prompts]
    return Dataset.from_list(rows), counts


def groups(job: Job, tokenizer: PreTrainedTokenizerBase, data: Data) -> tuple[list[Group], list[Count]]:
    """The prompts of a data section that leave room for a response, and the row counts, which are also printed.

    Raises DataError for a cell that rewards cannot compare with.
    """
    checked = [source.verify for _, source in job.recipe.reward_sources() if source.verify]
    read, tally = read_groups(data, "prompts", job.recipe.seed, job.recipe.compared_columns()), chat.Tally()
    lines = [
        f"{group.place}: '{check.column}' {problem}; correct the row"
        for check in checked
        for group in read.train
        if (problem := checks.problem(check.kind, group.cells[check.column]))
    ]
    raise_all(DataError, lines[:PROBLEMS])
    kept = leaving_room(job, tokenizer, read.train, tally)
    for line in fold_in(read.counts, tally, data.max_dropped):
        job.say(line)
    return kept, read.counts


def cells(job: Job, group: Group) -> dict[str, str]:
    """The cells that rewards compare a prompt's responses with, as JSON text, since a dataset column has one type."""
    return {cell(name): json.dumps(group.cells[name]) for name in job.recipe.compared_columns()}


def leaving_room(job: Job, tokenizer: PreTrainedTokenizerBase, groups: list[Group], tally: chat.Tally) -> list[Group]:
    """The groups whose prompt leaves room for a response; the others are counted into `tally`."""
    data, kept = job.recipe.data, []
    limit = data.max_prompt_length or data.max_length - job.recipe.generation.max_new_tokens
    for group in groups:
        try:
            length = len(chat.prompt_ids(tokenizer, group.prompt, group.tools))
        except chat.Unrenderable as error:
            tally.drop(group, str(error))
            continue
        if length > limit:
            tally.drop(group, f"prompt over {limit} tokens")
            continue
        kept.append(group)
    return kept


def cell(column: str) -> str:
    """The name of a data column in a trainer's rows, prefixed to avoid a clash with the trainer's own columns."""
    return f"cell_{column}"
