"""AI feedback (Constitutional AI, arXiv 2212.08073, §4): which of two answers, as a probability.

A judge is asked with the answers as (A) and (B), and again the other way round, and the two probabilities are averaged
(RLAIF, arXiv 2309.00267, §2.1), so that a liking for a letter or a place cancels out.

Shapes: b questions, v vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Message = dict[str, str]
LEAD = "The answer is: ("
"""What the judge's reply begins with, up to the letter."""
REASON = "Let's think step by step."
CHOICE = re.compile(
    r"\(\s*([AB])\s*\)|\b(?:[Aa]nswer|[Oo]ption|[Rr]esponse|[Cc]hoice)(?: is)?\W{0,3}([AB])\b|\A\W*([AB])\b(?!\s+\w)"
)
SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}


def question(prompt: list[Message], comparison: str, first: str, second: str) -> str:
    """The multiple-choice question with `first` as (A) (§4.1 of the paper)."""
    said = "\n\n".join(f"{SPEAKERS[turn['role']]}: {turn['content']}" for turn in prompt)
    return (
        f"Consider the following conversation between a human and an assistant:\n\n{said}\n\n{comparison}\n\n"
        f"Options:\n(A) {first}\n\n(B) {second}"
    )


def probability(logp_a: float, logp_b: float) -> float:
    """P(A) = exp(logp_A) / (exp(logp_A) + exp(logp_B))."""
    return 1 / (1 + math.exp(min(logp_b - logp_a, 700.0)))


def clamped(p: float, bounds: Sequence[float] | None) -> float:
    """The probability within the bounds (§4.1: 0.4 to 0.6 after a chain of thought)."""
    return min(max(p, bounds[0]), bounds[1]) if bounds else p


def label(p_first_as_a: float, p_second_as_a: float, bounds: Sequence[float] | None = None) -> float:
    """P(the first answer is better): P(A) with it as (A), and 1 - P(A) with it as (B), averaged."""
    return (clamped(p_first_as_a, bounds) + 1 - clamped(p_second_as_a, bounds)) / 2


def bias(p_first_as_a: float, p_second_as_a: float) -> float:
    """By how much (A) is favoured whatever stands there: 0 for a judge who looks at the answers only, ±0.5 for one
    who looks at the letter only."""
    return (p_first_as_a + p_second_as_a) / 2 - 0.5


def disagree(p_first_as_a: float, p_second_as_a: float) -> bool:
    """Whether the two orders prefer different answers."""
    return (p_first_as_a - 0.5) * (p_second_as_a - 0.5) > 0


def letters(encode: Any, text: str) -> tuple[list[int], int, int]:
    """(ids before the choice, id that begins A there, id that begins B) for a text that ends right before the letter.

    A tokenizer may join the letter with what stands before it, so both whole texts are encoded and compared.
    """
    one, other = encode(f"{text}A)"), encode(f"{text}B)")
    at = next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[:at], one[at], other[at]


@torch.no_grad()
def choose(model: Any, asked: Sequence[tuple[list[int], int, int]], pad: int) -> list[tuple[float, float]]:
    """(log p(A), log p(B)) of each question from `letters`, at the position of the letter, in one forward pass."""
    t = max(len(ids) for ids, _, _ in asked)
    device = model.device
    ids = torch.tensor([[pad] * (t - len(row)) + row for row, _, _ in asked], device=device)
    seen = torch.tensor([[0] * (t - len(row)) + [1] * len(row) for row, _, _ in asked], device=device)
    places = (seen.cumsum(1) - 1).clamp(min=0)
    logits: Tensor = model(input_ids=ids, attention_mask=seen, position_ids=places, logits_to_keep=1).logits[:, -1]
    shares = logits.float().log_softmax(-1)
    which = torch.tensor([[a, b] for _, a, b in asked], device=device)
    return [(a, b) for a, b in shares.gather(1, which).tolist()]


def read_choice(text: str) -> str | None:
    """The letter that a reply chooses; None where it names neither, or both."""
    found = {letter for groups in CHOICE.findall(text) for letter in groups if letter}
    return found.pop() if len(found) == 1 else None


def read_log_probabilities(tokens: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """(log p(A), log p(B)) from the `logprobs.content` of a chat completion: at its first token that is a letter.

    A letter that is not among the alternatives listed has at most the probability of the least of them. None where no
    token is a letter.
    """
    for entry in tokens:
        if _letter(entry["token"]) is None:
            continue
        listed = [*entry.get("top_logprobs", []), {"token": entry["token"], "logprob": entry["logprob"]}]
        # the chosen token is among its own alternatives
        listed = list({item["token"]: item["logprob"] for item in listed}.items())
        sums = {}
        for name in "AB":
            values = [value for token, value in listed if _letter(token) == name]
            sums[name] = math.log(sum(map(math.exp, values))) if values else min(value for _, value in listed)
        return sums["A"], sums["B"]
    return None


def _letter(token: str) -> str | None:
    """A or B, for a token that is that letter in brackets or blanks."""
    bare = re.sub(r"[\s()\[\]*.:\"'▁Ġ]", "", token)
    return bare if bare in ("A", "B") else None
