"""Cells of a row -> chat messages, split into prompt and responses.

Every cell (a string, a message list, ShareGPT turns, an hh-rlhf dialogue) becomes a list of {role, content}, or raises
one of three exceptions: Broken (the run must not start), Dropped (the row is left out and counted) and Empty (the
recipe's drop_empty decides which of the two). Content is kept verbatim, except that the turns of an hh dialogue are
stripped of the whitespace that its notation adds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from align_cli.data import winners
from align_cli.data.messages import PICTURES, is_message, messages
from align_cli.data.template import Message
from align_cli.data.trouble import MESSAGES, STRING, Broken, Dropped, Empty, kind

__all__ = [
    "MESSAGES",
    "STRING",
    "Broken",
    "Draft",
    "Dropped",
    "Empty",
    "Message",
    "draft",
    "kind",
    "messages",
    "as_turns",
]

Row = dict[str, Any]

HH_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
"""Begins a turn of an hh-rlhf dialogue; `Human:` inside a line is text, which occurs in published rows."""

QUESTIONS = ("prompt", "question", "instruction")
"""Columns in which a file of prompts may hold them."""
SYSTEM = ("system", "system_prompt")
"""Columns that hold a system turn."""
PAIR = ("'chosen'", "'rejected'")
STRENGTH = "better is a strength"
"""Set by `normalised` beside `better` if its column says by how much one answer is better."""
GOOD = (
    "true",
    "1",
    "yes",
    "good",
    "👍",
    "thumbs_up",
    "thumbs up",
    "up",
    "positive",
    "chosen",
    "desirable",
    "like",
    "liked",
)
BAD = (
    "false",
    "0",
    "-1",
    "no",
    "bad",
    "👎",
    "thumbs_down",
    "thumbs down",
    "down",
    "negative",
    "rejected",
    "undesirable",
    "dislike",
    "disliked",
)


@dataclass
class Draft:
    """The contents of a row before they are checked; `names` are the responses' names in error messages."""

    prompt: list[Message]
    responses: list[list[Message]] = field(default_factory=list)
    names: tuple[str, ...] = ()
    scores: list[float] | None = None
    label: bool | None = None


def as_turns(value: Any, name: str, role: str) -> list[Message]:
    """A string as one message of that role, a list as its messages. Raises Broken."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) and not is_message(value):
        raise Broken(f"{name} is {kind(value)}; it must be a string or a list of {{role, content}}")
    return messages(value, name)


def as_prompt(value: Any, name: str = "'prompt'") -> list[Message]:
    """The prompt in a cell: a string, messages, or an hh-rlhf dialogue up to the reply. Raises Broken."""
    if is_hh(value) and "\n\nAssistant:" in value:
        return hh_prompt(value)
    return as_turns(value, name, "user")


def is_hh(value: Any) -> bool:
    """Whether a cell is an hh-rlhf dialogue."""
    return isinstance(value, str) and HH_MARK.match(value) is not None


def dialogue(text: str) -> list[Message]:
    r"""The turns of `\n\nHuman: … \n\nAssistant: …`, stripped."""
    _, *parts = HH_MARK.split(text)
    roles = ("user" if mark == "Human" else "assistant" for mark in parts[::2])
    return [{"role": role, "content": part.strip()} for role, part in zip(roles, parts[1::2], strict=True)]


def split_last(conversation: list[Message]) -> tuple[list[Message], list[Message]]:
    """(prompt, response) of a conversation; the prompt ends with its last user or tool turn."""
    asks = [at for at, turn in enumerate(conversation, 1) if turn["role"] in ("user", "tool")]
    end = asks[-1] if asks else 0
    return conversation[:end], conversation[end:]


def split_first(conversation: list[Message]) -> tuple[list[Message], list[Message]]:
    """(prompt, response) of a conversation; the response runs from the first assistant turn after a user or tool turn
    to the last assistant turn."""
    roles = [turn["role"] for turn in conversation]
    asks = next((at for at, role in enumerate(roles) if role in ("user", "tool")), len(roles))
    begin = next((at for at in range(asks, len(roles)) if roles[at] == "assistant"), len(roles))
    end = len(roles) - next((back for back, role in enumerate(reversed(roles)) if role == "assistant"), 0)
    return conversation[:begin], conversation[begin:end]


def after_prompt(prompt: list[Message], response: list[Message], name: str) -> list[Message]:
    """The response without the prompt, if the cell holds the whole conversation. Raises Dropped."""
    if not response or response[0]["role"] == "assistant":
        return response
    if response == prompt:
        raise Dropped("no assistant turn", response[-1]["content"])
    if response[: len(prompt)] != prompt:
        raise Dropped("the conversation does not begin with the prompt", f"{name}: {response[0]['content']}")
    return response[len(prompt) :]


def shared_prompt(chosen: list[Message], rejected: list[Message], prompt: str | None = None) -> Draft:
    """The draft of two whole conversations; if given, the `prompt` string must be one of their shared turns.

    Raises Empty and Dropped.
    """
    for name, conversation in zip(PAIR, (chosen, rejected), strict=True):
        if not conversation:
            raise Empty(name)
        if conversation[-1]["role"] != "assistant":
            raise Dropped("the response does not end with an assistant turn", conversation[-1]["content"])
    (before, better), (other, worse) = split_last(chosen), split_last(rejected)
    if before != other:
        theirs = next((turn for turn, same in zip(before, other, strict=False) if turn != same), chosen[-1])
        raise Dropped("chosen and rejected differ before the last turn", theirs["content"])
    if prompt is not None and prompt.strip() not in [turn["content"].strip() for turn in before]:
        raise Dropped("chosen and rejected do not hold the prompt", prompt)
    return Draft(before, [better, worse], PAIR)


def draft(row: Row, name: str) -> Draft:
    """The prompt and responses of a row in the named format. Raises Broken, Dropped and Empty."""
    match name:
        case "messages":
            return _conversation(messages(cell(row, "messages"), "'messages'"), "'messages'")
        case "sharegpt":
            return _sharegpt(row)
        case "alpaca":
            return Draft(alpaca_prompt(row), [as_turns(cell(row, "output"), "'output'", "assistant")], ("'output'",))
        case "prompt-completion" | "kto":
            prompt, completion = as_prompt(cell(row, "prompt")), "'completion'"
            response = after_prompt(prompt, as_turns(cell(row, "completion"), completion, "assistant"), completion)
            return Draft(prompt, [response], (completion,), label=_label(row) if name == "kto" else None)
        case "hh":
            return _hh(row)
        case "implicit-prompt":
            return shared_prompt(*(messages(cell(row, column), f"'{column}'") for column in ("chosen", "rejected")))
        case "preference":
            return _preference(row)
        case "winner":
            return _winner(row)
        case "scored" if "responses" not in row:
            pair = _preference(row)
            pair.scores = [_score(cell(row, column), f"'{column}'") for column in ("score_chosen", "score_rejected")]
            return pair
    return _ranking(row, {"scored": "scores", "ranked": "ranks"}.get(name))


def cell(row: Row, column: str) -> Any:
    """The value of a column the row must have. Raises Broken."""
    value = row.get(column)
    if value is None:
        raise Broken(f"'{column}' is missing or null (has {', '.join(row)}); add it or remove the row")
    return value


def text_cell(row: Row, column: str) -> str:
    value = cell(row, column)
    if not isinstance(value, str):
        raise Broken(f"'{column}' is {kind(value)}; it must be a string")
    return value


def with_system(row: Row, prompt: list[Message]) -> list[Message]:
    """The prompt with the system turn of a separate column in front, if there is one. Raises Broken."""
    column = next((name for name in SYSTEM if isinstance(row.get(name), str) and row[name].strip()), None)
    if column is None:
        return prompt
    text = row[column]
    if prompt[:1] and prompt[0]["role"] == "system":
        if prompt[0]["content"].strip() == text.strip():
            return prompt
        raise Broken(f"the conversation's system turn differs from the column '{column}'; remove one of the two")
    return [{"role": "system", "content": text}, *prompt]


def refuse_pictures(row: Row) -> None:
    """Raise Broken for a row with images, video or audio."""
    for name in PICTURES:
        if row.get(name):
            raise Broken(
                f"'{name}' is not used, and its placeholders (<image>) would be trained as text; remove such rows, or "
                "the column and the placeholders"
            )


def _conversation(conversation: list[Message], name: str) -> Draft:
    prompt, response = split_first(conversation)
    if not response:
        opened = any(turn["role"] == "assistant" for turn in conversation)
        why = "an assistant turn without a question before it" if opened else "no assistant turn"
        raise Dropped(why, prompt[-1]["content"] if prompt else "")
    if not any(turn.get("train", True) for turn in response if turn["role"] == "assistant"):
        raise Dropped("no turn is to be trained", response[-1]["content"])
    return Draft(prompt, [response], (f"an assistant turn of {name}",))


def _sharegpt(row: Row) -> Draft:
    conversation = messages(cell(row, "conversations"), "'conversations'", sharegpt=True)
    if "chosen" not in row or "rejected" not in row:
        return _conversation(conversation, "'conversations'")
    # LLaMA-Factory's preferences: the conversation ends with the question, each answer is one turn in its own column.
    answers = [[turn] if isinstance(turn := cell(row, column), dict) else turn for column in ("chosen", "rejected")]
    return Draft(conversation, [_answer(turn, name) for turn, name in zip(answers, PAIR, strict=True)], PAIR)


def _answer(value: Any, name: str) -> list[Message]:
    return as_turns(value, name, "assistant") if isinstance(value, str) else messages(value, name, sharegpt=True)


def alpaca_prompt(row: Row) -> list[Message]:
    parts = [text_cell(row, column) for column in ("instruction", "input") if row.get(column) is not None]
    if not parts:
        cell(row, "instruction")
    before: list[Message] = []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
            raise Broken("'history' must be a list of [question, answer] pairs of strings; correct or remove it")
        before += as_turns(turn[0], "'history'", "user") + as_turns(turn[1], "'history'", "assistant")
    return [*before, {"role": "user", "content": "\n\n".join(text for text in parts if text.strip())}]


def _preference(row: Row) -> Draft:
    prompt = as_prompt(cell(row, "prompt"))
    both = [as_turns(cell(row, column), f"'{column}'", "assistant") for column in ("chosen", "rejected")]
    if isinstance(row["prompt"], str) and any(response and response[0]["role"] != "assistant" for response in both):
        # ultrafeedback_binarized: a prompt string beside whole conversations, which may hold further turns.
        return shared_prompt(*both, prompt=row["prompt"])
    responses = [after_prompt(prompt, response, name) for response, name in zip(both, PAIR, strict=True)]
    return Draft(prompt, responses, PAIR)


def _hh(row: Row) -> Draft:
    chosen, rejected = (text_cell(row, column) for column in ("chosen", "rejected"))
    prompt = row.get("prompt") or None
    for name, text in zip(PAIR, (chosen, rejected), strict=True):
        if not text.strip():
            raise Empty(name)
        if prompt is None and not is_hh(text):
            raise Broken(f"{name} is not a dialogue of '\\n\\nHuman: … \\n\\nAssistant: …'; correct or remove the row")
    # A bare reply may begin with `Human:`, too: in published data, some models wrote both sides.
    if prompt is None or all(is_hh(text) and "\n\nAssistant:" in text for text in (chosen, rejected)):
        question = None if prompt is None else hh_prompt(prompt)[-1]["content"]
        return shared_prompt(dialogue(chosen), dialogue(rejected), question)
    answers = [[{"role": "assistant", "content": text.strip()}] for text in (chosen, rejected)]
    return Draft(hh_prompt(prompt), answers, PAIR)


def hh_prompt(prompt: Any) -> list[Message]:
    r"""The turns of a dialogue up to the reply; an empty `\n\nAssistant:` at its end is not a turn."""
    spoken = dialogue(prompt) if is_hh(prompt) else as_turns(prompt, "'prompt'", "user")
    open_end = spoken[-1:] and spoken[-1]["role"] == "assistant" and not spoken[-1]["content"]
    return spoken[:-1] if open_end and len(spoken) > 1 else spoken


def _winner(row: Row) -> Draft:
    cell(row, "better")
    both, names = winners.answers(row)
    index, margin = winners.better(row, names, bool(row.get(STRENGTH)))
    order = [index, 1 - index]
    labels = tuple(f"'{names[at]}'" for at in order)
    prompt = as_prompt(cell(row, "prompt"))
    spoken = [as_turns(both[at], label, "assistant") for at, label in zip(order, labels, strict=True)]
    responses = [after_prompt(prompt, response, label) for response, label in zip(spoken, labels, strict=True)]
    return Draft(prompt, responses, labels, None if margin is None else [margin, 0.0])


def _ranking(row: Row, column: str | None) -> Draft:
    """Responses best first, or with the scores or ranks of a column."""
    prompt, listed = as_prompt(cell(row, "prompt")), cell(row, "responses")
    if not isinstance(listed, list):
        raise Broken(f"'responses' is {kind(listed)}; it must be a list")
    names = tuple(f"response {number} of 'responses'" for number in range(1, len(listed) + 1))
    scored = [as_turns(item, name, "assistant") for item, name in zip(listed, names, strict=True)]
    responses = [after_prompt(prompt, response, name) for response, name in zip(scored, names, strict=True)]
    if column is None:
        return Draft(prompt, responses, names)
    given = cell(row, column)
    if not isinstance(given, list):
        raise Broken(f"'{column}' is {kind(given)}; it must be a list of numbers")
    if len(given) != len(responses):
        raise Broken(f"{len(responses)} responses, but {len(given)} {column}; give one per response")
    values = [_score(value, f"{column[:-1]} {number} of '{column}'") for number, value in enumerate(given, 1)]
    # rank 1 is the best, so the scores are the negated ranks
    return Draft(prompt, responses, names, [-value for value in values] if column == "ranks" else values)


def number(value: Any) -> float | None:
    """The number in a cell, text in CSV files; None for anything else, and for integers too large for a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _score(value: Any, name: str) -> float:
    score = number(value)
    if score is None:
        raise Broken(
            f"{name} is {kind(value) if not isinstance(value, str) else repr(value)[:40]}; it must be a number"
        )
    return score


def truth(value: Any) -> bool | None:
    """The label in a cell, None if it is not a label; CSV files hold it as text, pandas as 1.0."""
    text = str(value).strip().lower() if isinstance(value, (bool, int, float, str)) else ""
    text = text.removesuffix(".0")
    return True if text in GOOD else False if text in BAD else None


def _label(row: Row) -> bool:
    label = truth(cell(row, "label"))
    if label is None:
        raise Broken(
            f"'label' is {row['label']!r:.40}; it may be true or false, 1 or 0, yes or no, good or bad, 👍 or 👎"
        )
    return label
