"""Sources -> groups for training and evaluation: checks, counts, the eval split and the mixture.

No row is dropped silently: for every source, rows read = rows used + rows dropped, and each drop reason is counted with
its first example. Rows used are counted before the split and the weights, so a weight of 2 does not double them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from align_cli.data import refusals
from align_cli.data.count import Count
from align_cli.data.format import Group, Row, normalised, read_columns, recognise, to_group
from align_cli.data.kinds import note_kinds, text_columns
from align_cli.data.load import Report, files, fingerprint, is_local, read_rows, refuse
from align_cli.data.messages import unread_keys
from align_cli.data.split import (
    canonical,
    content,
    hashed,
    interleaved,
    labelled,
    preference_pairs,
    share,
    smallest,
    weighted,
)
from align_cli.data.spool import Spool, Spooled
from align_cli.data.template import ChatTokenizer, without_thoughts
from align_cli.data.turns import Broken, Dropped, Message
from align_cli.errors import DataError, did_you_mean, raise_all
from align_cli.recipe.sections import Data, Source
from align_cli.recipe.stages import RowKind

__all__ = ["Count", "Group", "Groups", "Message", "check_sources", "labelled", "preference_pairs"]
__all__ += ["read_groups", "stream_eval", "stream_groups"]

PARTS = ("subset", "data_dir", "revision")
"""Settings that choose a part of a source, besides its split."""
SAMPLE = 64
"""Number of first rows from which a format is recognised."""
LINES = 20
"""Most problems of one source that are printed."""
STREAMED_EVAL = 512
"""Most groups held out for evaluation by a fraction in `data.eval` while streaming."""
PAIRINGS = ("best-worst", "best-random", "adjacent", "all")
LABELLINGS = ("best-worst", "best-rest")
CHECKED = 64 << 20
"""Most bytes of a source that `align check` reads."""


@dataclass
class Groups:
    """Everything a stage trains and evaluates on."""

    train: Sequence[Group]
    eval: Sequence[Group]
    counts: list[Count]
    leaked: int = 0
    """Groups of the eval sources whose prompt also occurs in the training groups."""


class Problems:
    """The problems of one source, one line each; only the first LINES are printed."""

    def __init__(self, source: Source):
        self.path, self.shown, self.total = source.path, [], 0

    def __call__(self, line: str) -> None:
        self.total += 1
        if len(self.shown) < LINES:
            self.shown.append(line)

    def lines(self) -> list[str]:
        more = self.total - len(self.shown)
        return self.shown + ([f"{self.path}: … and {more} more"] if more else [])


def read_groups(
    data: Data, need: RowKind, seed: int, cells: Sequence[str] = (), *, folder: Path | None = None
) -> Groups:
    """Read all groups once, split and weighted; the training groups keep the row's columns named in `cells`. In memory
    are only hashes of them; large data sets go through a file in `folder` (default: the temporary folder), from which
    each access reads a group. Raises DataError with every problem of every source."""
    lines, counts, spool = _fraction_lines(data), _counts(data), Spool(folder)
    fraction, evals = isinstance(data.eval, float), _eval_sources(data)
    by_prompt, by_content, exact = array("Q"), array("Q"), array("Q")
    parts: list[list[int]] = []
    for at, (source, count) in enumerate(zip([*data.train, *evals], counts, strict=True)):
        start = len(spool)
        for group in _source_groups(source, count, data, need, lines, cells if at < len(data.train) else ()):
            spool.add(group)
            by_prompt.append(hashed(seed, "split", group.prompt) if fraction else 0)
            by_content.append(hashed(seed, "weight", content(group)) if source.weight % 1 else 0)
            exact.append(hashed(0, "prompt", group.prompt) if evals else 0)
        parts.append(list(range(start, len(spool))))
    raise_all(DataError, lines)

    held_out: list[int] = []
    if fraction:
        eval_keys = smallest(set(by_prompt), data.eval)
        if not eval_keys:
            raise DataError(_too_few(data.eval))
        held_out = [number for part in parts for number in part if by_prompt[number] in eval_keys]
        parts = [[number for number in part if by_prompt[number] not in eval_keys] for part in parts]
    sources = [*data.train, *evals]
    parts = [weighted(part, of.weight, by_content.__getitem__) for part, of in zip(parts, sources, strict=True)]
    trained, evaluated = (list(chain(*some)) for some in (parts[: len(data.train)], parts[len(data.train) :]))
    prompts = {exact[number] for number in trained} if evals else set()
    leaked = sum(exact[number] in prompts for number in evaluated)
    return Groups(Spooled(spool, trained), Spooled(spool, held_out + evaluated), counts, leaked)


def stream_groups(data: Data, need: RowKind, seed: int, counts: list[Count]) -> Iterator[Group]:
    """One epoch of training groups, with one row in memory at a time. Inserts one Count per source at the front of
    `counts`, and fills it while reading.

    Sources are interleaved in proportion to their weights; a weight of 2.5 reads a source three times, the last time
    only half of its rows. Raises DataError at the first broken row, and at the end of a source if too many rows were
    dropped.
    """
    raise_all(DataError, _fraction_lines(data))
    held_out = data.eval if isinstance(data.eval, float) else 0.0
    opened = _counts(data)[: len(data.train)]
    for source, count in zip(data.train, opened, strict=True):
        count.fingerprint = fingerprint(source)
    counts[:0] = opened
    yield from interleaved(
        [_passes(source, data, need, seed, count, held_out) for source, count in zip(data.train, opened, strict=True)],
        [source.weight for source in data.train],
    )


def stream_eval(data: Data, need: RowKind, seed: int, counts: list[Count]) -> list[Group]:
    """The eval groups for streaming. Eval sources are read whole, and their counts are added to `counts`; a fraction
    gives the first 512 groups that are held out of the training sources. Raises DataError."""
    lines, opened = _fraction_lines(data), _counts(data)[len(data.train) :]
    evals = [list(_source_groups(*of, data, need, lines)) for of in zip(_eval_sources(data), opened, strict=True)]
    raise_all(DataError, lines)
    counts += opened
    if not isinstance(data.eval, float):
        sources = zip(evals, _eval_sources(data), strict=True)

        def key(group: Group) -> int:
            return hashed(seed, "weight", content(group))

        return [group for groups, source in sources for group in weighted(groups, source.weight, key)]
    streams = [_groups_of(source, data, need, Count(source.path), refuse) for source in data.train]
    chosen = (g for g in interleaved(streams, [1.0] * len(streams)) if share(seed, "split", g.prompt) < data.eval)
    if groups := list(islice(chosen, STREAMED_EVAL)):
        return groups
    raise DataError(f"data.eval: a fraction of {data.eval:g} holds out no prompt; raise it or name an eval source")


def check_sources(
    data: Data,
    need: RowKind,
    *,
    cells: Sequence[str] = (),
    max_bytes: int = CHECKED,
    tokenizer: ChatTokenizer | None = None,
) -> tuple[list[str], list[Count]]:
    """Every problem, one line each, and the counts; hub ids are skipped. With a `tokenizer` (a chat template and
    special tokens are enough), the first rows of every source are rendered, and those that the template refuses are
    counted as dropped.

    At most about `max_bytes` of each source are read; `Count.partial` says whether that was only a part. The
    fingerprint is always that of the whole source.
    """
    lines, counts, prompts = _fraction_lines(data), [], set()
    refused = None if tokenizer is None else refusals.checker(tokenizer, need)
    for source, count in zip([*data.train, *_eval_sources(data)], _counts(data), strict=True):
        if not is_local(source):
            continue
        local = files(source)
        whole = sum(file.stat().st_size for file in local) <= max_bytes
        problems, count.partial = Problems(source), not whole
        for group in _groups_of(source, data, need, count, problems, None if whole else max_bytes, cells, refused):
            if len(prompts) < 2:
                prompts.add(canonical(group.prompt))
        # of all bytes: otherwise a finished run on a large file would always look changed
        if local and not problems.total:
            count.fingerprint = fingerprint(source)
        lines += problems.lines()
        counts.append(count)
    if isinstance(data.eval, float) and not lines and len(prompts) == 1:
        lines.append(_too_few(data.eval))
    return lines, counts


def _groups_of(
    source: Source,
    data: Data,
    need: RowKind,
    count: Count,
    report: Report,
    max_bytes: int | None = None,
    cells: Sequence[str] = (),
    refused: Callable[[Group], str | None] | None = None,
) -> Iterator[Group]:
    """Groups of a source in file order, according to the recipe's data section. Fills `count`, and reports broken rows.
    `refused` returns the reason if one of the first rows would be dropped during tokenization."""
    broken = Problems(source)

    def tell(line: str) -> None:
        broken(line)
        report(line)

    seen, strange = {}, set()
    rows = (
        (place, _watched(row, source, seen, strange))
        for place, row in read_rows(source, tell, max_bytes=max_bytes, streaming=data.streaming)
    )
    sample = list(islice(rows, SAMPLE))
    if not sample:
        if not broken.total:
            tell(f"{source.path}: holds no rows; name another file or write it again")
        return
    try:
        count.format = recognise([row for _, row in sample], source, need)
    except Broken as error:
        tell(f"{source.path}: {error}")
        return
    names = list(dict.fromkeys(name for _, row in sample for name in row))
    if absent := [name for name in cells if name not in names]:
        near = did_you_mean(absent[0], names)
        tell(f"{source.path}: no column '{absent[0]}' to compare responses with (has {', '.join(names)}){near}")
        return
    drop_empty = data.drop_empty if data.drop_empty is not None else count.format == "hh"
    columns, kinds = text_columns(count.format, need), {}
    for place, row in chain(sample, rows):
        count.rows_read += 1
        try:
            note_kinds(row, place, columns, kinds)
            group = to_group(row, place, count.format, need, drop_empty)
            if missing := [name for name in cells if row.get(name) is None]:
                raise Broken(
                    f"'{missing[0]}' is missing, but responses are compared with it; correct or remove the row"
                )
        except Dropped as dropped:
            count.drop(place, dropped)
        except Broken as error:
            tell(f"{place}: {error}")
        else:
            if data.reasoning == "drop":
                prompt, responses = without_thoughts(group.prompt), [without_thoughts(r) for r in group.responses]
                group = replace(group, prompt=prompt, responses=responses)
            count.rows_used += 1
            count.ranked += count.format == "scored" and _like_ranks(group)
            if refused is not None and count.rows_read <= refusals.RENDERED and (why := refused(group)):
                count.lose(place, Dropped(why, group.prompt[-1]["content"]))
            if need == "preferences":
                for how in PAIRINGS:
                    count.pairs[how] = count.pairs.get(how, 0) + len(preference_pairs(group, how))
            elif need == "labels":
                for how in LABELLINGS:
                    count.pairs[how] = count.pairs.get(how, 0) + len(labelled(group, how))
            if need in ("preferences", "labels") and "responses" in columns and isinstance(row.get("responses"), list):
                count.repeated += len(row["responses"]) - len(group.responses)
            yield replace(group, count=count, cells={name: row[name] for name in cells})
    read = read_columns(count.format, need, source) | set(cells)
    count.unread = [name for name in seen if name not in read] + [f"{key} of turns" for key in sorted(strange)]
    for line in count.too_many_dropped(data.max_dropped):
        tell(line)


def _like_ranks(group: Group) -> bool:
    """Whether the scores of K > 2 responses are the numbers from 1 to K."""
    scores = group.scores or []
    return len(scores) > 2 and sorted(scores) == list(range(1, len(scores) + 1))


def _watched(row: Row, source: Source, seen: dict[str, None], strange: set[str]) -> Row:
    """The normalised row. Records its columns in `seen`, and unread keys of its turns in `strange`."""
    seen |= dict.fromkeys(name for name, value in row.items() if value is not None)
    row = normalised(row, source)
    strange |= unread_keys(row)
    return row


def _counts(data: Data) -> list[Count]:
    """An empty count for every source, those of data.train first."""
    sources = [("data.train", data.train), ("data.eval", _eval_sources(data))]
    paths = [source.path for _, listed in sources for source in listed]
    return [
        Count(
            source.path,
            key=f"{key}[{at}]",
            split=source.split,
            part={name: value for name in PARTS if (value := getattr(source, name)) is not None},
            shared=paths.count(source.path) > 1,
        )
        for key, listed in sources
        for at, source in enumerate(listed)
    ]


def _source_groups(
    source: Source, count: Count, data: Data, need: RowKind, lines: list[str], cells: Sequence[str] = ()
) -> Iterator[Group]:
    """Groups of a whole source; fills its count and adds its problems to `lines`."""
    problems = Problems(source)
    yield from _groups_of(source, data, need, count, problems, cells=cells)
    if not problems.total:
        count.fingerprint = fingerprint(source)
    lines += problems.lines()


def _eval_sources(data: Data) -> list[Source]:
    return data.eval if isinstance(data.eval, list) else []


def _fraction_lines(data: Data) -> list[str]:
    if not isinstance(data.eval, float) or 0 < data.eval < 1:
        return []
    return [f"data.eval: {data.eval:g} is not a fraction between 0 and 1; write e.g. 0.05, or null for no evaluation"]


def _too_few(fraction: float) -> str:
    return f"data.eval: {fraction:g} of a single prompt cannot be held out; add prompts or name an eval source"


def _passes(source: Source, data: Data, need: RowKind, seed: int, count: Count, held_out: float) -> Iterator[Group]:
    """Training groups of a streamed source, repeated by its weight; only the first pass fills `count`."""
    whole, part = int(source.weight), source.weight - int(source.weight)
    for number in range(whole + bool(part)):
        counted = count if number == 0 else Count(source.path)
        for group in _groups_of(source, data, need, counted, refuse):
            if held_out and share(seed, "split", group.prompt) < held_out:
                continue
            if number < whole or share(seed, "weight", content(group)) < part:
                yield group
