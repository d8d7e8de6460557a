"""Sources -> rows: one iterator over JSON, JSON lines, CSV, Parquet, `datasets` directories and hub ids.

Nothing but one row, or one Parquet batch, is held in memory. A row comes with its place (`data/pairs.jsonl:17`,
`data/pairs.parquet#17`), which every later message about it names. What is broken goes to `report`, one line each, so
that a caller can collect all of it; without one the first broken thing raises.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from align_cli.data.columns import renamed
from align_cli.errors import DataError
from align_cli.recipe.sections import Source

Report = Callable[[str], None]
Row = dict[str, Any]

READABLE = (".json", ".jsonl", ".csv", ".parquet")
OTHER_FILES = (".txt", ".tsv", ".arrow", ".gz", ".zst", ".zip", ".xlsx", ".yaml", ".ndjson")
"""Suffixes that mark a path as a file of a kind we do not read, where a hub id could also be meant."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
CHUNK = 1 << 20  # bytes read at a time from a JSON array
BLANKS = re.compile(r"\s*")
DECODER = json.JSONDecoder()
CSV_JSON = ("messages", "conversations", "responses", "scores")  # lists; a CSV cell holds them as JSON


def refuse(line: str) -> NoReturn:
    """The `report` of a caller that stops at the first broken thing: raises DataError."""
    raise DataError(line)


def is_local(source: Source) -> bool:
    """Whether the source is meant to be on this machine; everything else is a hub id."""
    path = source.path
    if Path(path).expanduser().exists() or path.startswith((".", "/", "~")) or not HUB_ID.fullmatch(path):
        return True
    # `data/pairs` without a suffix is a slip of the pen, not a hub id, where there is a directory data/.
    return path.lower().endswith(READABLE + OTHER_FILES) or ("/" in path and Path(path.split("/")[0]).is_dir())


def read_rows(
    source: Source, report: Report = refuse, *, max_bytes: int | None = None, streaming: bool = False
) -> Iterator[tuple[str, Row]]:
    """(place, row) of every row, with `source.columns` applied; at most about `max_bytes` of a local file are read.

    Raises DataError, or calls `report` and goes on, for a missing file, broken JSON, a row that is no object.
    """
    path = Path(source.path).expanduser()
    if not is_local(source):
        rows = _hub_rows(source, report, streaming)
    elif path.is_dir():
        rows = _directory_rows(source, path, report, max_bytes)
    elif not path.exists():
        return report(_missing(source.path))
    elif path.suffix.lower() not in READABLE:
        return report(f"{source.path}: cannot read a '{path.suffix}' file; convert it to one of {', '.join(READABLE)}")
    else:
        rows = _file_rows(source.path, path, report, max_bytes)
    yield from renamed(rows, source, report)


def fingerprint(source: Source) -> str:
    """sha256 of a file's bytes, or of a directory's file names and bytes; `hub:<id>@<revision>:<split>` of a hub id.

    The revision is the one in the local hub cache, `unknown` without one; the network is not touched. Raises DataError
    for a missing file.
    """
    path = Path(source.path).expanduser()
    if not is_local(source):
        return f"hub:{source.path}@{_cached_revision(source.path)}:{source.split}"
    if not path.exists():
        raise DataError(_missing(source.path))
    if path.is_file():
        return _sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listed = "".join(f"{file.relative_to(path).as_posix()}\n{_sha256(file)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached_revision(hub_id: str) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    ref = Path(HF_HUB_CACHE, f"datasets--{hub_id.replace('/', '--')}", "refs", "main")
    return ref.read_text().strip() if ref.is_file() else "unknown"


def _missing(path: str) -> str:
    """The line for a file that is not there, with the nearest one that is."""
    wanted = Path(path).expanduser()
    where = "" if wanted.is_absolute() else " (looked in the working directory)"
    folders = [folder for folder in dict.fromkeys((wanted.parent, Path(), Path("data"))) if folder.is_dir()]
    found = [str(f) for folder in folders for f in sorted(folder.iterdir()) if f.suffix.lower() in READABLE]
    near = get_close_matches(path, found, n=1) or [file for file in found if Path(file).name == wanted.name]
    if near:
        return f"{path}: no such file; did you mean '{near[0]}'?{where}"
    there = f"there is {', '.join(found[:5])}" if found else "mend the path in data.train or data.eval"
    return f"{path}: no such file{where}; {there}"


def _file_rows(name: str, path: Path, report: Report, max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    try:
        match path.suffix.lower():
            case ".csv":
                yield from _csv_rows(name, path, report, max_bytes)
            case ".parquet":
                yield from _parquet_rows(name, path, report, max_bytes)
            case ".json" if _opens_array(path):
                yield from _array_rows(name, path, report, max_bytes)
            case _:
                yield from _line_rows(name, path, report, max_bytes)
    except UnicodeDecodeError as error:
        report(f"{name}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8")
    except OSError as error:
        report(f"{name}: cannot be read ({error.strerror or error}); mend the file or its permissions")


def _opens_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(CHUNK).decode("utf-8-sig", "replace").lstrip().startswith("[")


def _line_rows(name: str, path: Path, report: Report, max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    budget = max_bytes if max_bytes is not None else float("inf")
    with path.open("rb") as file:  # bytes: text mode would also end lines at a lone \r inside a string
        for number, line in enumerate(file, 1):
            if budget <= 0:
                return
            budget -= len(line)
            place = f"{name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                if text:
                    yield place, json.loads(text)
            except json.JSONDecodeError as error:
                report(f"{place}: not valid JSON ({error.msg} at column {error.colno}); mend or remove the line")
            except ValueError as error:
                report(f"{place}: not valid JSON in UTF-8 ({error}); mend or remove the line")


def _array_rows(name: str, path: Path, report: Report, max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON array, decoded one by one from a text that grows only while it holds no whole row."""
    size = path.stat().st_size
    limit = size if max_bytes is None else min(size, max_bytes)
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(CHUNK)
        at, read, number = text.index("[") + 1, len(text), 0
        while True:
            try:
                element = _next_element(text, at, first=number == 0)
            except json.JSONDecodeError as error:
                more = file.read(max(CHUNK, len(text) - at)) if read < limit else ""
                if not more:
                    if limit == size:  # otherwise it was us who cut the array
                        report(f"{name}#{number + 1}: not valid JSON ({error.msg}); mend the file from this row on")
                    return
                text, at, read = text[at:] + more, 0, read + len(more)
                continue
            if element is None:
                return
            row, at = element
            number += 1
            yield f"{name}#{number}", row


def _next_element(text: str, at: int, first: bool) -> tuple[Any, int] | None:
    """(element, where it ends), or None at the closing bracket; JSONDecodeError where the text ends or is broken."""
    at = BLANKS.match(text, at).end()
    if text.startswith("]", at):
        return None
    if not first:
        if not text.startswith(",", at):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = BLANKS.match(text, at + 1).end()
    return DECODER.raw_decode(text, at)


def _csv_rows(name: str, path: Path, report: Report, max_bytes: int | None) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit((1 << 31) - 1)  # the default refuses long conversations
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(_whole_records(file, max_bytes))
        header = next(reader, [])
        if twice := sorted({column for column in header if header.count(column) > 1}):
            return report(f"{name}:1: the column '{twice[0]}' is there twice; rename one")
        while header:
            place = f"{name}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                report(f"{place}: not valid CSV ({error}); mend or remove the record")
                continue
            if cells is None:
                return
            if cells and len(cells) != len(header):
                report(f"{place}: {len(cells)} cells under {len(header)} columns; quote cells that hold commas")
            elif cells:
                yield place, {column: _cell(column, cell) for column, cell in zip(header, cells, strict=True)}


def _whole_records(lines: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """Lines up to max_bytes, and on to the end of a record: quotes come in pairs outside of a quoted cell."""
    read, quotes = 0, 0
    for line in lines:
        if max_bytes is not None and read >= max_bytes and quotes % 2 == 0:
            return
        read, quotes = read + len(line), quotes + line.count('"')
        yield line


def _cell(column: str, cell: str) -> Any:
    try:
        return json.loads(cell) if column in CSV_JSON else cell
    except ValueError:
        return cell


def _parquet_rows(name: str, path: Path, report: Report, max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number, read = 0, 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=512):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}#{number}", row
                read += batch.nbytes
                if max_bytes is not None and read >= max_bytes:
                    return
    except ArrowException as error:
        report(f"{name}: not a readable Parquet file ({_first_line(error)}); write it again")


def _directory_rows(source: Source, path: Path, report: Report, max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return report(f"{source.path}: a directory, but none that `save_to_disk` wrote; name a file in it")
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # whatever datasets meets in a damaged directory
        return report(f"{source.path}: not a readable datasets directory ({_first_line(error)}); save it again")
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
        for number, row in enumerate(load_dataset(source.path, split=source.split, streaming=streaming), 1):
            yield f"{source.path}#{number}", row
    except Exception as error:  # network, hub, cache and builder errors are all for the user to mend
        remedy = "check the id and the split, or name a local file (there is none of this name)"
        report(f"{source.path}: cannot be loaded from the hub ({_first_line(error)}); {remedy}")


def _first_line(error: Exception) -> str:
    return [*str(error).splitlines(), type(error).__name__][0]
