"""Rows -> groups: recognises a source's format and converts its rows.

`recognise` looks at the first rows' columns, `to_group` turns one row into a prompt and its responses, best first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from align_cli.data import turns, winners
from align_cli.data.count import Count
from align_cli.data.messages import PICTURES, parsed, tools_of
from align_cli.data.template import THOUGHT
from align_cli.data.turns import QUESTIONS, Broken, Dropped, Empty, Message
from align_cli.errors import did_you_mean
from align_cli.recipe.formats import COLUMNS, NEEDS, SERVES
from align_cli.recipe.sections import Source
from align_cli.recipe.stages import RowKind

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its K responses."""

    prompt: list[Message]
    """Up to where the response begins; may hold several turns."""
    responses: list[list[Message]]
    """Best first. Each begins and ends with an assistant turn; one taken from `messages` runs from the first assistant
    turn to the last, so it may contain user turns. Empty where only prompts are needed."""
    scores: list[float] | None = None
    """One per response, higher is better; None if the source has no scores."""
    label: bool | None = None
    """KTO: whether the response is a good one."""
    place: str = ""
    """`data/pairs.jsonl:17`, `data/pairs.parquet#17`."""
    probability: float | None = None
    """Soft label: probability that the first of two responses is the better one, 0.5 to 1."""
    count: Count | None = field(default=None, compare=False, repr=False)
    """The row count of its source; a group that is dropped during tokenization is counted there."""
    cells: Row = field(default_factory=dict, compare=False, repr=False)
    """Further columns of the row that the caller requested."""
    tools: list[dict[str, Any]] | None = None
    """The functions that the assistant may call, as JSON schemas."""


SCORED_PAIR = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
"""Columns of the pair variant of `scored`. It is used only if the source sets the format, since published preference
files have such columns from all kinds of raters."""


def recognise(rows: list[Row], source: Source, need: RowKind) -> str:
    """The format of a source from its first rows, or the one it names if its columns exist. Raises Broken."""
    # The union over rows: a column that only one broken row lacks is reported for that row.
    columns: Row = {}
    for row in rows:
        for name, value in row.items():
            if value is not None and columns.get(name, "") in ("", []):
                columns[name] = value
    turns.refuse_pictures(columns)
    fitting = [name for name in COLUMNS if _fits(name, columns, need)]
    if source.format:
        return _named(source.format, columns, need)
    serving = [name for name in SERVES[need] if name in fitting]
    if "kto" in fitting and need == "demonstrations" and serving[0] == "prompt-completion":
        raise Broken(
            "has prompt, completion and label, but demonstrations must all be good;"
            " leave out the bad rows, or set format=prompt-completion to train on every completion"
        )
    if serving:
        return serving[0]
    names = list(columns)
    if named := _winner_named(columns, need):
        raise Broken(
            f"holds two answers, {named[0]} and {named[1]}, and '{named[2]}' may say which is better; write"
            f" `columns: {{ better: {named[2]} }}` in the source"
        )
    if need in ("preferences", "labels") and _has(columns, "chosen", "rejected") and "prompt" not in columns:
        raise Broken(
            "has no prompt beside chosen and rejected, which are not conversations; add a column 'prompt'"
            f"{did_you_mean('prompt', names)}"
        )
    has = ", ".join(columns) or "(none)"
    if any(column in columns for name in fitting for column in COLUMNS[name]):
        raise Broken(
            f"has {has}, but {need} need {NEEDS[need]}; name another file or rename its columns with `columns`"
        )
    nearest = max(SERVES[need], key=lambda name: _share(name, columns))
    if not _share(nearest, columns) and not any(did_you_mean(column, list(columns)) for column in COLUMNS[nearest]):
        raise Broken(
            f"no format has the columns {has}; {need} need {NEEDS[need]};"
            f" rename with `columns: {{{NEEDS[need].split()[0].strip(',')}: their_name}}`"
        )
    missing = [column for column in COLUMNS[nearest] if column not in columns] or list(COLUMNS[nearest])
    guess = next((hint for column in missing if (hint := did_you_mean(column, list(columns)))), "")
    raise Broken(
        f"no format has the columns {has}; the nearest, {nearest}, lacks {', '.join(missing)}{guess.rstrip('?')};"
        f" rename with `columns: {{{missing[0]}: their_name}}`"
    )


def _share(name: str, columns: Row) -> float:
    return sum(column in columns for column in COLUMNS[name]) / len(COLUMNS[name])


def _has(columns: Row, *names: str) -> bool:
    return all(name in columns for name in names)


def _fits(name: str, columns: Row, need: RowKind) -> bool:
    """Whether the columns, and the first value of each, are of the format."""
    pair = _has(columns, "chosen", "rejected")
    match name:
        case "prompt":
            return any(column in columns for column in QUESTIONS)
        case "alpaca" if need == "prompts":
            return "instruction" in columns
        case "hh" if need == "prompts":
            return turns.is_hh(columns.get("prompt")) or turns.is_hh(columns.get("chosen"))
        case "hh":
            return pair and (turns.is_hh(columns["chosen"]) or turns.is_hh(columns.get("prompt")))
        case "implicit-prompt":
            return pair and "prompt" not in columns and isinstance(columns["chosen"], list)
        case "sharegpt" if need in ("preferences", "labels"):
            return pair and "conversations" in columns
        case "winner":
            two = isinstance(columns.get("responses"), list) and len(columns["responses"]) == 2
            return _has(columns, "prompt", "better") and (two or winners.pair(columns) is not None)
        case "kto":
            return _has(columns, *COLUMNS["kto"]) and turns.truth(columns["label"]) is not None
    return _has(columns, *COLUMNS[name])


def _winner_named(columns: Row, need: RowKind) -> tuple[str, str, str] | None:
    """Two answers and a column that may name the better one."""
    pair = winners.pair(columns) if need in ("preferences", "labels") else None
    near = next((name for name in (*winners.RECOGNISED, *winners.SUSPECTED) if name in columns), None)
    return (*pair, near) if pair and near else None


def normalised(row: Row, source: Source) -> Row:
    """The row with lists parsed from text, and with our column names added for those of other formats."""
    row = parsed(row)
    more: Row = {}
    answered = any(name in row for name in ("chosen", "completion", "responses", "better")) or winners.pair(row)
    if row.get("prompt") is None and answered:
        if isinstance(row.get("instruction"), str) and "output" not in row:
            more["prompt"] = turns.alpaca_prompt(row) if row.get("history") else _joined(row, "instruction")
        elif (
            isinstance(conversation := row.get("messages"), list)
            and conversation
            and _role(conversation[-1]) in ("user", "tool")
        ):
            more["prompt"] = conversation
        elif "question" in row and "answer" not in row:
            more["prompt"] = row["question"]
    elif source.columns.get("prompt") == "instruction" and isinstance(row.get("prompt"), str):
        more["prompt"] = _joined(row, "prompt")
    if "better" not in row and winners.pair(row):
        winner = next((name for name in winners.RECOGNISED if row.get(name) is not None), None)
        more |= {"better": row[winner]} if winner else {}
    elif any(word in source.columns.get("better", "") for word in winners.STRENGTHS):
        more[turns.STRENGTH] = True
    return row | more if more else row


def _joined(row: Row, column: str) -> str:
    """An instruction joined with its input, as for Alpaca rows."""
    more = row.get("input")
    return f"{row[column]}\n\n{more}" if isinstance(more, str) and more.strip() else row[column]


def _role(turn: Any) -> str:
    return str(turn.get("role", "")) if isinstance(turn, dict) else ""


def read_columns(name: str, need: RowKind, source: Source) -> set[str]:
    """The columns that a format reads, by our names."""
    always = {*turns.SYSTEM, *PICTURES, turns.STRENGTH}
    columns = {"prompt", "instruction", "input", "history", "question", "tools", "functions"}
    if need == "prompts":
        return (
            always
            | columns
            | ({"messages", "conversations"} & set(COLUMNS[name]))
            | ({"chosen"} if name in ("hh", "implicit-prompt") else set())
        )
    own = set(COLUMNS[name]) | ({"probability"} if need == "preferences" else set())
    match name:
        case "messages" | "sharegpt":
            own |= {"tools", "functions"}
        case "alpaca":
            own |= {"input", "history", "tools", "functions"}
        case "winner":
            own |= {stem + end for stem in winners.ANSWERS for ends in winners.ENDS for end in ends} | {"responses"}
            own |= set(winners.RECOGNISED) | {"instruction", "input", "tools"}
        case _:
            own |= {"instruction", "tools", "functions"}
            own |= {"input", "history"} if "prompt" in COLUMNS[name] else set()
    if name in ("preference", "winner") or (name == "sharegpt" and need != "demonstrations"):
        own |= {"messages", "chosen", "rejected"}
    if name == "scored":
        own |= {"score_chosen", "score_rejected", "chosen", "rejected"}
    if name == "hh":
        own |= {"prompt"}
    return always | own


def _named(name: str, columns: Row, need: RowKind) -> str:
    if need != "prompts" and name not in SERVES[need]:
        serve = ", ".join(SERVES[need])
        raise Broken(f"format={name} gives no {need}; they need {NEEDS[need]} (formats {serve})")
    wants = COLUMNS[name]
    if name == "scored" and "responses" not in columns and "chosen" in columns:
        wants = SCORED_PAIR
    if name == "sharegpt" and need in ("preferences", "labels"):
        wants = (*wants, "chosen", "rejected")
    if need == "prompts":
        wants = tuple(column for column in wants if column in (*QUESTIONS, "messages", "conversations", "chosen"))[:1]
    if name == "prompt" and any(column in columns for column in QUESTIONS):
        wants = ()
    if name == "hh" and need == "prompts" and "prompt" in columns:
        wants = ()
    missing = [column for column in wants if column not in columns]
    if missing:
        raise Broken(
            f"format={name} wants {', '.join(wants)}, but {missing[0]} is missing (has {', '.join(columns)});"
            f" rename it with `columns: {{{missing[0]}: their_name}}` or name another format"
        )
    return name


def to_group(row: Row, place: str, name: str, need: RowKind, drop_empty: bool = False) -> Group:
    """The group of a row in the named format. Raises Broken and Dropped."""
    turns.refuse_pictures(row)
    tools = tools_of(row)
    if need == "prompts":
        prompt = turns.with_system(row, _prompt_alone(row, name))
        _check_prompt(prompt)
        return Group(prompt, [], place=place, tools=tools)
    try:
        draft = turns.draft(row, name)
        draft.prompt = turns.with_system(row, draft.prompt)
        _check_prompt(draft.prompt)
        for response, label in zip(draft.responses, draft.names, strict=True):
            _check_response(response, label)
    except Empty as error:
        if drop_empty:
            raise Dropped("empty response", str(error)) from None
        raise Broken(f"{error} is empty; remove the row or set data.drop_empty=true") from None
    # a ranking gives labels, too: its best response counts as good
    compared = need == "preferences" or (need == "labels" and draft.label is None)
    group = _ordered(draft, place, compared, _probability(row, draft) if compared else None)
    return replace(group, tools=tools) if tools else group


def _probability(row: Row, draft: turns.Draft) -> float | None:
    """The soft label of a pair: probability that its first response is the better one. Raises Broken."""
    value = row.get("probability")
    if value is None:
        return None
    number = turns.number(value)
    if number is None or not 0 <= number <= 1:
        raise Broken(
            f"'probability' is {value!r:.40}; it must be a number from 0 to 1, the probability that the first response"
            " is better"
        )
    if len(draft.responses) != 2:
        raise Broken(f"'probability' is given for {len(draft.responses)} responses; it is valid only for a pair")
    return number


def _check_prompt(prompt: list[Message]) -> None:
    """Raise Dropped for an empty prompt, or one that does not end with a user or tool turn."""
    if not prompt or not prompt[-1]["content"].strip():
        if prompt and prompt[-1]["role"] == "assistant":
            raise Dropped("the prompt does not end with a user turn", prompt[0]["content"])
        raise Dropped("empty prompt", prompt[0]["content"] if prompt else "")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise Dropped("the prompt does not end with a user turn", prompt[-1]["content"])


def _check_response(response: list[Message], name: str) -> None:
    """Raise Empty for a response without text, Dropped if it does not begin and end with an assistant turn."""
    if not response or any(turn["role"] == "assistant" and _silent(turn) for turn in response):
        raise Empty(name)
    if response[0]["role"] != "assistant" or response[-1]["role"] != "assistant":
        which = "begin" if response[0]["role"] != "assistant" else "end"
        raise Dropped(f"the response does not {which} with an assistant turn", response[-1]["content"])


def _silent(turn: Message) -> bool:
    """Whether an assistant turn is empty: no text, no call, no thought."""
    return not (turn["content"].strip() or turn.get("tool_calls") or turn.get(THOUGHT))


def _ordered(draft: turns.Draft, place: str, compared: bool, probability: float | None = None) -> Group:
    """The group with its responses best first and, where they are compared, without repeated ones. Raises Dropped."""
    order = list(range(len(draft.responses)))
    if probability is not None and probability < 0.5:
        order, probability = [1, 0], 1 - probability
    if draft.scores is not None:
        if any(math.isnan(score) for score in draft.scores):
            raise Dropped("a score is NaN", str(draft.scores))
        order.sort(key=lambda at: -draft.scores[at])  # stable: equal scores keep the file's order
    text = draft.prompt[-1]["content"]
    if not order:
        raise Dropped("no response", text)
    if compared:
        if len(order) == 1:
            raise Dropped("a single response", text)
        distinct: list[int] = []
        for at in order:
            if all(draft.responses[at] != draft.responses[kept] for kept in distinct):
                distinct.append(at)
        order = distinct
        if len(order) == 1:
            pair = draft.names[0] == "'chosen'"
            raise Dropped("chosen equals rejected" if pair else "fewer than two distinct responses", text)
        if draft.scores is not None and len({draft.scores[at] for at in order}) == 1:
            raise Dropped("all scores are equal", text)
    scores = None if draft.scores is None else [draft.scores[at] for at in order]
    return Group(draft.prompt, [draft.responses[at] for at in order], scores, draft.label, place, probability)


def _prompt_alone(row: Row, name: str) -> list[Message]:
    """The prompt of a row; its responses are not checked. Raises Broken."""
    match name:
        case "messages" | "sharegpt":
            column = "messages" if name == "messages" else "conversations"
            conversation = turns.messages(turns.cell(row, column), f"'{column}'", sharegpt=name == "sharegpt")
            ends_asking = conversation and conversation[-1]["role"] in ("user", "tool")
            return conversation if ends_asking else turns.split_first(conversation)[0]
        case "implicit-prompt":
            return turns.split_last(turns.messages(turns.cell(row, "chosen"), "'chosen'"))[0]
        case "hh" if row.get("prompt") is not None:
            return turns.hh_prompt(turns.cell(row, "prompt"))
        case "hh":
            return turns.split_last(turns.dialogue(turns.text_cell(row, "chosen")))[0]
        case "alpaca":
            return turns.alpaca_prompt(row)
    column = next((column for column in QUESTIONS if row.get(column) is not None), "prompt")
    if column != "prompt" and isinstance(row.get(column), str):
        return turns.as_prompt(_joined(row, column), f"'{column}'")
    return turns.as_prompt(turns.cell(row, column), f"'{column}'")
