"""What the template writes round an answer: where the response begins behind a prompt, and the tokens that close it.

What cannot depend on the words is asked once, of a short conversation, and kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from os.path import commonprefix

from align_cli.data.contents import Piece, masked
from align_cli.data.template import Message, Template, Tools, Unrenderable, lead, tail

SAME = "Zq7x"
"""Stands for a content where only what is written round it matters."""


@dataclass(frozen=True)
class Span:
    """One assistant turn's response in the text."""

    turn: int
    """Index of the message."""
    start: int
    stop: int
    """End of the tokens that close the turn."""
    closed: bool
    """Whether a special token closes the turn."""


def find_start(
    template: Template,
    messages: list[Message],
    turn: int,
    tools: Tools,
    text: str,
    before: int,
    first: int,
    adjacent: bool,
) -> int:
    """Where the response begins whose first content stands at `first`; the last content before it ends at `before`,
    and is that of the turn before it if `adjacent`."""
    prompt_text = prompt_tail(template, messages, turn, tools)
    if prompt_text is None:
        return first
    window = text[before:first]
    if adjacent and window.startswith(prompt_text):
        return before + len(prompt_text)
    at = window.rfind(prompt_text) if prompt_text else -1
    if at >= 0:
        return before + at + len(prompt_text)
    # a generation prompt that holds more than the template keeps of it, such as an opened thought
    if adjacent and (kept := _whole(template, window, len(commonprefix([window, prompt_text])))):
        # with other white space round it, the header of an answer is still none of the answer
        header = header_of(template).strip()
        behind = window.find(header, kept) if header else -1
        if behind < 0:
            return before + kept
        return before + behind + len(header) if window[behind + len(header) :].strip() else first
    for length in range(len(prompt_text) - 1, len(prompt_text) - len(header_of(template)), -1):
        if (at := window.rfind(prompt_text[:length])) >= 0:
            return before + _whole(template, window, at + length)
    return first


def _whole(template: Template, text: str, length: int) -> int:
    """The length without a part of a special token at its end."""
    return next((m.start() for m in template.specials.finditer(text) if m.start() < length < m.end()), length)


def prompt_tail(template: Template, messages: list[Message], turn: int, tools: Tools) -> str | None:
    """What the template writes from the end of the last content to where the assistant is to answer; None where that
    content cannot be found."""
    if turn == 0:
        return ""
    before, head = messages[turn - 1], _head(messages, turn - 1)
    key = None
    if before["role"] == "user":
        key = ("asked", tuple(template.shape(each["content"]) for each in head), tail(before["content"]), bool(tools))
        context = head
    else:
        asked_by = [at for at in range(turn - 1) if messages[at]["role"] == "user"]
        context = [*head, *messages[asked_by[-1] : turn - 1]] if asked_by else messages[: turn - 1]
    if key is None or key not in template.cache:
        tail_text = None
        content = lead(before["content"]) + SAME + tail(before["content"])
        for shown in (context, messages[: turn - 1]):
            try:
                written = template.render([*shown, {**before, "content": content}], prompt=True, tools=tools)
            except Unrenderable:
                continue
            at = written.rfind(SAME)
            tail_text = written[at + len(SAME) :] if at >= 0 else None
            break
        if key is None:
            return tail_text
        template.cache[key] = tail_text
    return template.cache[key]


def find_stop(template: Template, span: Span, then: str, other: str | None, is_last: bool) -> Span:
    """The span with the tokens that close its turn. Of the text `then`, which follows its last content up to the next
    one, that is what the template also writes where the conversation goes on (or stops) in the `other` way."""
    gap = len(lead(then))
    shared = len(commonprefix([then.lstrip(), (other or "").lstrip()]))
    ends = [match for match in template.specials.finditer(then) if match.end() <= gap + shared]
    if ends and other is not None:
        return replace(span, stop=span.stop + ends[-1].end(), closed=True)
    run = template.specials.search(then)
    if run and (is_last or run[0] not in openers(template)):
        stop = run.end()
        while is_last and (more := template.specials.match(then, stop)):
            stop = more.end()
        return replace(span, stop=span.stop + stop, closed=True)
    return replace(span, stop=span.stop + len(then[: gap + shared].rstrip()))


def closings(
    template: Template, messages: list[Message], turn: int, tools: Tools
) -> tuple[str | None, str | None, int]:
    """What the template writes after an answer like this one where the conversation ends with it, and where a user
    turn follows; None where it refuses such a conversation. And how often it writes the name of a called function."""
    head, message = _head(messages, turn), messages[turn]
    called = bool(message.get("tool_calls"))
    key = ("closings", tuple(template.shape(each["content"]) for each in head), bool(tools))
    if not called and key in template.cache:
        return template.cache[key]
    pieces: list[Piece] = []
    answer = {"role": "assistant", "content": SAME}
    if called:
        answer = masked(template, {**message, "content": SAME if message["content"].strip() else ""}, 0, SAME, pieces)
    mark = f"{SAME}{len(pieces) - 1}Z" if called else SAME
    user = {"role": "user", "content": "q"}
    texts: list[str | None] = []
    times = 1
    for more in ([], [{"role": "user", "content": "Zend"}]):
        if called and more:
            texts.append(None)
            continue
        try:
            written = template.render([*head, user, answer, *more], tools=tools)
        except Unrenderable:
            texts.append(None)
            continue
        times = max(times, written.count(mark))
        behind = written[written.rfind(mark) + len(mark) :] if mark in written else None
        texts.append(behind.split("Zend")[0] if behind is not None and more else behind)
    if not called:
        template.cache[key] = (texts[0], texts[1], times)
    return texts[0], texts[1], times


def openers(template: Template) -> set[str]:
    """Special tokens that open a turn, which are never the end of one."""
    if "openers" not in template.cache:
        marks: set[str] = set()
        user = {"role": "user", "content": SAME}
        for head in ([], [{"role": "system", "content": "s"}]):
            try:
                written = template.render([*head, user], prompt=True)
            except Unrenderable:
                continue
            before, behind = written.split(SAME)[0], template.render([*head, user]).split(SAME)[-1]
            closes = template.specials.search(behind)
            marks |= {match[0] for match in template.specials.finditer(before)} - {closes[0] if closes else ""}
        template.cache["openers"] = marks
    return template.cache["openers"]


def header_of(template: Template) -> str:
    """What the generation prompt adds behind a user turn: the header of an answer."""
    if "header" not in template.cache:
        header = ""
        for head in ([], [{"role": "system", "content": "s"}]):
            turns = [*head, {"role": "user", "content": SAME}]
            try:
                plain, with_prompt = template.render(turns), template.render(turns, prompt=True)
            except Unrenderable:
                continue
            header = with_prompt[len(plain) :] if with_prompt.startswith(plain) else ""
            break
        template.cache["header"] = header
    return template.cache["header"]


def _head(messages: list[Message], turn: int) -> list[Message]:
    """The system turn, if the conversation opens with one before `turn`."""
    return messages[:1] if turn > 0 and messages[0]["role"] == "system" else []
