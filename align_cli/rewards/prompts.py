"""Prompts for sampling, with the data cells that rewards compare the answers with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align_cli.data import chat
from align_cli.data.groups import Count, Group, read_groups
from align_cli.data.split import hashed
from align_cli.data.spool import Spooled
from align_cli.data.template import opened, packed
from align_cli.errors import DataError, raise_all
from align_cli.recipe.sections import Data
from align_cli.rewards import checks
from align_cli.training.job import Job, fold_in
from align_cli.training.prepared import Report, Row, Writer, inferred, prepare

PROBLEMS = 20
"""Maximum number of printed problems."""
OWN = ("place", "round", "same")
"""Columns of prepared prompts that no trainer gets: where a prompt is from, a hash by which rounds order prompts, and
one that equal prompts share."""


class Prompts(Sequence[Group]):
    """Prompts that are mapped from a file; each access makes a group of a row."""

    def __init__(self, rows: Dataset, numbers: Sequence[int] | None = None):
        self.rows, self.numbers = rows, range(len(rows)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return Prompts(self.rows, self.numbers[at])
        row = self.rows[self.numbers[at]]
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in row["prompt"]]
        turns, tools = opened(turns)
        turns = [{key: value for key, value in turn.items() if key != "tools"} for turn in turns]
        given = {name.removeprefix(CELL): json.loads(row[name]) for name in row if name.startswith(CELL)}
        return Group(turns, [], place=row["place"], cells=given, tools=tools)

    @cached_property
    def fresh(self) -> list[tuple[int, int]]:
        """(number of a prompt, hash that equal prompts share), in the seeded order in which rounds take prompts."""
        table = self.rows.with_format("arrow")[:]
        order, same = table["round"].to_pylist(), table["same"].to_pylist()
        return [(at, same[at]) for at in sorted(self.numbers, key=order.__getitem__)]


def dataset(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, list[Count]]:
    """(rows with `prompt` messages and the cells that rewards compare with, row counts). Only prompts that leave room
    for a response are kept; the counts are also printed. Raises DataError for an invalid cell."""
    prompts, counts = groups(job, tokenizer, job.recipe.data)
    return prompts.rows.remove_columns(list(OWN)), counts


def groups(job: Job, tokenizer: PreTrainedTokenizerBase, data: Data) -> tuple[Prompts, list[Count]]:
    """The prompts of a data section that leave room for a response, prepared once, and the row counts, which are also
    printed.

    Raises DataError for a cell that rewards cannot compare with.
    """
    columns = job.recipe.compared_columns()
    checked = [source.verify for _, source in job.recipe.reward_sources() if source.verify]

    def make(writer: Writer) -> Report:
        read = read_groups(data, "prompts", job.recipe.seed, columns, folder=writer.folder)
        lines = [
            f"{group.place}: '{check.column}' {problem}; correct the row"
            for check in checked
            for group in read.train
            if (problem := checks.problem(check.kind, group.cells[check.column]))
        ]
        raise_all(DataError, lines[:PROBLEMS])
        tally = chat.Tally()
        kept = leaving_room(job, tokenizer, read.train, tally)

        def rows() -> Iterator[Row]:
            for group in kept:
                # 63 bits, for Arrow's integers
                order, same = hashed(job.recipe.seed, "round", group.prompt), hashed(0, "prompt", group.prompt)
                own = {"place": group.place, "round": order >> 1, "same": same >> 1}
                yield {"prompt": packed(group.prompt, group.tools)} | cells(job, group) | own

        writer.write("prompts", rows(), schema=inferred(rows()))
        for line in fold_in(read.counts, tally, data.max_dropped):
            writer.say(line)
        return Report(read.counts)

    settings = {"rows": "prompts", "columns": columns, "limit": limit(job)}
    settings["checked"] = [(check.kind, check.column) for check in checked]
    entry = prepare(job, tokenizer, data, settings, make)
    return Prompts(entry.table("prompts")), entry.report.counts


def cells(job: Job, group: Group) -> dict[str, str]:
    """The cells that rewards compare a prompt's responses with, as JSON text, since a dataset column has one type."""
    return {cell(name): json.dumps(group.cells[name]) for name in job.recipe.compared_columns()}


def limit(job: Job) -> int:
    """Maximum tokens of a prompt."""
    data = job.recipe.data
    return data.max_prompt_length or data.max_length - job.recipe.generation.max_new_tokens


def leaving_room(job: Job, tokenizer: PreTrainedTokenizerBase, groups: Spooled, tally: chat.Tally) -> Spooled:
    """The groups whose prompt leaves room for a response; the others are counted into `tally`."""
    kept = []
    for at, group in enumerate(groups):
        try:
            length = len(chat.prompt_ids(tokenizer, group.prompt, group.tools))
        except chat.Unrenderable as error:
            tally.drop(group, str(error))
            continue
        if length > limit(job):
            tally.drop(group, f"prompt over {limit(job)} tokens")
            continue
        kept.append(at)
    return groups.picked(kept)


CELL = "cell_"
"""Prefix of a data column in a trainer's rows, to avoid a clash with the trainer's own columns."""


def cell(column: str) -> str:
    """The name of a data column in a trainer's rows."""
    return f"{CELL}{column}"
