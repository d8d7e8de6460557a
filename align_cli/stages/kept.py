"""Rows that are kept as they are made: a kill loses those in flight, and the same command makes what is missing.

A phase is cut into units, the same on any number of ranks and after any kill, so that a row is always made beside the
same others: batches round differently, and one token that differs would change all that follows. Each rank appends its
units to a file of its own; when all are there, rank 0 writes the phase's file in the order of rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from align_cli.errors import AlignError
from align_cli.run.directory import write_atomically
from align_cli.stages.job import Job

Row = dict[str, Any]
LINES = 10
"""Lines of progress that a phase prints."""


class Stopped(Exception):
    """A signal ended the run between two units; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Kept:
    """The row files of one run."""

    def __init__(self, job: Job):
        self.job, self.folder = job, job.run.path
        self.received: int | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the unit in hand; a second signal ends it at once."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        sys.stderr.write(f"\n{signal.Signals(number).name}: stopping after these rows; once more stops at once\n")

    def file(self, name: str) -> Path:
        """Where a finished phase's rows are."""
        return self.folder / f"{name}.jsonl"

    def read(self, name: str) -> list[Row] | None:
        """The rows of a finished phase, on every rank; None if it is not finished."""
        return self.share(read_rows(self.file(name)) if self.job.main and self.file(name).is_file() else None)

    def write(self, name: str, rows: Sequence[Row]) -> list[Row]:
        """Write a phase's file, whole or not at all. Returns the rows."""
        if self.job.main:
            write_atomically(self.file(name), "".join(_line(row) for row in rows))
        self.share(None)
        return list(rows)

    def forget(self, *names: str) -> None:
        """Remove files of phases on the way to one that is written."""
        if self.job.main:
            for name in names:
                self.file(name).unlink(missing_ok=True)

    def fill(
        self, name: str, units: Sequence[Sequence[int]], make: Callable[[Sequence[int]], list[Row]], *, workers: int = 1
    ) -> list[Row]:
        """The rows of a phase, each with its number under `row`: those kept before, and those that `make` returns for
        the units that are missing, `workers` units at a time.

        Raises Stopped on every rank when one was told to stop, and AlignError on every rank when one met it.
        """
        if (done := self.read(name)) is not None:
            return done
        kept = self._kept(name, units)
        missing = [unit for unit in units if not all(row in kept for row in unit)]
        total = sum(map(len, units))
        if kept and missing:
            self.job.say(f"{name.lstrip('.')}: {len(kept)} of {total} rows are there already")
        mine, errors = missing[self.job.rank :: self.job.ranks], []
        try:
            for row in self._made(name, mine, make, workers, total):
                kept[row["row"]] = row
        except AlignError as error:
            errors = list(error.lines)
        told = self.gather((errors, self.received, kept))
        if found := [line for lines, _, _ in told for line in lines]:
            raise AlignError(*dict.fromkeys(found))
        if stopped := next((number for _, number, _ in told if number), None):
            raise Stopped(stopped)
        rows = {number: row for _, _, theirs in told for number, row in theirs.items()}
        ordered = self.write(name, [rows[number] for number in sorted(rows)])
        for part in self.folder.glob(f".{name.lstrip('.')}.part-*.jsonl"):
            part.unlink(missing_ok=True)
        return ordered

    def _made(self, name: str, units: Any, make: Any, workers: int, total: int) -> Iterator[Row]:
        """Rows of this rank's units, each unit on disk before its rows are handed on."""
        made, due, started = 0, 0.0, time.monotonic()
        own = sum(map(len, units))
        with self._part(name).open("a", encoding="utf-8") as stream:
            for rows in _results(units, make, workers, lambda: self.received is not None):
                stream.write("".join(map(_line, rows)))
                stream.flush()
                os.fsync(stream.fileno())
                made += len(rows)
                yield from rows
                if made >= due or made == own:
                    due = made + own / LINES
                    pace = made / max(time.monotonic() - started, 1e-9)
                    self.job.say(
                        f"{name.lstrip('.')} {total - own + made}/{total} · {pace * self.job.ranks:.1f} rows/s"
                    )

    def _part(self, name: str) -> Path:
        return self.folder / f".{name.lstrip('.')}.part-{self.job.rank}.jsonl"

    def _kept(self, name: str, units: Sequence[Sequence[int]]) -> dict[int, Row]:
        """Rows of whole units that earlier runs, of any number of ranks, left. What a kill tore goes."""
        found: dict[int, Row] = {}
        for part in sorted(self.folder.glob(f".{name.lstrip('.')}.part-*.jsonl")):
            found |= {row["row"]: row for row in read_rows(part)}
        # hosts need not share a file system
        found = {number: row for theirs in self.gather(found) for number, row in theirs.items()}
        whole = {row for unit in units if all(number in found for number in unit) for row in unit}
        if (own := self._part(name)).is_file():
            rows = [row for row in read_rows(own) if row["row"] in whole]
            write_atomically(own, "".join(map(_line, rows)))
        self.share(None)
        return {number: row for number, row in found.items() if number in whole}

    def spend(self, who: str, used: dict[str, int]) -> None:
        """Note what a speaker used, on disk, so that a killed run's bill is not forgotten."""
        file = self.folder / f".usage-{self.job.rank}.jsonl"
        with self._lock, file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"who": who} | used) + "\n")

    def spent(self) -> dict[str, dict[str, int]]:
        """What every speaker used, over all ranks and all attempts."""
        files = {file.name: file.read_text(encoding="utf-8") for file in self.folder.glob(".usage-*.jsonl")}
        totals: dict[str, Counter[str]] = {}
        for text in {name: text for theirs in self.gather(files) for name, text in theirs.items()}.values():
            for line in text.splitlines():
                with contextlib.suppress(ValueError):
                    used = json.loads(line)
                    totals.setdefault(used.pop("who"), Counter()).update(used)
        return {who: dict(sorted(counts.items())) for who, counts in sorted(totals.items())}

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.job.ranks == 1:
            return [value]
        held = [None] * self.job.ranks
        torch.distributed.all_gather_object(held, value)
        return held

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank, once all have come here."""
        return self.gather(value)[0]


def read_rows(file: Path) -> list[Row]:
    """The rows of a file; a line that a kill tore is left out."""
    rows = []
    for line in file.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("row"), int):
            rows.append(row)
    return rows


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _results(units: Any, make: Any, workers: int, stopping: Callable[[], bool]) -> Iterator[list[Row]]:
    """What `make` returns for each unit, in the order in which they are done; none is begun once it is `stopping`, and
    what is done when one fails is still handed on."""
    if workers == 1:
        for unit in units:
            if stopping():
                return
            yield make(unit)
        return
    waiting, running, failed = list(reversed(units)), set(), None
    with ThreadPoolExecutor(workers) as pool:
        while running or (waiting and not stopping() and failed is None):
            while waiting and len(running) < workers and not stopping() and failed is None:
                running.add(pool.submit(make, waiting.pop()))
            done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                if error := _error(future):
                    failed = failed or error
                else:
                    yield future.result()
    if failed is not None:
        raise failed


def _error(future: Future) -> BaseException | None:
    return future.exception()
