"""Turns groups of rows into the datasets that trainers take, and counts the rows used and dropped."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from align_cli.data import chat
from align_cli.data.groups import Count, Group, read_groups, stream_eval, stream_groups
from align_cli.errors import DataError
from align_cli.recipe.sections import Data
from align_cli.recipe.stages import RowKind
from align_cli.training.job import Job, fold_in
from align_cli.training.prepared import Arranged, Report, Writer, prepare

Tokenized = Callable[[Iterable[Group], chat.Tally], Iterable[dict[str, Any]]]
"""(groups, tally) -> rows of token ids; truncated and dropped rows are counted in the tally."""


class Datasets(NamedTuple):
    """What a trainer trains and evaluates on."""

    train: Dataset | IterableDataset
    eval: Dataset | None
    counts: list[Count]
    """Row counts, which have been printed."""
    counted: dict[str, int]
    """What `tokenized` counted in `Tally.counted`."""


def datasets(
    job: Job,
    need: RowKind,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    tokenized: Tokenized,
    arranged: Arranged | None = None,
) -> Datasets:
    """Training and held-out datasets for the trainer, and the row counts, which are also printed.

    `tokenized(groups, tally)` turns groups into rows; `settings` are all values that it depends on besides `data` and
    `tokenizer`. Rank 0 does so once, into files that all ranks and later runs map into memory (`prepared`); there,
    `arranged` may pack the rows. The order is seeded; streamed rows are shuffled through a buffer of 1000. Raises
    DataError for rows that cannot be used.
    """
    if job.recipe.data.streaming:
        return _streamed(job, need, tokenized)

    def make(writer: Writer) -> Report:
        return _write(job, need, tokenized, arranged, writer)

    entry = prepare(job, tokenizer, job.recipe.data, settings | {"rows": need}, make)
    return Datasets(entry.table("train"), entry.table("eval"), entry.report.counts, entry.report.counted)


def _write(job: Job, need: RowKind, tokenized: Tokenized, arranged: Arranged | None, writer: Writer) -> Report:
    data, seed, counted = job.recipe.data, job.recipe.seed, {}
    trained, evaluated = (chat.Tally(counted=counted) for _ in range(2))
    groups = read_groups(data, need, seed, folder=writer.folder)
    parts = (("train", groups.train, trained), ("eval", groups.eval, evaluated))
    numbers = {name: writer.write(name, tokenized(part, tally), seed, arranged) for name, part, tally in parts}
    if groups.leaked:
        writer.say(f"{groups.leaked} prompts of data.eval are in data.train too: eval metrics will be too good")
    for line in fold_in(groups.counts, trained, data.max_dropped):
        writer.say(line)
    for name, _, tally in parts:
        refuse_if_empty(name, numbers[name], tally)
    return Report(groups.counts, counted=counted)


def further(
    job: Job,
    data: Data,
    need: RowKind,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    tokenized: Tokenized,
) -> tuple[Dataset | None, list[Count]]:
    """(rows, row counts) of the training sources of another data section, in their order; the rows are None if all are
    dropped. Otherwise as `datasets`."""
    data = replace(data, eval=None)

    def make(writer: Writer) -> Report:
        groups, tally = read_groups(data, need, 0, folder=writer.folder), chat.Tally()
        writer.write("rows", tokenized(groups.train, tally))
        for line in fold_in(groups.counts, tally, data.max_dropped):
            writer.say(line)
        return Report(groups.counts)

    entry = prepare(job, tokenizer, data, settings | {"further": need}, make)
    return entry.table("rows"), entry.report.counts


def refuse_if_empty(name: str, rows: int, tally: chat.Tally) -> None:
    """Raise DataError if every row of a part of the data was dropped."""
    if tally.dropped and not rows:
        reason, number = tally.dropped.most_common(1)[0]
        raise DataError(
            f"data.{name}: every row was dropped; most often: {reason} ({number}), first at {tally.first[reason]}; "
            "raise data.max_length or correct the rows"
        )


def _streamed(job: Job, need: RowKind, tokenized: Tokenized) -> Datasets:
    data, seed, counts, epochs, counted = job.recipe.data, job.recipe.seed, [], 0, {}

    def epoch() -> Iterator[dict[str, Any]]:
        nonlocal epochs
        epochs += 1
        # every epoch has the same rows, so only those of the first are counted
        yield from tokenized(
            stream_groups(data, need, seed, counts if epochs == 1 else []), chat.Tally(counted=counted)
        )

    train = IterableDataset.from_generator(epoch).shuffle(seed=seed, buffer_size=1000)
    held_out, evaluated = stream_eval(data, need, seed, counts), chat.Tally(counted=counted)
    rows = list(tokenized(held_out, evaluated))
    random.Random(seed).shuffle(rows)
    if isinstance(data.eval, float):
        # these drops are in no count, since the stream has not been read yet
        for reason, number in evaluated.dropped.items():
            job.say(f"{number} of {len(held_out)} held out: {reason}, first at {evaluated.first[reason]}")
    for line in fold_in(counts, chat.Tally(), data.max_dropped):
        job.say(line)
    refuse_if_empty("eval", len(rows), evaluated)
    return Datasets(train, Dataset.from_list(rows) if held_out else None, counts, counted)
