"""Boundaries of a response in the rendered text: where it starts after the prompt, and the tokens that close its turn.

Results that do not depend on the contents are computed once, on a short probe conversation, and cached.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from os.path import commonprefix

from align_cli.data.contents import Piece, masked
from align_cli.data.template import Message, Template, Tools, Unrenderable, lead, tail

SAME = "Zq7x"
"""Placeholder content for renderings where only the text around it matters."""


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
    """The index in `text` where the response starts.

    `first` is the start of the response's first content, and `before` is the end of the last content in front of it.
    `adjacent` says whether that last content belongs to the turn directly before.
    """
    prompt_text = prompt_tail(template, messages, turn, tools)
    if prompt_text is None:
        return first
    window = text[before:first]
    if adjacent and window.startswith(prompt_text):
        return before + len(prompt_text)
    at = window.rfind(prompt_text) if prompt_text else -1
    if at >= 0:
        return before + at + len(prompt_text)
    # the generation prompt may end with text that the conversation lacks, such as an opened thought
    if adjacent and (kept := _whole(template, window, len(commonprefix([window, prompt_text])))):
        # the header is not part of the answer, even if the white space around it differs
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
    """`length`, or where a special token starts that a cut at `length` would split."""
    return next((m.start() for m in template.specials.finditer(text) if m.start() < length < m.end()), length)


def prompt_tail(template: Template, messages: list[Message], turn: int, tools: Tools) -> str | None:
    """The text from the end of the last content before `turn` to the end of the generation prompt; None if that content
    cannot be found.

    It is rendered without the earlier turns: a user turn after the system turn alone, another turn after the last user
    turn and the assistant turn whose call it answers. Only for a template that refuses such a conversation, and for
    conversations without a user turn, all turns before it are rendered, which is quadratic in the number of tool turns.
    """
    if turn == 0:
        return ""
    before, head = messages[turn - 1], _head(messages, turn - 1)
    key = None
    if before["role"] == "user":
        key = ("asked", tuple(template.shape(each["content"]) for each in head), tail(before["content"]), bool(tools))
        context = head
    else:
        context = _asked(messages, turn - 1)
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
    """The span, extended by the tokens that close its turn.

    `then` is the text between the turn's last content and the next content. `other` is that text in the opposite case:
    for the last turn, if a user turn followed; for an earlier turn, if the conversation ended with it. The turn is
    closed by what both have in common.
    """
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
    """The text after an answer like this one, (1) if the conversation ends with it and (2) if a user turn follows, and
    how often the template writes the name of a called function.

    A text is None if the template refuses such a conversation; (2) is always None for tool calls.
    """
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
    """Special tokens that open a turn, so they never end one."""
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
    """The header of an answer: what the generation prompt adds after a user turn."""
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


def _asked(messages: list[Message], at: int) -> list[Message]:
    """The turns that a tool's or assistant's turn at `at` needs before it: the system turn, the last user turn, and the
    assistant's call with the results before this one. All turns without a user turn."""
    user = next((number for number in reversed(range(at)) if messages[number]["role"] == "user"), None)
    if user is None:
        return messages[:at]
    call = next((number for number in reversed(range(user, at)) if messages[number]["role"] == "assistant"), at)
    return [*_head(messages, at), messages[user], *messages[call:at]]


def _head(messages: list[Message], turn: int) -> list[Message]:
    """The system turn, if the conversation opens with one before `turn`."""
    return messages[:1] if turn > 0 and messages[0]["role"] == "system" else []
