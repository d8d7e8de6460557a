"""The prompts of `samples`, which a run answers before and after training: a list in the recipe, or a file of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align_cli.data import template
from align_cli.data.files import is_local, kind
from align_cli.data.load import Row, read_rows
from align_cli.data.template import ChatTokenizer, Message
from align_cli.data.turns import QUESTIONS, Broken, as_turns
from align_cli.errors import DataError, did_you_mean, raise_all
from align_cli.recipe.sections import Samples, Source

LINES = 20
"""Most problems of one file that are printed."""
WHERE = "samples.prompts"


def sample_prompts(samples: Samples, tokenizer: ChatTokenizer | None = None) -> list[Row]:
    """One row per prompt, with the other columns of its file; `prompt` is a string or a list of messages.

    With a `tokenizer` (a chat template is enough), each prompt is rendered. Raises DataError with every problem, one
    line each.
    """
    if isinstance(samples.prompts, list):
        empty = [at for at, prompt in enumerate(samples.prompts) if not prompt.strip()]
        raise_all(DataError, [f"{WHERE}[{at}]: the prompt is empty; write one or remove it" for at in empty])
        rows = [{"prompt": prompt} for prompt in samples.prompts]
    else:
        rows = _rows(samples.prompts)
    if not rows:
        raise DataError(f"{WHERE}: holds no prompts; write some, or leave samples out")
    refused = [
        f"{WHERE}: {excerpt(row['prompt'])}: {why}; write the prompt as messages that the template accepts"
        for row in rows
        if tokenizer is not None and (why := _refused(tokenizer, as_messages(row["prompt"])))
    ]
    raise_all(DataError, refused[:LINES])
    return rows


def as_messages(prompt: str | list[Message]) -> list[Message]:
    """A prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def excerpt(prompt: str | list[Message]) -> str:
    """The first words of a prompt, for a message."""
    text = " ".join(as_messages(prompt)[-1]["content"].split())
    return repr(text if len(text) <= 40 else f"{text[:37]}…")


def _refused(tokenizer: ChatTokenizer, prompt: list[Message]) -> str:
    try:
        template.of(tokenizer).render(prompt, prompt=True)
    except template.Unrenderable as error:
        return str(error)
    return ""


def sample_problems(samples: Samples | None, tokenizer: ChatTokenizer | None = None) -> list[str]:
    """The lines that `sample_prompts` raises."""
    try:
        if samples is not None:
            sample_prompts(samples, tokenizer)
    except DataError as error:
        return list(error.lines)
    return []


def _rows(path: str) -> list[Row]:
    source, lines = Source(path=path), []
    if not is_local(source):
        raise DataError(f"{WHERE}: {path}: no such file; name one with a `prompt` column, or list prompts")
    read = list(read_rows(source, lines.append))
    names = list(dict.fromkeys(name for _, row in read for name in row))
    column = next((name for name in QUESTIONS if name in names), None)
    if read and column is None:
        near = next((near for name in QUESTIONS if (near := did_you_mean(name, names))), "")
        wanted = ", ".join(f"'{name}'" for name in QUESTIONS[:-1]) + f" or '{QUESTIONS[-1]}'"
        lines.append(f"{path}: no column {wanted}{near or ';'} rename the column that holds the prompts")
    rows = []
    for place, row in read if column else []:
        try:
            rows.append(_prompt(row, column, place))
        except Broken as error:
            lines.append(f"{place}: {error}")
    more = [f"{path}: … and {len(lines) - LINES} more"] if len(lines) > LINES else []
    raise_all(DataError, [f"{WHERE}: {line}" for line in lines[:LINES] + more])
    return rows


def _prompt(row: Row, column: str, place: str) -> Row:
    """The row with its prompt as `prompt`. Raises Broken."""
    value = row.get(column)
    if value is None:
        raise Broken(f"'{column}' is missing or null; add it or remove the row")
    if (
        column == "instruction"
        and isinstance(value, str)
        and isinstance(more := row.get("input"), str)
        and more.strip()
    ):
        value = f"{value}\n\n{more}"  # as Alpaca's rows are read for training
    value = _cell(value, place)
    messages = as_turns(value, f"'{column}'", "user")
    if not messages or all(isinstance(turn["content"], str) and not turn["content"].strip() for turn in messages):
        raise Broken(f"'{column}' is empty; write a prompt or remove the row")
    prompt = value if isinstance(value, str) else messages
    # samples.jsonl can hold only JSON values, but Parquet also has dates, bytes and decimals
    rest = {name: other for name, other in row.items() if name != column}
    text = json.dumps({"prompt": prompt} | rest, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Broken(f"holds half of a surrogate pair ({text[error.start]!r}); correct the row") from None
    return json.loads(text)


def _cell(value: Any, place: str) -> Any:
    """The messages that a CSV cell holds as JSON; any other value unchanged."""
    table = kind(Path(place.rpartition(":")[0])) in (".csv", ".tsv")
    if not table or not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
