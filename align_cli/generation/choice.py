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
    """The letter that a reply chooses; None if it names neither or both."""
    chosen = {letter for groups in CHOICE.findall(text) for letter in groups if letter}
    return chosen.pop() if len(chosen) == 1 else None


def read_log_probabilities(tokens: Sequence[dict[str, Any]]) -> LogProbs | None:
    """(log p(A), log p(B)) from the `logprobs.content` of a chat completion, at its first token that is A or B.

    A letter that is not listed gets the smallest listed probability, which is an upper bound. None if no token is a
    letter.
    """
    for entry in tokens:
        if _letter(entry["token"]) is None:
            continue
        listed = [*entry.get("top_logprobs", []), {"token": entry["token"], "logprob": entry["logprob"]}]
        # the chosen token is also in its own list of alternatives
        listed = list({item["token"]: item["logprob"] for item in listed}.items())
        sums = {}
        for name in "AB":
            values = [value for token, value in listed if _letter(token) == name]
            sums[name] = math.log(sum(map(math.exp, values))) if values else min(value for _, value in listed)
        return sums["A"], sums["B"]
    return None


def _letter(token: str) -> str | None:
    """A or B if the token is that letter, with or without brackets and whitespace; else None."""
    bare = re.sub(r"[\s()\[\]*.:\"'▁Ġ]", "", token)
    return bare if bare in ("A", "B") else None
