"""Rows that are prepared once: rank 0 writes them into Arrow files, which every rank, and every later run with the same
key, maps into memory.

An entry of the cache is the folder `<cache>/rows/<key>/`, with a file for each table and `report.json`, which holds
what a run prints and records about the rows. It is written under another name and renamed when it is complete, so a
kill or a second process never leaves a half-written one to be read. The key is a hash of everything that the rows
depend on: bytes of the sources, data settings, tokenizer, chat template and its date, settings of the stage, versions.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

import align_cli.data
from align_cli import distributed
from align_cli.data.groups import Count
from align_cli.data.load import fingerprint
from align_cli.errors import DataError, LaunchError
from align_cli.recipe.sections import Data
from align_cli.run import manifest
from align_cli.training.job import Job

FORMAT = 1
"""Version of an entry's files, and of the code outside of `align_cli/data` that makes rows."""
LIBRARIES = ("align-cli", "transformers", "tokenizers", "trl", "jinja2")
KEPT = 32 << 30
"""Bytes of entries that stay in the cache; the least recently used ones beyond that are removed."""
IN_USE = 7 * 86400
"""Seconds since an entry was last used within which it is never removed, since a run may still read it."""
BATCH = 256
"""Rows that are held as Python objects at a time."""
VISIBLE = 120
"""Seconds within which an entry must be visible to all hosts, whose view of a network file system may be older."""
REPORT = "report.json"
INTS = pyarrow.list_(pyarrow.int32())
TYPES = {
    "responses": pyarrow.list_(INTS),
    "grades": pyarrow.list_(pyarrow.float64()),
    "probability": pyarrow.float64(),
    "label": pyarrow.bool_(),
}
"""Types of columns that are not lists of integers."""

Row = dict[str, Any]
Arranged = Callable[[str, Dataset], Dataset]
"""(name of a table, its rows in order) -> its rows as the trainer takes them, packed for example."""


@dataclass
class Report:
    """What a run prints and records about prepared rows, whether it prepared them itself or not."""

    counts: list[Count]
    lines: list[str] = field(default_factory=list)
    """Printed lines."""
    counted: dict[str, int] = field(default_factory=dict)
    """Further counts of the stage."""


@dataclass
class Entry:
    """Prepared rows."""

    folder: Path
    report: Report

    def table(self, name: str) -> Dataset | None:
        """The rows of a table, mapped into memory; None if the entry has no such table."""
        file = self.folder / f"{name}.arrow"
        return Dataset.from_file(str(file)) if file.is_file() else None


class Writer:
    """Writes the tables and collects the printed lines of a new entry."""

    def __init__(self, job: Job, folder: Path):
        self.job, self.folder = job, folder
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        """Print a line, now and in every run that reads the entry."""
        self.job.say(line)
        self.lines.append(line)

    def write(
        self,
        name: str,
        rows: Iterable[Row],
        seed: int | None = None,
        arranged: Arranged | None = None,
        schema: pyarrow.Schema | None = None,
    ) -> int:
        """Write a table, with its rows in the order that `random.Random(seed).shuffle` gives a list of them (None: as
        they come), and then as `arranged` returns them. Columns have the types of `schema`, or of TYPES. Returns the
        number of rows. No more than a batch of them is in memory at a time."""
        file, before = self.folder / f"{name}.arrow", self.folder / f"{name}.before"
        number = _write(before, _batches(rows, schema))
        if not number:
            before.unlink()
            return 0
        before.replace(file)
        if seed is not None:
            order = list(range(number))
            random.Random(seed).shuffle(order)
            self._rewrite(file, before, lambda name, rows: rows.select(order))
        if arranged is not None:
            self._rewrite(file, before, arranged)
        return number

    def _rewrite(self, file: Path, before: Path, arranged: Arranged) -> None:
        file.replace(before)
        _write(file, _tables(arranged(file.stem, Dataset.from_file(str(before)))))
        for left in (before, *self.folder.glob("cache-*")):  # `Dataset.map` writes the latter
            left.unlink()


def inferred(rows: Iterable[Row]) -> pyarrow.Schema:
    """The types of columns whose cells are objects or text, from all rows, as `Dataset.from_list` finds them."""
    rows, schema = iter(rows), pyarrow.schema([])
    while part := list(islice(rows, BATCH)):
        found = pyarrow.Table.from_pylist(part).schema
        schema = pyarrow.unify_schemas([schema, found], promote_options="permissive")
    return schema


def prepare(
    job: Job,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    settings: dict[str, Any],
    make: Callable[[Writer], Report],
) -> Entry:
    """The entry for these data and settings, the same on every rank: one that exists, or a new one that `make` writes.

    `make(writer)` is called on rank 0 only, with all other ranks waiting. `settings` are all values besides `data` and
    `tokenizer` that its rows depend on, as JSON. Raises DataError on every rank if `make` raises it.
    """
    root = job.cache / "rows"

    def found_or_made() -> Path:
        parts = [_tokenizer(tokenizer), _data(data), settings, job.recipe.seed]
        if (folder := root / _key(parts, _fingerprints(data))).is_dir():
            os.utime(folder)
            for line in _report(folder).lines:
                job.say(line)
            return folder
        root.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
        try:
            writer = Writer(job, new)
            report = make(writer)
            report.lines = writer.lines
            (new / REPORT).write_text(json.dumps(asdict(report)), encoding="utf-8")
            # of the bytes that were read, even if a file changed just before or a hub id was fetched only now
            folder = root / _key(parts, [count.fingerprint for count in report.counts])
            _place(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        prune(root)
        return folder

    folder = distributed.from_rank_0(found_or_made)
    until = time.monotonic() + VISIBLE
    while not (folder / REPORT).is_file():
        if time.monotonic() > until:
            raise LaunchError(
                f"{folder}: rank 0 wrote the rows there, but rank {job.rank} cannot see them; start the run in a "
                "folder that all hosts share"
            )
        time.sleep(0.5)
    return Entry(folder, _report(folder))


def prune(root: Path) -> None:
    """Remove the least recently used entries beyond KEPT bytes, and what killed runs left half-written; nothing that
    was used within IN_USE seconds."""
    now, total = time.time(), 0
    used = sorted(((folder.stat().st_mtime, folder) for folder in root.iterdir() if folder.is_dir()), reverse=True)
    for last, folder in used:
        total += sum(file.stat().st_size for file in folder.iterdir())
        if now - last > IN_USE and (total > KEPT or folder.name.startswith(".")):
            shutil.rmtree(folder, ignore_errors=True)


def _place(new: Path, folder: Path) -> None:
    """Rename a complete entry to its place, unless another process was faster."""
    for file in new.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    new.chmod(0o777 & ~_umask())  # mkdtemp lets nobody else read it
    try:
        new.rename(folder)
    except OSError:
        if not (folder / REPORT).is_file():
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _report(folder: Path) -> Report:
    saved = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return Report(**saved | {"counts": [Count(**count) for count in saved["counts"]]})


# -- the key


def _key(parts: list[Any], fingerprints: list[str]) -> str:
    # a hub id whose commit is not known may be other rows next time
    unknown = [uuid.uuid4().hex for one in fingerprints if "@unknown:" in one]
    everything = [unknown, FORMAT, [manifest.version_of(name) for name in LIBRARIES], _code(), fingerprints, parts]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _code() -> str:
    """Hash of the code that turns files into rows."""
    digest = hashlib.sha256()
    for file in sorted(Path(align_cli.data.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _data(data: Data) -> dict[str, Any]:
    """The settings of a data section that rows depend on."""
    return {name: value for name, value in asdict(data).items() if name != "batch_size"}


def _fingerprints(data: Data) -> list[str]:
    """Of every source; empty if one of them cannot be read, which reading them reports better."""
    try:
        return [fingerprint(source) for source in data.train + (data.eval if isinstance(data.eval, list) else [])]
    except DataError:
        return []


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Everything in a tokenizer that decides about the ids of a conversation."""
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    return [type(tokenizer).__name__, vocabulary, tokenizer.chat_template, tokenizer.special_tokens_map]


# -- files


def _batches(rows: Iterable[Row], schema: pyarrow.Schema | None) -> Iterator[pyarrow.RecordBatch]:
    rows = iter(rows)
    while part := list(islice(rows, BATCH)):
        if schema is None:
            schema = pyarrow.schema([(name, TYPES.get(name, INTS)) for name in part[0]])
        yield pyarrow.RecordBatch.from_pylist(part, schema)


def _tables(rows: Dataset) -> Iterator[pyarrow.RecordBatch]:
    for table in rows.with_format("arrow").iter(BATCH):
        # rows that were picked one by one would be a batch each
        yield from table.combine_chunks().to_batches()


def _write(file: Path, batches: Iterable[pyarrow.RecordBatch]) -> int:
    """Write batches into an Arrow file. Returns the number of rows; without rows, the file stays empty."""
    number, writer = 0, None
    with file.open("wb") as stream:
        for batch in batches:
            if writer is None:
                writer = pyarrow.ipc.new_stream(stream, batch.schema)
            writer.write_batch(batch)
            number += batch.num_rows
        if writer is not None:
            writer.close()
    return number
