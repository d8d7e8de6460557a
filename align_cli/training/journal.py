"""A journal of generated rows: each row is on disk as soon as it is made, so a kill loses only those in flight.

A phase is split into units that are the same on any number of ranks and after any kill, so that a row is always
generated in the same batch: rounding depends on the batch, and one different token would change all that follow. Each
rank appends its units to its own file; once all units are done, rank 0 writes the phase's file in row order.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from align_cli import distributed
from align_cli.errors import AlignError, Interrupted
from align_cli.run.directory import write_atomically
from align_cli.training.job import Job
from align_cli.training.stop import Stopped, StopRequest

Row = dict[str, Any]
Unit = Sequence[int]
"""Numbers of the rows that are made in one call."""
Make = Callable[[Unit], list[Row]]
PROGRESS_LINES = 10
"""Progress lines that a phase prints."""


class RowJournal:
    """The row files of one run."""

    def __init__(self, job: Job):
        self.job, self.folder = job, job.run.path
        self.stop = StopRequest("these rows")
        self._lock = threading.Lock()

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """A context in which Ctrl-C or SIGTERM ends the run after the current unit; a second signal ends it at once."""
        return self.stop.listening()

    # -- finished phases

    def file(self, name: str) -> Path:
        """Path of a finished phase's rows."""
        return self.folder / f"{name}.jsonl"

    def read(self, name: str) -> list[Row] | None:
        """The rows of a finished phase, on every rank; None if it is not finished."""
        return distributed.broadcast(
            read_rows(self.file(name)) if self.job.main and self.file(name).is_file() else None
        )

    def write(self, name: str, rows: Sequence[Row]) -> list[Row]:
        """Write a phase's file atomically. Returns the rows."""
        if self.job.main:
            write_atomically(self.file(name), "".join(_line(row) for row in rows))
        distributed.barrier()
        return list(rows)

    def remove(self, *names: str) -> None:
        """Remove the files of intermediate phases."""
        if self.job.main:
            for name in names:
                self.file(name).unlink(missing_ok=True)

    # -- phases in progress

    def fill(
        self,
        name: str,
        units: Sequence[Unit],
        make: Make,
        *,
        workers: int = 1,
        together: bool = False,
        label: str | None = None,
    ) -> list[Row]:
        """The rows of a phase, each with its number under `row`: rows of earlier attempts, and those that `make`
        returns for the missing units.

        `workers` units are made at a time. With `together`, all ranks make the same number of units, which ZeRO-3
        needs because its forward passes are collective. Raises Stopped on every rank if one received a signal, and
        AlignError on every rank if one raised it.
        """
        total = sum(map(len, units))
        if (done := self.read(name)) is not None and len(done) >= total:
            return done
        label = label or name.lstrip(".")
        kept = self._kept(name, units)
        missing = [unit for unit in units if not all(row in kept for row in unit)]
        if kept and missing:
            self.job.say(f"{label}: {len(kept)} of {total} rows exist from an earlier attempt")
        mine, errors, made = missing[self.job.rank :: self.job.ranks], [], {}
        try:
            if together:
                rows = self._made_together(name, mine, missing, make, total, label)
            else:
                results = _results(mine, make, workers, lambda: self.stop.received is not None)
                rows = self._recorded(name, mine, results, total, label)
            for row in rows:
                made[row["row"]] = row
        except AlignError as error:
            errors = list(error.lines)
        reports = distributed.gather((errors, self.stop.received, made))
        if lines := [line for theirs, _, _ in reports for line in theirs]:
            raise AlignError(*dict.fromkeys(lines))
        # every rank has the kept rows already
        every = kept | {number: row for _, _, theirs in reports for number, row in theirs.items()}
        signal = next((number for _, number, _ in reports if number), None)
        if signal and len(every) < total:
            raise Stopped(signal)
        ordered = self.write(name, [every[number] for number in sorted(every)])
        if self.job.main:
            for part in self._parts(name):
                part.unlink(missing_ok=True)
        if signal:
            raise Stopped(signal)
        return ordered

    def _made_together(
        self, name: str, mine: Sequence[Unit], missing: Sequence[Unit], make: Make, total: int, label: str
    ) -> Iterator[Row]:
        """Rows of this rank's units; a rank with fewer units than others repeats one and discards its rows."""

        def results() -> Iterator[list[Row]]:
            for number in range(-(-len(missing) // self.job.ranks)):
                if self.stop.on_any_rank() is not None:
                    return
                rows = make(mine[number] if number < len(mine) else missing[0])
                if number < len(mine):
                    yield rows

        yield from self._recorded(name, mine, results(), total, label)

    def _recorded(
        self, name: str, units: Sequence[Unit], results: Iterator[list[Row]], total: int, label: str
    ) -> Iterator[Row]:
        """The rows of this rank's units. Each unit is written to disk before its rows are yielded."""
        made, due, started = 0, 0.0, time.monotonic()
        own = sum(map(len, units))
        with self._part(name).open("a", encoding="utf-8") as stream:
            for rows in results:
                stream.write("".join(map(_line, rows)))
                stream.flush()
                os.fsync(stream.fileno())
                made += len(rows)
                yield from rows
                if made >= due or made == own:
                    due = made + own / PROGRESS_LINES
                    pace = made / max(time.monotonic() - started, 1e-9)
                    self.job.say(f"{label} {total - own + made}/{total} · {pace * self.job.ranks:.1f} rows/s")

    def _part(self, name: str) -> Path:
        return self.folder / f".{name.lstrip('.')}.part-{self.job.rank}.jsonl"

    def _parts(self, name: str) -> list[Path]:
        return sorted(self.folder.glob(f".{name.lstrip('.')}.part-*.jsonl"))

    def _kept(self, name: str, units: Sequence[Unit]) -> dict[int, Row]:
        """Rows of complete units from earlier attempts on any number of ranks. Rows of incomplete units are dropped."""
        by_number: dict[int, Row] = {}
        # the phase's own file may be incomplete, too
        for part in [self.file(name), *self._parts(name)] if self.job.main else ():
            by_number |= {row["row"]: row for row in read_rows(part)} if part.is_file() else {}
        by_number = distributed.broadcast(by_number)
        whole = {row for unit in units if all(number in by_number for number in unit) for row in unit}
        for part in self._parts(name) if self.job.main else ():
            rows = [row for row in read_rows(part) if row["row"] in whole]
            write_atomically(part, "".join(map(_line, rows)))
        distributed.barrier()
        return {number: row for number, row in by_number.items() if number in whole}

    # -- token usage of generators

    def spend(self, who: str, used: dict[str, int]) -> None:
        """Record a generator's token usage on disk, so that it survives a kill."""
        file = self.folder / f".usage-{self.job.rank}.jsonl"
        with self._lock, file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"who": who} | used) + "\n")

    def spent(self) -> dict[str, dict[str, int]]:
        """Token usage of every generator, over all ranks and all attempts."""
        # another host's new file may not be in this host's listing yet, so each rank reads its own
        pattern = ".usage-*.jsonl" if self.job.main else f".usage-{self.job.rank}.jsonl"
        files = {file.name: file.read_text(encoding="utf-8") for file in self.folder.glob(pattern)}
        totals: dict[str, Counter[str]] = {}
        for text in {name: text for theirs in distributed.gather(files) for name, text in theirs.items()}.values():
            for line in text.splitlines():
                with contextlib.suppress(ValueError):
                    used = json.loads(line)
                    totals.setdefault(used.pop("who"), Counter()).update(used)
        return {who: dict(sorted(counts.items())) for who, counts in sorted(totals.items())}


def read_rows(file: Path) -> list[Row]:
    """The rows of a file; lines that a kill left incomplete are skipped."""
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


def _results(units: Sequence[Unit], make: Make, workers: int, stopping: Callable[[], bool]) -> Iterator[list[Row]]:
    """What `make` returns for each unit, in order of completion. No unit starts once `stopping()` is true; if one
    fails, the results of units that are already running are still yielded before the error is raised."""
    if workers == 1:
        for unit in units:
            if stopping():
                return
            try:
                yield make(unit)
            except Interrupted:
                return
        return
    waiting, running, failed = list(reversed(units)), set(), None
    with ThreadPoolExecutor(workers) as pool:
        while running or (waiting and not stopping() and failed is None):
            while waiting and len(running) < workers and not stopping() and failed is None:
                running.add(pool.submit(make, waiting.pop()))
            done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                if error := future.exception():
                    # what was asked when a signal came is asked again by the next attempt
                    failed = failed or (None if isinstance(error, Interrupted) else error)
                else:
                    yield future.result()
    if failed is not None:
        raise failed
