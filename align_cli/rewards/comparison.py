"""AI feedback (Constitutional AI, arXiv 2212.08073, §4): which of two answers is better, as a probability.

The judge compares the answers as (A) and (B), then swapped, and the two probabilities are averaged (RLAIF, arXiv
2309.00267, §2.1), which cancels a preference for a letter or a position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Message = dict[str, str]
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System", "tool": "Tool"}


def question(prompt: list[Message], comparison: str, first: str, second: str) -> str:
    """The multiple-choice question with `first` as (A) (§4.1 of the paper)."""
    conversation = "\n\n".join(f"{ROLES[turn['role']]}: {turn['content']}" for turn in prompt)
    return (
        f"Consider the following conversation between a human and an assistant:\n\n{conversation}\n\n{comparison}\n\n"
        f"Options:\n(A) {first}\n\n(B) {second}"
    )


def probability(logp_a: float, logp_b: float) -> float:
    """P(A) = exp(logp_A) / (exp(logp_A) + exp(logp_B))."""
    return 1 / (1 + math.exp(min(logp_b - logp_a, 700.0)))


def clamped(p: float, bounds: Sequence[float] | None) -> float:
    """The probability clamped to the bounds (§4.1: 0.4 to 0.6 after a chain of thought)."""
    return min(max(p, bounds[0]), bounds[1]) if bounds else p


def label(p_first_as_a: float, p_second_as_a: float, bounds: Sequence[float] | None = None) -> float:
    """P(the first answer is better): P(A) with it as (A), and 1 - P(A) with it as (B), averaged."""
    return (clamped(p_first_as_a, bounds) + 1 - clamped(p_second_as_a, bounds)) / 2


def bias(p_first_as_a: float, p_second_as_a: float) -> float:
    """Preference for (A) regardless of the answer: 0 for a judge that considers only the answers, ±0.5 for one that
    considers only the letter."""
    return (p_first_as_a + p_second_as_a) / 2 - 0.5


def disagree(p_first_as_a: float, p_second_as_a: float) -> bool:
    """Whether the two orders prefer different answers."""
    return (p_first_as_a - 0.5) * (p_second_as_a - 0.5) > 0


def no_pair(answers: Sequence[str]) -> str:
    """Why two answers cannot be compared, or the empty string."""
    if not all(text.strip() for text in answers):
        return "an answer is empty"
    return "the answers are the same" if answers[0] == answers[1] else ""
