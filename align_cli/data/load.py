"""Sources -> rows: one iterator over JSON, JSON lines, CSV, Parquet, `datasets` directories and hub ids.

Only one row, or one Parquet batch, is held in memory. Each row comes with its place (`data/pairs.jsonl:17`,
`data/pairs.parquet#17`), which every later message about it names. Problems go to `report`, one line each, so that the
caller can collect all of them; by default, the first problem raises. If none of a file's first rows can be read, the
file gets one line, not one per row.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from lzma import LZMAError
from pathlib import Path
from typing import Any, NoReturn

from align_cli.data.columns import renamed
from align_cli.data.files import PACKED, files, find, fingerprint, is_local
from align_cli.data.rows import Fault, NotRows, file_rows, first_line, is_pointer, opened, packing
from align_cli.errors import DataError
from align_cli.recipe.sections import Source

__all__ = ["Report", "Row", "files", "fingerprint", "is_local", "read_rows", "refuse"]

Report = Callable[[str], None]
Row = dict[str, Any]

FIRST = 5
"""If so many first rows of a file are all broken, it is reported as a file of another kind."""


def refuse(line: str) -> NoReturn:
    """The default `report`: stops at the first problem. Raises DataError."""
    raise DataError(line)


def read_rows(
    source: Source, report: Report = refuse, *, max_bytes: int | None = None, streaming: bool = False
) -> Iterator[tuple[str, Row]]:
    """(place, row) of every row, with `source.columns` applied; at most about `max_bytes` of a local source are read,
    in equal parts from each of its files.

    Calls `report` and continues for a missing file, broken JSON, or a row that is not an object; the default `report`
    raises DataError.
    """
    rows = _local_rows(source, report, max_bytes) if is_local(source) else _hub_rows(source, report, streaming)
    yield from renamed(rows, source, report)


def _local_rows(source: Source, report: Report, max_bytes: int | None) -> Iterator[tuple[str, Row]]:
    located = find(source)
    if located.problem:
        return report(located.problem)
    if located.saved:
        yield from _saved_rows(source, located.root, report, max_bytes)
        return
    each = None if max_bytes is None else max(1, max_bytes // len(located.files))
    pointers = []
    for path in located.files:
        name = source.path if located.root is None else str(path)
        try:
            if is_pointer(path):
                pointers.append(name)
                continue
            yield from _objects(name, file_rows(name, path, each), report)
        except NotRows as error:
            report(f"{name}: {error}")
        except UnicodeDecodeError as error:
            report(_not_text(name, path, error))
        except (OSError, EOFError, zlib.error, LZMAError) as error:
            report(f"{name}: {_damage(path, error)}")
    if len(pointers) == 1:
        report(f"{pointers[0]}: is a git-lfs pointer; run `git lfs pull` there")
    elif pointers:
        of = f"{len(pointers)} of {len(located.files)} files are git-lfs pointers, the first {pointers[0]}"
        report(f"{source.path}: {of}; run `git lfs pull` there")


def _objects(name: str, rows: Iterator[tuple[str, Any]], report: Report) -> Iterator[tuple[str, Row]]:
    """The rows that are objects. Reports every other row, or the whole file if none of its first rows is an object."""
    broken: list[tuple[str, Fault]] = []
    read = False
    for place, row in rows:
        if not isinstance(row, (dict, Fault)):
            row = Fault(f"the row is a {type(row).__name__}, not an object", 'write {"column": value, …}')
        if isinstance(row, Fault):
            broken.append((place, row))
            if not read and len(broken) == FIRST:
                break
        else:
            read = True
        if read:
            for at, fault in broken:
                report(f"{at}: {fault.finding}; {fault.remedy}")
            broken = []
        if isinstance(row, dict):
            yield place, row
    if len(broken) == 1:
        ((place, fault),) = broken
        report(f"{place}: {fault.finding}; {fault.remedy}")
    elif broken:
        fault = broken[0][1]
        shown = (
            f"'{fault.text[:40].rstrip()}…' is "
            if len(fault.text) > 40
            else f"'{fault.text}' is "
            if fault.text
            else ""
        )
        remedy = fault.remedy_of_all or fault.remedy
        report(f"{name}: none of its first {len(broken)} rows can be read ({shown}{fault.finding}); {remedy}")


def _saved_rows(source: Source, path: Path, report: Report, max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # datasets raises errors of any type for a damaged directory
        return report(f"{source.path}: not a readable datasets directory ({first_line(error)}); save it again")
    if isinstance(saved, DatasetDict):
        if source.split not in saved:
            return report(f"{source.path}: no split '{source.split}'; set split to one of {', '.join(saved)}")
        saved = saved[source.split]
    within = None if max_bytes is None else 1 + len(saved) * max_bytes // max(saved.data.nbytes, 1)
    for number, row in enumerate(islice(saved, within), 1):
        yield f"{source.path}#{number}", row


def _hub_rows(source: Source, report: Report, streaming: bool) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        part = {"name": source.subset, "data_dir": source.data_dir, "revision": source.revision}
        part = {key: value for key, value in part.items() if value is not None}
        rows = load_dataset(source.path, split=source.split, streaming=streaming, **part)
        for number, row in enumerate(rows, 1):
            yield f"{source.path}#{number}", row
    except Exception as error:  # network, hub, cache and builder errors are all for the user to correct
        remedy = "check the id, split, subset, data_dir and revision, or name a local file (none has this name)"
        report(f"{source.path}: cannot be loaded from the hub ({first_line(error)}); {remedy}")


def _not_text(name: str, path: Path, error: UnicodeDecodeError) -> str:
    """The line for bytes that are invalid in the file's encoding."""
    if path.suffix.lower() in PACKED and not packing(path):
        return f"{name}: is not a {path.suffix} archive, although its name says so; fetch or write it again"
    if not error.encoding.lower().startswith("utf-8"):
        mark = "although it starts with that byte order mark"
        return f"{name}: not {error.encoding.upper()} ({error.reason}), {mark}; save it as UTF-8"
    with opened(path) as file:
        number, bad = next((number, at) for number, line in enumerate(file, 1) if (at := _undecodable(line)))
    return f"{name}:{number}: not UTF-8 (byte {bad}); save the file as UTF-8, e.g. `iconv -f WINDOWS-1252 -t UTF-8`"


def _undecodable(line: bytes) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"0x{line[error.start]:02x} at column {error.start + 1}"
    return ""


def _damage(path: Path, error: Exception) -> str:
    """The problem of a file whose bytes cannot be read, and the remedy."""
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read ({error.strerror}); correct the file or its permissions"
    return f"a damaged {packing(path) or 'file'} ({first_line(error)}); fetch or write it again"
