"""Critiques and revisions (Constitutional AI, arXiv 2212.08073, §3): the turns that ask for them, and what came back.

A small model answers with an empty line, with the request itself, with a text it was shown, or with its own answer once
more. Each is given a name here and counted, never passed over.
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
"""`Critique:`, `Revised answer:`, `Here is the rewritten response:` before what was asked for."""
ROLE = re.compile(r"(?:\A|\n)\W*(?:human|user|assistant|system|critique request|revision request)\W*:", re.IGNORECASE)
"""Where a model goes on to speak for others."""
SENTENCE = re.compile(r"[.!?]['\")\]]*(?=\s|\Z)")


def conversation(
    prompt: list[Message],
    answer: str,
    exchanges: list[tuple[str, str]],
    request: str,
    examples: Sequence[Example] = (),
) -> list[Message]:
    """The conversation that ends with `request`: example dialogues, the prompt, its answer, and exchanges of request
    and reply."""
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
    # a system message of the prompt's own opens the whole conversation
    return [turn for turn in turns if turn["role"] == "system"] + [turn for turn in turns if turn["role"] != "system"]


def _turn(number: int, text: str) -> Message:
    return {"role": ("user", "assistant")[number], "content": text}


def parsed(text: str, requested: str, shown: Sequence[str] = ()) -> tuple[str, str]:
    """(what the model said, flag): without a label before it, quotes around it, or turns that it wrote for others.

    flag is "", "empty", "unparsable" where nothing is left, or the request comes back in place of an answer to it, or
    "copied" where it is one of the texts `shown` before.
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
    """(revision, flag) as `parsed`; "unchanged" where it is the answer before once more; of one that was `cut` at the
    limit, the whole sentences, and "cut"."""
    reply, flag = parsed(text, requested, shown)
    if not flag and _same(reply, before):
        flag = "unchanged"
    if cut and not flag:
        ends = [match.end() for match in SENTENCE.finditer(reply)]
        reply, flag = reply[: ends[-1]] if ends else reply, "cut"
    return reply, flag


def usable(flag: str) -> bool:
    """Whether a reply with this flag says something."""
    return flag not in LOST


def changed(before: str, after: str) -> float:
    """Share of words that a revision changed: 1 - 2·(longest common subsequence)/(words of both); 0 for the same."""
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
