"""Locates the contents of a conversation in the rendered text, and verifies the result by a round trip.

Each content is replaced by an unlikely marker of the same shape: its white space and the template's own control words
are kept. If substituting the contents for the markers gives the real rendering, every content has been located.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from align_cli.data.template import CLOSE, THOUGHT, Message, Template, Tools, Unrenderable, lead, tail


@dataclass
class Piece:
    """A stretch of a content that was replaced by a marker."""

    turn: int
    kind: str
    """thought, answer or call"""
    text: str
    at: list[tuple[int, int]] = field(default_factory=list)
    """Its character spans in the real text."""


class Lost(Unrenderable):
    """The template leaves out a turn of a role other than the assistant."""


def place(
    template: Template, messages: list[Message], tools: Tools, text: str, prompt: bool
) -> tuple[list[Piece], bool]:
    """All contents with their positions, and whether they include the turns of other roles than the assistant.

    A template may convert the turns of other roles (to JSON, for example); then only the assistant's turns are located.
    Raises Unrenderable.
    """
    for every in (True, False):
        pieces: list[Piece] = []
        base = "Zx7q"
        while base in text:
            base += "k"
        probe = [
            masked(template, message, turn, base, pieces) if every or message["role"] == "assistant" else message
            for turn, message in enumerate(messages)
        ]
        try:
            written = template.render(probe, prompt=prompt, tools=tools)
        except Unrenderable:
            continue
        if _put_back(written, base, pieces) == text:
            return pieces, every
    raise Unrenderable("the chat template writes an answer in a way that it cannot be located in the text")


def masked(template: Template, message: Message, turn: int, base: str, pieces: list[Piece]) -> Message:
    """The message with markers of the same shape in place of its texts."""

    def marker(kind: str, core: str) -> str:
        pieces.append(Piece(turn, kind, core))
        return f"{base}{len(pieces) - 1}Z"

    def shaped(text: str, kind: str) -> str:
        parts, at, thought_ends = [], 0, text.rfind(CLOSE) if message["role"] == "assistant" else -1
        for match in [*template.literals.finditer(text), None]:
            end = match.start() if match else len(text)
            between = text[at:end]
            if core := between.strip():
                what = "thought" if at < thought_ends else kind
                between = lead(between) + marker(what, core) + tail(between)
            parts.append(between + (match[0] if match else ""))
            at = match.end() if match else end
        return "".join(parts)

    new = {**message, "content": shaped(message["content"], "answer")}
    if message.get(THOUGHT):
        new[THOUGHT] = shaped(message[THOUGHT], "thought")
    if message.get("tool_calls"):
        new["tool_calls"] = [
            {**call, "function": {**call["function"], "name": marker("call", call["function"]["name"])}}
            for call in message["tool_calls"]
        ]
    return new


def _put_back(written: str, base: str, pieces: list[Piece]) -> str:
    """The text with every marker replaced by its piece; records the position of each piece."""
    parts, at, length = [], 0, 0
    for match in re.finditer(re.escape(base) + r"(\d+)Z", written):
        piece = pieces[int(match[1])]
        between = written[at : match.start()]
        parts += [between, piece.text]
        length += len(between)
        piece.at.append((length, length + len(piece.text)))
        length += len(piece.text)
        at = match.end()
    return "".join([*parts, written[at:]])


def check_nothing_lost(messages: list[Message], pieces: list[Piece], every: bool, text: str, lenient: bool) -> None:
    """Raise Unrenderable if a content is missing from the text, or an answer is written twice.

    Thoughts may be missing; with `lenient`, the turns of other roles than the assistant, too.
    """
    for piece in pieces:
        if piece.at and (len(piece.at) == 1 or piece.kind == "call" or messages[piece.turn]["role"] != "assistant"):
            continue
        if piece.at:
            raise Unrenderable("the chat template writes an answer twice")
        role = messages[piece.turn]["role"]
        if piece.kind == "call":
            raise Unrenderable("the chat template does not write tool calls; name one that does in model.chat_template")
        if piece.kind == "answer" and role == "assistant":
            beside = messages[piece.turn].get("tool_calls")
            raise Unrenderable(
                f"the chat template leaves out {'the text beside a tool call' if beside else 'an answer'}"
            )
        if piece.kind == "answer" and not lenient:
            raise _lost(role)
    for message in messages if not every and not lenient else []:
        if message["role"] != "assistant" and not all(word in text for word in message["content"].split()[:3]):
            raise _lost(message["role"])


def _lost(role: str) -> Lost:
    return Lost(f"the chat template leaves out a turn of role '{role}'; name another in model.chat_template")


def check_tools(text: str, tools: Tools) -> None:
    names = [(tool.get("function") or tool).get("name", "") for tool in tools or []]
    if any(name not in text for name in names):
        raise Unrenderable("the chat template does not write `tools`; name one that does in model.chat_template")
