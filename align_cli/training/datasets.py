"""Turns groups of rows into the datasets that trainers take, and counts the rows used and dropped."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from align_cli.data import chat
from align_cli.data.groups import Count, Group, read_groups, stream_eval, stream_groups
from align_cli.errors import DataError
from align_cli.recipe.stages import RowKind
from align_cli.training.job import Job, fold_in

Tokenized = Callable[[Iterable[Group], chat.Tally], Iterable[dict[str, Any]]]
"""(groups, tally) -> rows of token ids; truncated and dropped rows are counted in the tally."""


def datasets(
    job: Job, need: RowKind, tokenized: Tokenized
) -> tuple[Dataset | IterableDataset, Dataset | None, list[Count]]:
    """Training and held-out datasets for the trainer, and the row counts, which are also printed.

    `tokenized(groups, tally)` turns groups into rows. The order is seeded and the same on every rank; streamed rows
    are shuffled through a buffer of 1000. Raises DataError for rows that cannot be used.
    """
    data, seed, counts = job.recipe.data, job.recipe.seed, []
    trained, evaluated = chat.Tally(), chat.Tally()
    if data.streaming:
        epochs = 0

        def epoch() -> Iterator[dict[str, Any]]:
            nonlocal epochs
            epochs += 1
            # every epoch has the same rows, so only those of the first are counted
            yield from tokenized(stream_groups(data, need, seed, counts if epochs == 1 else []), chat.Tally())

        train = IterableDataset.from_generator(epoch).shuffle(seed=seed, buffer_size=1000)
        held_out = stream_eval(data, need, seed, counts)
        rows = _listed(tokenized(held_out, evaluated), seed)
        if isinstance(data.eval, float):
            # these drops are in no count, since the stream has not been read yet
            for reason, number in evaluated.dropped.items():
                job.say(f"{number} of {len(held_out)} held out: {reason}, first at {evaluated.first[reason]}")
    else:
        groups = read_groups(data, need, seed)
        held_out, counts = groups.eval, groups.counts
        train, rows = _listed(tokenized(groups.train, trained), seed), _listed(tokenized(held_out, evaluated), seed)
        if groups.leaked:
            job.say(f"{groups.leaked} prompts of data.eval are in data.train too: eval metrics will be too good")
    for line in fold_in(counts, trained, data.max_dropped):
        job.say(line)
    for key, made, tally in (("train", train, trained), ("eval", rows, evaluated)):
        if tally.dropped and not len(made):
            reason, number = tally.dropped.most_common(1)[0]
            raise DataError(
                f"data.{key}: every row was dropped; most often: {reason} ({number}), first at {tally.first[reason]}; "
                "raise data.max_length or correct the rows"
            )
    return train, rows if held_out else None, counts


def _listed(rows: Iterable[dict[str, Any]], seed: int) -> Dataset:
    listed = list(rows)
    random.Random(seed).shuffle(listed)
    return Dataset.from_list(listed)
