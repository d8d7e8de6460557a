"""Selects pairs from a prompt's sampled answers by their scores. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations


def picked(
    answers: Sequence[list[int] | str], scores: list[float], may_win: list[bool], *, how: str, min_gap: float, draw: int
) -> list[tuple[int, int]]:
    """(better, worse) indices of pairs whose scores differ by more than `min_gap`.

    `how` is best-worst, best-random (`draw` selects the other answer), all or adjacent. An answer with `may_win` False
    (it did not end) is never the better one. Equal answers count once, with their first score.
    """
    order = [at for at in range(len(answers)) if answers[at] not in answers[:at]]
    order.sort(key=lambda at: (-scores[at], at))
    best = next((at for at in order if may_win[at]), None)
    if best is None:
        return []
    others = [at for at in order if scores[best] - scores[at] > min_gap]
    match how:
        case "best-worst":
            return [(best, others[-1])] if others else []
        case "best-random":
            return [(best, others[draw % len(others)])] if others else []
        case "adjacent":
            pairs = list(zip(order, order[1:], strict=False))
        case _:
            pairs = list(combinations(order, 2))
    return [(w, l) for w, l in pairs if may_win[w] and scores[w] - scores[l] > min_gap]  # noqa: E741
