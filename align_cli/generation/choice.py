"""A model's choice between (A) and (B): log-probabilities of the letter, or the letter parsed from its reply.

Shapes: b questions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

LEAD = "The answer is: ("
"""Prefix of the reply, up to the letter."""
REASON = "Let's think step by step."
LETTER_ONLY = "Answer with (A) or (B) only."
CHOICE = re.compile(
    r"\(\s*([AB])\s*\)|\b(?:[Aa]nswer|[Oo]ption|[Rr]esponse|[Cc]hoice)(?: is)?\W{0,3}([AB])\b|\A\W*([AB])\b(?!\s+\w)"
)

THOUGHT = "</think>"
"""End of a reply's reasoning, in which letters choose nothing."""
LEAST = -1e4
"""Log-probability that stands for 0: servers send -inf, -9999, or null."""

LogProbs = tuple[float, float]
"""(log p(A), log p(B))."""


def letters(encode: Callable[[str], list[int]], text: str) -> tuple[list[int], int, int]:
    """(ids before the choice, first id of A, first id of B) for a text that ends right before the letter.

    A tokenizer may merge the letter with the characters before it, so both full texts are encoded and compared.
    """
    one, other = encode(f"{text}A)"), encode(f"{text}B)")
    at = next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[:at], one[at], other[at]


@torch.no_grad()
def choose(model: PreTrainedModel, questions: Sequence[tuple[list[int], int, int]], pad: int) -> list[LogProbs]:
    """(log p(A), log p(B)) of each question from `letters`, at the position of the letter, in one forward pass."""
    t = max(len(ids) for ids, _, _ in questions)
    device = model.device
    ids = torch.tensor([[pad] * (t - len(row)) + row for row, _, _ in questions], device=device)
    seen = torch.tensor([[0] * (t - len(row)) + [1] * len(row) for row, _, _ in questions], device=device)
    places = (seen.cumsum(1) - 1).clamp(min=0)
    logits: Tensor = model(input_ids=ids, attention_mask=seen, position_ids=places, logits_to_keep=1).logits[:, -1]
    shares = logits.float().log_softmax(-1)
    which = torch.tensor([[a, b] for _, a, b in questions], device=device)
    return [(a, b) for a, b in shares.gather(1, which).tolist()]


def read_choice(text: str) -> str | None:
    """The letter that a reply chooses, after its reasoning; None if it names neither or both."""
    text = text.rpartition(THOUGHT)[2]
    chosen = {letter for groups in CHOICE.findall(text) for letter in groups if letter}
    return chosen.pop() if len(chosen) == 1 else None


def read_log_probabilities(tokens: Any) -> LogProbs | None:
    """(log p(A), log p(B)) from the `logprobs.content` of a chat completion, at its first token that is A or B.

    A letter that is not listed gets the smallest listed probability, which is an upper bound. None if no token is a
    letter. Reasoning is skipped, and so is an article at the start of a sentence (`A better answer …`).
    """
    entries = [entry for entry in tokens if isinstance(entry, dict)] if isinstance(tokens, list) else []
    texts = [str(entry.get("token") or "") for entry in entries]
    thought = "".join(texts).rfind(THOUGHT)
    seen = 0
    for at, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        seen += len(text)
        if seen <= thought + len(THOUGHT) * (thought >= 0) or _letter(text) is None:
            continue
        if re.match(r"\s+[a-z]", "".join(texts[at + 1 :])) and "(" not in "".join(texts[: at + 1]):
            continue
        listed = _listed(entry.get("top_logprobs")) | _listed([entry])
        sums = {}
        for name in "AB":
            values = [value for token, value in listed.items() if _letter(token) == name]
            sums[name] = _summed(values) if values else min(listed.values(), default=LEAST)
        return (sums["A"], sums["B"]) if listed else None
    return None


def _listed(alternatives: Any) -> dict[str, float]:
    """Token -> log-probability of a list of alternatives, or of a mapping as in completions, where it is a number."""
    if isinstance(alternatives, dict):
        alternatives = [{"token": token, "logprob": value} for token, value in alternatives.items()]
    pairs = [
        (one.get("token"), one.get("logprob"))
        for one in (alternatives if isinstance(alternatives, list) else [])
        if isinstance(one, dict)
    ]
    return {
        token: min(max(float(value), LEAST), 0.0)
        for token, value in pairs
        if isinstance(token, str)
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and not math.isnan(value)
    }


def _summed(values: list[float]) -> float:
    """log Σ exp; LEAST if all are as good as 0."""
    most = max(values)
    return max(most + math.log(sum(math.exp(value - most) for value in values)), LEAST)


def _letter(token: str) -> str | None:
    """A or B if the token is that letter, with or without brackets and whitespace; else None."""
    bare = re.sub(r"[\s()\[\]*.:\"'▁Ġ]", "", token)
    return bare if bare in ("A", "B") else None
