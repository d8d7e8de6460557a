"""Critiques and revisions (Constitutional AI, arXiv 2212.08073, §3): builds the requests and parses the replies.

A small model may reply with an empty line, the request itself, a text from its context, or its previous answer. Each of
these replies gets a flag here, and the flags are counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from align_cli.data.turns import Message
from align_cli.recipe.constitution import Example
from align_cli.recipe.constitutional import LOST

Parser = Callable[[int, str, bool], tuple[str, str]]
"""(row, what the model wrote, whether it was cut at the limit) -> (text, flag)."""

LABEL = re.compile(
    r"\A\W*(?:here(?: is|['’]s) )?(?:the |my |a |an )?(?:critique|revised|revision|rewritten|new|improved|updated)?"
    r"\s*(?:critique|revision|version|answer|response|message)?(?: of (?:my|your|the) (?:last )?answer)?\W*:\W*",
    re.IGNORECASE,
)
"""`Critique:`, `Revised answer:`, `Here is the rewritten response:` at the start of a reply."""
ROLE = re.compile(r"(?:\A|\n)\W*(?:human|user|assistant|system|critique request|revision request)\W*:", re.IGNORECASE)
"""Start of a turn of another role that the model wrote itself."""
SENTENCE = re.compile(r"[.!?]['\")\]]*(?=\s|\Z)")


def conversation(
    prompt: list[Message],
    answer: str,
    exchanges: list[tuple[str, str]],
    request: str,
    examples: Sequence[Example] = (),
) -> list[Message]:
    """A conversation that ends with `request`: example dialogues, the prompt, its answer, earlier exchanges of request
    and reply, and the request."""
    turns: list[Message] = []
    for one in examples:
        for text in (
            *(one.prompt, one.answer, one.critique_request),
            *(one.critique, one.revision_request, one.revision),
        ):
            turns.append(_turn(len(turns) % 2, text))
    turns += [*prompt, _turn(1, answer)]
    for question, reply in exchanges:
        turns += [_turn(0, question), _turn(1, reply)]
    turns.append(_turn(0, request))
    # the prompt's system message must come first
    return [turn for turn in turns if turn["role"] == "system"] + [turn for turn in turns if turn["role"] != "system"]


def _turn(number: int, text: str) -> Message:
    return {"role": ("user", "assistant")[number], "content": text}


def parsed(text: str, requested: str, shown: Sequence[str] = ()) -> tuple[str, str]:
    """(reply, flag). Removes a leading label, surrounding quotes, and turns of other roles from the reply.

    flag is "", "empty", "unparsable" if nothing is left or the reply repeats the request, or "copied" if the reply is
    one of the texts in `shown`.
    """
    if not text.strip():
        return "", "empty"
    reply = text.strip()
    if (label := LABEL.match(reply)) and ":" in label[0]:
        reply = reply[label.end() :].strip()
    if role := ROLE.search(reply):
        reply = reply[: role.start()].strip()
    if len(reply) > 1 and reply[0] == reply[-1] == '"' and reply.count('"') == 2:
        reply = reply[1:-1].strip()
    if not re.search(r"\w", reply) or _same(reply, requested) or _flat(reply).startswith(_flat(requested)):
        return "", "unparsable"
    return reply, "copied" if any(_same(reply, one) for one in shown) else ""


def revised(text: str, requested: str, before: str, shown: Sequence[str] = (), *, cut: bool = False) -> tuple[str, str]:
    """(revision, flag) as `parsed`, with two more flags: "unchanged" if the revision equals the previous answer, and
    "cut" if it was `cut` at the token limit, in which case only complete sentences are kept."""
    reply, flag = parsed(text, requested, shown)
    if not flag and _same(reply, before):
        flag = "unchanged"
    if cut and not flag:
        ends = [match.end() for match in SENTENCE.finditer(reply)]
        reply, flag = reply[: ends[-1]] if ends else reply, "cut"
    return reply, flag


def usable(flag: str) -> bool:
    """Whether a reply with this flag can be used."""
    return flag not in LOST


def changed(before: str, after: str) -> float:
    """Share of words that a revision changed: 1 - 2·(longest common subsequence)/(words of both); 0 if equal."""
    one, other = _flat(before).split(), _flat(after).split()
    if not one and not other:
        return 0.0
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for at, rival in enumerate(other, 1):
            above = row[at]
            row[at] = diagonal + 1 if word == rival else max(row[at], row[at - 1])
            diagonal = above
    return 1 - 2 * row[-1] / (len(one) + len(other))


def _flat(text: str) -> str:
    return " ".join(text.lower().split())


def _same(one: str, other: str) -> bool:
    return _flat(one) == _flat(other)
