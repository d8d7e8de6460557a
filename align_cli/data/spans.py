"""Locates each assistant turn in a rendered conversation, and verifies the result on the row itself.

The conversation is rendered once as it is, and once with markers in place of the contents (`contents`), which shows
what the template writes between them. A turn's response begins where the generation prompt ends and stops with the
tokens that close the turn (`boundaries`). If the template marks responses itself (`{% generation %}`), or TRL has a
training template for its family that does so and writes the same text, those marks are used.

The cost is linear in the conversation's length: three renderings of it, and short probe renderings that are cached.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass, field, replace
from itertools import islice
from os.path import commonprefix

from align_cli.data.boundaries import SAME, Span, closings, find_start, find_stop, header_of, openers, prompt_tail
from align_cli.data.contents import Lost, Piece, check_nothing_lost, check_tools, place
from align_cli.data.template import CLOSE, OPEN, THOUGHT, Message, Template, Tools, Unrenderable, lead, opened


@dataclass
class Rendering:
    """A rendered conversation, and the spans of its responses."""

    text: str
    spans: list[Span]
    notes: list[str] = field(default_factory=list)
    """Notes for the user that apply to every row like this one."""


def find(template: Template, messages: list[Message], turns: list[int], tools: Tools = None) -> Rendering:
    """The rendered conversation with the response of each of the assistant `turns` (indices, in order).

    Raises Unrenderable if the template refuses the conversation, leaves something out, or renders it so that its turns
    cannot be distinguished.
    """
    messages, tools = opened(messages, tools)
    if turns[-1] == len(messages) - 1 and _says_nothing(messages[-1]):
        return _of_nothing(template, messages, turns, tools)
    prompt = template.render(messages[: turns[-1]], prompt=True, tools=tools)
    try:
        text, spans, answers = _spans(template, messages, turns, tools)
        rendering = Rendering(text, spans, _agreed(template, messages, spans, tools, text, prompt))
    except Lost:
        # Mistral's templates write the system turn only if a user turn comes last, as in a prompt
        rendering, answers = _behind_prompt(template, messages, turns, tools, prompt), {}
    last = rendering.spans[-1]
    answer = rendering.text[last.start : last.stop]
    if _thought(messages[last.turn]) and not _holds_thought(messages[last.turn], answer):
        rendering.notes.append(
            "the chat template leaves out the thought of an answer, so that only the answer is trained; set "
            "data.reasoning=drop to accept this, or model.chat_template to a template that writes thoughts"
        )
    # where a thought is left out, the empty thought that some templates write instead is not trained
    for at, span in enumerate(rendering.spans):
        alone = answers.get(span.turn)
        if alone is not None and any(mark in rendering.text[span.start : alone] for mark in (OPEN, "[THINK]")):
            rendering.spans[at] = replace(span, start=alone)
    return rendering


def _spans(
    template: Template, messages: list[Message], turns: list[int], tools: Tools
) -> tuple[str, list[Span], dict[int, int]]:
    """The text, the spans, and turn -> start of the answer where its thought is left out. Raises Unrenderable."""
    plain = template.render(messages, tools=tools)
    check_tools(plain, tools)
    spans, text = _by_marks(template, messages, turns, tools, plain) if template.with_marks else (None, plain)
    if spans is None:
        return plain, *_by_probe(template, messages, turns, tools, plain)
    direct = all(_asked_before(template, messages, span, tools, text) for span in spans)
    if direct and not any(map(_thought, messages)):
        return text, spans, {}
    # marks may include a part of the generation prompt, and thoughts may be written as empty
    proved, answers = _by_probe(template, messages, turns, tools, plain)
    return text, [replace(s, start=max(s.start, p.start)) for s, p in zip(spans, proved, strict=True)], answers


def _agreed(
    template: Template, messages: list[Message], spans: list[Span], tools: Tools, text: str, prompt: str
) -> list[str]:
    """Set the start of the last span to the end of the generation prompt. Returns notes on any mismatch."""
    last = spans[-1]
    if not text.startswith(prompt) or len(prompt) > last.stop:
        added = prompt[len(commonprefix([prompt, text])) :]
        return [
            f"the generation prompt writes {_short(added)}, which is not in the trained text: generation starts from "
            "other tokens than training; set model.chat_template to a template whose generation prompt is a "
            "prefix of the answer"
        ]
    # a template's own marks may exclude text that it writes in front of an answer
    start, notes = max(last.start, len(prompt)) if template.own_marks else len(prompt), []
    header = header_of(template)
    if header and text.startswith(header, start):
        start += len(header)
        notes.append(f"the generation prompt lacks the header of an answer ({_short(header)}) after some turns")
    spans[-1] = last = replace(last, start=start)
    return notes + _without_prompt(template, messages[: last.turn], prompt, text, last, tools)


def _says_nothing(message: Message) -> bool:
    return not (message["content"].strip() or message.get("tool_calls") or message.get(THOUGHT))


def _of_nothing(template: Template, messages: list[Message], turns: list[int], tools: Tools) -> Rendering:
    """For an empty last answer: rendered with a placeholder as the answer, which is then removed from the text."""
    rendering = find(template, [*messages[:-1], {**messages[-1], "content": SAME}], turns, tools)
    last = rendering.spans[-1]
    written = rendering.text[last.start : last.stop].replace(SAME, "", 1)
    rendering.spans[-1] = replace(last, stop=last.start + len(written))
    return replace(rendering, text=rendering.text[: last.start] + written)


def _behind_prompt(
    template: Template, messages: list[Message], turns: list[int], tools: Tools, prompt: str
) -> Rendering:
    """The last answer appended to its rendered prompt, which holds turns that the whole rendering lacks.

    Raises Unrenderable.
    """
    text = template.render(messages, tools=tools)
    spans, _ = _by_probe(template, messages, turns[-1:], tools, text, lenient=True)
    before, _ = _by_probe(template, messages[: turns[-1]], turns[:-1], tools, prompt, prompt=True)
    answer = text[spans[0].start : spans[0].stop]
    last = replace(spans[0], start=len(prompt), stop=len(prompt) + len(answer))
    return Rendering(prompt + answer, [*before, last])


def ending(template: Template, head: list[Message] | None = None) -> str | None:
    """The text of the special token that closes an answer; None if the template writes no such token.

    The system turn in `head` opens the probe conversation, for templates that require one. Raises Unrenderable.
    """
    head = [message for message in head or [] if message["role"] == "system"][:1]
    messages = [*head, {"role": "user", "content": SAME}, {"role": "assistant", "content": SAME + "b"}]
    rendering = find(template, messages, [len(messages) - 1])
    span = rendering.spans[-1]
    if not span.closed:
        return None
    return [match[0] for match in template.specials.finditer(rendering.text, span.start, span.stop)][-1]


def _by_marks(
    template: Template, messages: list[Message], turns: list[int], tools: Tools, text: str
) -> tuple[list[Span] | None, str]:
    """The spans between generation marks (None if unusable), and the text, which may end with one more end token."""
    marked = template.marked(messages, tools)
    if marked is None:
        return None, text
    written, blocks = marked
    more = written[len(text) :]
    if not written.startswith(text) or (more and not template.specials.fullmatch(more)):
        return None, text
    assistants = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    if len(blocks) < len(assistants):
        return None, text
    spans = []
    for turn, (start, stop) in zip(assistants, blocks, strict=False):
        content = messages[turn]["content"].split(CLOSE)[-1].strip()
        if not content or written.find(content, start, stop) < 0:
            return None, text
        if turn in turns:
            spans.append(_closed_block(template, written, turn, start, stop))
    return spans, written


def _asked_before(template: Template, messages: list[Message], span: Span, tools: Tools, text: str) -> bool:
    """Whether the response directly follows the generation prompt."""
    return text.endswith(prompt_tail(template, messages, span.turn, tools) or "", 0, span.start)


def _closed_block(template: Template, text: str, turn: int, start: int, stop: int) -> Span:
    """The span of a marked block, with the special token that ends it, which may come after the mark."""
    inside = len(text[start:stop].rstrip())
    ends = [match.end() for match in template.specials.finditer(text, start, start + inside)]
    if ends and ends[-1] == start + inside:
        return Span(turn, start, ends[-1], True)
    gap = len(lead(text[stop:]))
    behind = template.specials.match(text, stop + gap)
    if behind and behind[0] not in openers(template):
        return Span(turn, start, behind.end(), True)
    return Span(turn, start, stop, False)


def _by_probe(
    template: Template,
    messages: list[Message],
    turns: list[int],
    tools: Tools,
    text: str,
    *,
    prompt: bool = False,
    lenient: bool = False,
) -> tuple[list[Span], dict[int, int]]:
    """The spans, and turn -> start of the answer for turns whose thought is left out.

    `prompt`: the text ends with a generation prompt. `lenient`: it may lack turns of other roles than the assistant.
    Raises Unrenderable.
    """
    pieces, every = place(template, messages, tools, text, prompt)
    check_nothing_lost(messages, pieces, every, text, lenient)
    spots = sorted((start, stop, piece.turn) for piece in pieces for start, stop in piece.at)
    written: dict[int, list[Piece]] = {}
    for piece in pieces:
        if piece.at:
            written.setdefault(piece.turn, []).append(piece)
    spans, alone = [], {}
    for turn in turns:
        own = written.get(turn)
        if not own:
            raise Unrenderable("the chat template leaves out an assistant turn")
        ended, followed, times = closings(template, messages, turn, tools)
        first = min(piece.at[0][0] for piece in own)
        last = max(piece.at[min(times, len(piece.at)) - 1 if piece.kind == "call" else 0][1] for piece in own)
        at = bisect(spots, (first, 0, 0))
        _, before, whose = next((spots[k] for k in range(at - 1, -1, -1) if spots[k][2] != turn), (0, 0, -1))
        behind = bisect(spots, (last, 0, 0))
        # the names of called functions may also occur in the header of a tool turn
        after, _, _ = next((spot for spot in islice(spots, behind, None) if spot[2] != turn), (len(text), 0, 0))
        start = find_start(template, messages, turn, tools, text, before, first, whose == turn - 1)
        answers = [piece.at[0][0] for piece in own if piece.kind != "thought"]
        if _thought(messages[turn]) and answers and not any(piece.kind == "thought" for piece in own):
            alone[turn] = min(answers)
        other = followed if turn == len(messages) - 1 else ended
        span = find_stop(template, Span(turn, start, last, False), text[last:after], other, turn == len(messages) - 1)
        if span.start < before or span.stop > after:
            raise Unrenderable("the chat template writes another turn inside of an answer")
        spans.append(span)
    return spans, alone


def _without_prompt(
    template: Template, before: list[Message], prompt: str, text: str, last: Span, tools: Tools
) -> list[str]:
    """A note if the template has no generation prompt, so that the assistant's header is part of the answer."""
    if "opens" not in template.cache:
        template.cache["opens"] = prompt != template.render(before, tools=tools)
    if template.cache["opens"]:
        return []
    written = text[last.start : last.stop]
    match = template.specials.search(written)
    if match is None or written[: match.start()].strip():
        return []
    header = written[: match.end()] + written[match.end() :].split("\n")[0]
    return [
        f"the chat template has no generation prompt: the header of an answer ({_short(header)}) is trained as part of "
        "it, but generation starts without it; add `{% if add_generation_prompt %}…{% endif %}` with that header"
    ]


def _thought(message: Message) -> bool:
    return message["role"] == "assistant" and (
        bool((message.get(THOUGHT) or "").strip()) or (CLOSE in message["content"])
    )


def _holds_thought(message: Message, written: str) -> bool:
    thought = (message.get(THOUGHT) or message["content"].rsplit(CLOSE, 1)[0].replace(OPEN, "")).strip()
    return thought[:40] in written


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}…")
