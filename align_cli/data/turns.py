"""What a row of a format says: its cells -> chat messages, split into prompt and responses.

Whatever a cell holds (a string, a message list, ShareGPT turns, an hh-rlhf dialogue) becomes a list of {role, content}
here, or one of three exceptions: Broken (the run must not start), Dropped (the row is left out and counted) and Empty
(the recipe's drop_empty decides which of the two). Content is kept verbatim; only the turns of an hh dialogue lose the
whitespace that its notation puts round them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
Row = dict[str, Any]

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
HH_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
"""Begins a turn of an hh-rlhf dialogue; `Human:` inside a line is text, as published rows show."""

QUESTIONS = ("prompt", "question", "instruction")
"""Columns that a file of prompts may keep them in."""
PAIR = ("'chosen'", "'rejected'")
STRING, MESSAGES = "a string", "a list of messages"
WORDS = {str: STRING, dict: "an object", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}


class Broken(Exception):
    """A row that keeps the run from starting; says what was found and what to do, without the place."""


class Dropped(Exception):
    """A row that is left out and counted."""

    def __init__(self, reason: str, example: str = ""):
        super().__init__(reason)
        self.reason, self.example = reason, example


class Empty(Exception):
    """A response without text; says which."""


@dataclass
class Draft:
    """What a row says, before it is looked at: the responses with the names that messages about them use."""

    prompt: list[Message]
    responses: list[list[Message]] = field(default_factory=list)
    names: tuple[str, ...] = ()
    scores: list[float] | None = None
    label: bool | None = None


def kind(value: Any) -> str:
    """What a cell holds, in words."""
    if not isinstance(value, list):
        return WORDS.get(type(value), type(value).__name__)
    held = {type(item) for item in value}
    if len(held) != 1:
        return "a list of mixed types" if held else "an empty list"
    return {dict: MESSAGES, str: "a list of strings"}.get(held.pop(), "a list of something else")


def messages(value: Any, name: str, *, sharegpt: bool = False) -> list[Message]:
    """The messages of a list of {role, content}, or of {from, value} for ShareGPT. Raises Broken."""
    if not isinstance(value, list):
        raise Broken(f"{name} is {kind(value)}; it must be a list of {{role, content}}")
    return [_message(turn, f"turn {number} of {name}", sharegpt) for number, turn in enumerate(value, 1)]


def _message(turn: Any, where: str, sharegpt: bool) -> Message:
    if not isinstance(turn, dict):
        raise Broken(f"{where} is {kind(turn)}; it must be an object {{role, content}}")
    role_key, text_key = ("from", "value") if sharegpt and "from" in turn else ("role", "content")
    for key in (role_key, text_key):
        if not isinstance(turn.get(key), str):
            found = f"a {key} that is {kind(turn[key])}" if key in turn else f"no {key} (only {', '.join(turn)})"
            raise Broken(f"{where} has {found}; each turn is {{{role_key}, {text_key}}}, both strings")
    roles = SHAREGPT_ROLES if sharegpt else ROLES
    if turn[role_key] not in roles:
        raise Broken(f"{where} has the unknown {role_key} '{turn[role_key]}'; known are {', '.join(roles)}")
    return {"role": roles[turn[role_key]], "content": turn[text_key]}


def said(value: Any, name: str, role: str) -> list[Message]:
    """A string as one message of that role, a list as its messages. Raises Broken."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise Broken(f"{name} is {kind(value)}; it must be a string or a list of {{role, content}}")
    return messages(value, name)


def is_hh(value: Any) -> bool:
    """Whether a cell is an hh-rlhf dialogue."""
    return isinstance(value, str) and HH_MARK.match(value) is not None


def dialogue(text: str) -> list[Message]:
    r"""The turns of `\n\nHuman: … \n\nAssistant: …`, stripped."""
    _, *parts = HH_MARK.split(text)
    roles = ("user" if mark == "Human" else "assistant" for mark in parts[::2])
    return [{"role": role, "content": part.strip()} for role, part in zip(roles, parts[1::2], strict=True)]


def split_last(conversation: list[Message]) -> tuple[list[Message], list[Message]]:
    """(prompt, response) of a conversation, the prompt going up to its last user or tool turn."""
    asks = [at for at, turn in enumerate(conversation, 1) if turn["role"] in ("user", "tool")]
    end = asks[-1] if asks else 0
    return conversation[:end], conversation[end:]


def split_first(conversation: list[Message]) -> tuple[list[Message], list[Message]]:
    """(prompt, response) of a conversation, the response beginning with its first assistant turn."""
    end = next((at for at, turn in enumerate(conversation) if turn["role"] == "assistant"), len(conversation))
    return conversation[:end], conversation[end:]


def after_prompt(prompt: list[Message], response: list[Message], name: str) -> list[Message]:
    """The response without the prompt, where the cell holds the whole conversation. Raises Dropped."""
    if not response or response[0]["role"] == "assistant":
        return response
    if response == prompt:
        raise Dropped("no assistant turn", response[-1]["content"])
    if response[: len(prompt)] != prompt:
        raise Dropped("the conversation does not begin with the prompt", f"{name}: {response[0]['content']}")
    return response[len(prompt) :]


def shared_prompt(chosen: list[Message], rejected: list[Message], prompt: str | None = None) -> Draft:
    """The draft of two whole conversations; a `prompt` string beside them must be a turn of theirs.

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
            return Draft(alpaca_prompt(row), [said(cell(row, "output"), "'output'", "assistant")], ("'output'",))
        case "prompt-completion" | "kto":
            prompt, completion = said(cell(row, "prompt"), "'prompt'", "user"), "'completion'"
            response = after_prompt(prompt, said(cell(row, "completion"), completion, "assistant"), completion)
            return Draft(prompt, [response], (completion,), label=_label(row) if name == "kto" else None)
        case "hh":
            return _hh(row)
        case "implicit-prompt":
            return shared_prompt(*(messages(cell(row, column), f"'{column}'") for column in ("chosen", "rejected")))
        case "preference":
            return _preference(row)
        case "scored" if "responses" not in row:
            pair = _preference(row)
            pair.scores = [_score(cell(row, column), f"'{column}'") for column in ("score_chosen", "score_rejected")]
            return pair
    return _ranking(row, scored=name == "scored")


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


def system_turn(row: Row) -> list[Message]:
    """The system message that Alpaca and ShareGPT files keep in a column of its own."""
    text = row.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def _conversation(conversation: list[Message], name: str) -> Draft:
    prompt, response = split_first(conversation)
    if not response:
        raise Dropped("no assistant turn", prompt[-1]["content"] if prompt else "")
    return Draft(prompt, [response], (f"an assistant turn of {name}",))


def _sharegpt(row: Row) -> Draft:
    conversation = system_turn(row) + messages(cell(row, "conversations"), "'conversations'", sharegpt=True)
    if "chosen" not in row or "rejected" not in row:
        return _conversation(conversation, "'conversations'")
    # LLaMA-Factory's preferences: the conversation ends with the question, each answer is one turn beside it.
    answers = [[turn] if isinstance(turn := cell(row, column), dict) else turn for column in ("chosen", "rejected")]
    return Draft(conversation, [_answer(turn, name) for turn, name in zip(answers, PAIR, strict=True)], PAIR)


def _answer(value: Any, name: str) -> list[Message]:
    return said(value, name, "assistant") if isinstance(value, str) else messages(value, name, sharegpt=True)


def alpaca_prompt(row: Row) -> list[Message]:
    asked = [text_cell(row, column) for column in ("instruction", "input") if row.get(column) is not None]
    if not asked:
        cell(row, "instruction")
    before = system_turn(row)
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or [type(text) for text in turn] != [str, str]:
            raise Broken("'history' must be a list of [question, answer] pairs of strings; mend or remove it")
        before += said(turn[0], "'history'", "user") + said(turn[1], "'history'", "assistant")
    return [*before, {"role": "user", "content": "\n\n".join(text for text in asked if text.strip())}]


def _preference(row: Row) -> Draft:
    prompt = said(cell(row, "prompt"), "'prompt'", "user")
    both = [said(cell(row, column), f"'{column}'", "assistant") for column in ("chosen", "rejected")]
    if isinstance(row["prompt"], str) and any(response and response[0]["role"] != "assistant" for response in both):
        # ultrafeedback_binarized: a prompt string beside whole conversations, which may hold more turns than it.
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
            raise Broken(f"{name} is no dialogue of '\\n\\nHuman: … \\n\\nAssistant: …'; mend or remove the row")
    # A reply alone may begin with `Human:` too, where the published model spoke for both.
    if prompt is None or all(is_hh(text) and "\n\nAssistant:" in text for text in (chosen, rejected)):
        asked = None if prompt is None else hh_prompt(prompt)[-1]["content"]
        return shared_prompt(dialogue(chosen), dialogue(rejected), asked)
    answers = [[{"role": "assistant", "content": text.strip()}] for text in (chosen, rejected)]
    return Draft(hh_prompt(prompt), answers, PAIR)


def hh_prompt(prompt: Any) -> list[Message]:
    r"""A dialogue up to the reply; the `\n\nAssistant:` that asks for it is no turn."""
    spoken = dialogue(prompt) if is_hh(prompt) else said(prompt, "'prompt'", "user")
    open_end = spoken[-1:] and spoken[-1]["role"] == "assistant" and not spoken[-1]["content"]
    return spoken[:-1] if open_end and len(spoken) > 1 else spoken


def _ranking(row: Row, scored: bool) -> Draft:
    prompt, listed = said(cell(row, "prompt"), "'prompt'", "user"), cell(row, "responses")
    if not isinstance(listed, list):
        raise Broken(f"'responses' is {kind(listed)}; it must be a list")
    names = tuple(f"response {number} of 'responses'" for number in range(1, len(listed) + 1))
    said_all = [said(item, name, "assistant") for item, name in zip(listed, names, strict=True)]
    responses = [after_prompt(prompt, response, name) for response, name in zip(said_all, names, strict=True)]
    if not scored:
        return Draft(prompt, responses, names)
    scores = cell(row, "scores")
    if not isinstance(scores, list):
        raise Broken(f"'scores' is {kind(scores)}; it must be a list of numbers")
    if len(scores) != len(responses):
        raise Broken(f"{len(responses)} responses, but {len(scores)} scores; give one a response")
    values = [_score(score, f"score {number} of 'scores'") for number, score in enumerate(scores, 1)]
    return Draft(prompt, responses, names, values)


def _score(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Broken(f"{name} is {kind(value)}; it must be a number")
    return float(value)


def truth(value: Any) -> bool | None:
    """The label a cell says, None if it says none; CSV files hold it as text."""
    text = str(value).lower() if isinstance(value, (bool, int, str)) else ""
    return {"true": True, "1": True, "false": False, "0": False}.get(text)


def _label(row: Row) -> bool:
    label = truth(cell(row, "label"))
    if label is None:
        raise Broken(f"'label' is {row['label']!r:.40}; it must be true or false")
    return label
