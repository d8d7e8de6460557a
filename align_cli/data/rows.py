"""One file -> its rows: JSON, JSON lines, CSV or Parquet, compressed or not, in the encoding of its byte order mark.

Only one row, or one Parquet batch, is held in memory. Each row comes with its place: `pairs.jsonl:17` is a line,
`pairs.parquet#17` a row.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

from align_cli.data.files import PACKED, kind

LFS = b"version https://git-lfs"
CHUNK = 1 << 20  # characters read at a time from a JSON array
OBJECT = 64 << 20  # characters read to distinguish one object over many lines from broken lines
BLANKS = re.compile(r"\s*")
CSV_JSON = ("messages", "conversations", "responses", "scores")  # lists; a CSV cell holds them as JSON
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


class NotRows(Exception):
    """The file cannot be read any further; the message has finding and remedy, without the file's name."""


@dataclass
class Fault:
    """Placeholder for a row that cannot be read."""

    finding: str
    remedy: str
    remedy_of_all: str = ""
    """Remedy if no row of the file can be read; `remedy` if empty."""
    text: str = ""
    """The row's text."""


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed in JSON, null is")


DECODER = json.JSONDecoder(parse_constant=_no_number)


def file_rows(name: str, path: Path, max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    """(place, row or Fault) of every row. Raises NotRows, and the decoders' errors for broken bytes."""
    suffix = kind(path)
    with path.open("rb") as file:
        parquet = suffix == ".parquet" or file.read(4) == b"PAR1"
    if parquet:
        yield from _parquet_rows(name, path, max_bytes)
        return
    if suffix in (".csv", ".tsv"):
        with _text(path, newline="") as file:
            yield from _csv_rows(name, file, suffix, max_bytes)
        return
    with _text(path) as file:
        array = _opens_array(file.read(CHUNK))
    with _text(path) as file:  # lines end only at \n: a lone \r may occur inside a string
        if array:
            yield from _array_rows(name, file, max_bytes)
        else:
            yield from _line_rows(name, file, path, max_bytes)


def _text(path: Path, newline: str = "\n") -> TextIO:
    with opened(path) as stream:
        first = stream.read(4)
    if encoding(first) == "utf-8-sig" and b"\0" in first:
        raise NotRows("not UTF-8 text, it holds zero bytes (UTF-16 without its byte order mark?); save it as UTF-8")
    return io.TextIOWrapper(opened(path), encoding=encoding(first), newline=newline)


def _opens_array(text: str) -> bool:
    """Whether a text is one JSON array, not JSON lines each of which is an array."""
    line, _, rest = text.lstrip().partition("\n")
    if not line.startswith("[") or not rest.strip():
        return line.startswith("[")
    try:
        DECODER.decode(line)
    except (ValueError, RecursionError):
        return True
    return False


def _line_rows(name: str, file: TextIO, path: Path, max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    budget = max_bytes if max_bytes is not None else float("inf")
    first = True
    for number, line in enumerate(file, 1):
        if budget <= 0:
            return
        budget -= len(line)
        text = line.rstrip()
        if not text:
            continue
        try:
            row = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            if first and text.lstrip().startswith("{"):
                _refuse_objects_over_lines(path)
            row = Fault(
                _fault(error), "correct or remove the line", 'write one {"column": value, …} a line', text.lstrip()
            )
        first = False
        yield f"{name}:{number}", row


def _fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    if isinstance(error, RecursionError):
        return "not valid JSON (nested too deeply)"
    return f"not valid JSON ({str(error).split(';')[0]})"  # cuts off Python's advice about long numbers


def _refuse_objects_over_lines(path: Path) -> None:
    """Raise NotRows for a file of one or more objects that are spread over several lines."""
    with _text(path) as file:
        text = file.read(OBJECT).lstrip()
    try:
        value, end = DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return
    rest = text[end:].strip()
    if "\n" not in text[:end] or (rest and not rest.startswith("{")):
        return
    if rest:
        raise NotRows("its objects are spread over several lines; write one a line, e.g. with `jq -c .`")
    lists = [key for key, entry in value.items() if isinstance(entry, list) and entry and _are_rows(entry)]
    if len(lists) == 1:
        raise NotRows(f"it is a single object; its rows are under '{lists[0]}': write that list into the file")
    raise NotRows("it is a single object, but rows are expected; write a list of objects, or one object a line")


def _are_rows(entries: list[Any]) -> bool:
    """Whether a list holds objects that are not the turns of a conversation."""
    objects = all(isinstance(entry, dict) for entry in entries)
    return objects and not all({"role", "from"} & set(entry) for entry in entries)


def _array_rows(name: str, file: TextIO, max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON array, decoded one by one from a buffer that grows only until it holds a whole row."""
    limit = max_bytes if max_bytes is not None else float("inf")
    text = file.read(CHUNK)
    at, read, number = text.index("[") + 1, len(text), 0
    while True:
        place = f"{name}#{number + 1}"
        try:
            element = _next_element(text, at, first=number == 0)
        except json.JSONDecodeError as error:
            # an error well before the end of the buffer is a real one, not a row that is only partly read
            partly = error.msg.startswith("Unterminated string") or error.pos > len(text) - len("-Infinity") - 1
            more = file.read(max(CHUNK, len(text) - at)) if partly and read < limit else ""
            if more:
                text, at, read = text[at:] + more, 0, read + len(more)
                continue
            if not partly or read < limit or not file.read(1):  # otherwise max_bytes cut the array
                yield place, Fault(f"not valid JSON ({error.msg})", "correct the file from this row on")
            return
        except (ValueError, RecursionError) as error:
            yield place, Fault(_fault(error), "correct the file from this row on")
            return
        if element is None:
            end = BLANKS.match(text, at).end() + 1
            if text[end:].strip() or file.read(CHUNK).strip():
                yield place, Fault("text after the end of the list", "correct the file from there on")
            return
        row, at = element
        number += 1
        yield place, row


def _next_element(text: str, at: int, first: bool) -> tuple[Any, int] | None:
    """(element, its end), or None at the closing bracket. Raises JSONDecodeError if the text ends or is broken."""
    at = BLANKS.match(text, at).end()
    if text.startswith("]", at):
        return None
    if not first:
        if not text.startswith(",", at):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        at = BLANKS.match(text, at + 1).end()
    return DECODER.raw_decode(text, at)


def _csv_rows(name: str, file: TextIO, suffix: str, max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit((1 << 31) - 1)  # the default limit is too small for long conversations
    skipped, opening = next(((at, line) for at, line in enumerate(file) if line.strip()), (0, ""))
    delimiter = "\t" if suffix == ".tsv" else _delimiter(opening)
    ended = []

    def lines() -> Iterator[str]:
        yield from _whole_records(chain([opening], file), max_bytes)
        ended.append(True)

    reader = csv.reader(lines(), delimiter=delimiter)
    header = next(reader, [])
    if twice := sorted({column for column in header if header.count(column) > 1}):
        yield f"{name}:{skipped + 1}", Fault(f"the column '{twice[0]}' occurs twice", "rename one")
        return
    while header:
        place = f"{name}:{skipped + reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield place, Fault(f"not valid CSV ({error})", "correct or remove the record")
            continue
        if cells is None:
            return
        if ended and max_bytes is None:  # the record extends to the end of the file
            yield place, Fault("a quote opens a cell and never closes", "close it, or double quotes inside of cells")
        elif cells and len(cells) != len(header):
            shape = f"{len(cells)} cell{'s' if len(cells) != 1 else ''} under {len(header)} columns"
            yield place, Fault(shape, f"quote cells that hold {DELIMITERS[delimiter]}")
        elif cells:
            yield place, {column: _cell(column, cell) for column, cell in zip(header, cells, strict=True)}


def _delimiter(header: str) -> str:
    """The most frequent delimiter outside of quotes; the comma on a tie."""
    bare = re.sub(r'"[^"]*("|$)', "", header)
    return max(DELIMITERS, key=bare.count)


def _whole_records(lines: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """Lines up to max_bytes, then to the end of the record: an odd number of quotes means an open quoted cell."""
    read, quotes = 0, 0
    for line in lines:
        if max_bytes is not None and read >= max_bytes and quotes % 2 == 0:
            return
        read, quotes = read + len(line), quotes + line.count('"')
        yield line


def _cell(column: str, cell: str) -> Any:
    try:
        return DECODER.decode(cell) if column in CSV_JSON else cell
    except (ValueError, RecursionError):
        return cell


def _parquet_rows(name: str, path: Path, max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    if packed := packing(path):
        raise NotRows(f"a Parquet file inside of a {packed} file; unpack it, since Parquet is already compressed")
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
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise NotRows(f"not a readable Parquet file ({first_line(error)}); write it again") from None


def packing(path: Path) -> str:
    """The compression's suffix, by the first bytes: a download may have been unpacked but not renamed."""
    with path.open("rb") as file:
        first = file.read(8)
    return next((suffix for suffix, magic in PACKED.items() if first.startswith(magic)), "")


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed as they are read."""
    match packing(path):
        case ".gz":
            import gzip

            return gzip.open(path)
        case ".bz2":
            import bz2

            return bz2.open(path)
        case ".xz":
            import lzma

            return lzma.open(path)
        case ".zst":
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return path.open("rb")


def encoding(first: bytes) -> str:
    """The encoding by the byte order mark at the beginning; UTF-8 without one."""
    if first.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    return "utf-16" if first.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"


def is_pointer(path: Path) -> bool:
    """Whether git-lfs has not fetched the file yet."""
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def first_line(error: Exception) -> str:
    return [*str(error).splitlines(), type(error).__name__][0]
