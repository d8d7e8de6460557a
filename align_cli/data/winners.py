"""Two answers and a column that says which is better, by an index, a name or a strength.

PKU-SafeRLHF, SHP, HelpSteer2, TL;DR comparisons and arenas store their preferences this way.
"""

from __future__ import annotations

import math
from typing import Any

from align_cli.data.trouble import Broken, Dropped

ANSWERS = ("response", "answer", "output", "completion", "summary", "model_output", "assistant")
ENDS = (("_0", "_1"), ("_a", "_b"), ("_A", "_B"), ("_1", "_2"), ("1", "2"))
RECOGNISED = ("better_response_id", "winner")
"""Columns whose only meaning is which answer is better; used without being named in the source."""
SUSPECTED = (
    *("chosen_index", "preference", "preferred", "choice", "labels", "label", "overall_preference"),
    *("preference_strength", "safer_response_id", "better_id"),
)
"""Columns that may have this meaning; the source confirms one of them with `columns: { better: … }`."""
STRENGTHS = ("strength", "margin")
"""Part of a column's name, if the column holds by how much the second answer is better (negative: the first)."""
TIES = ("tie", "both", "neither", "equal", "same", "none", "tie (bothbad)")


def pair(columns: Any) -> tuple[str, str] | None:
    """The columns of the two answers, or None."""
    return next(
        ((stem + a, stem + b) for stem in ANSWERS for a, b in ENDS if stem + a in columns and stem + b in columns), None
    )


def answers(row: dict[str, Any]) -> tuple[list[Any], tuple[str, str]]:
    """The two answers and their names. Raises Broken."""
    if pair_of := pair(row):
        return [row[name] for name in pair_of], pair_of
    listed = row.get("responses")
    if isinstance(listed, list) and len(listed) == 2:
        return listed, ("response_0", "response_1")
    raise Broken("'better' names one of two answers, but the row does not have two; give response_0 and response_1")


def better(row: dict[str, Any], names: tuple[str, str], strength: bool) -> tuple[int, float | None]:
    """(index of the better answer, by how much it is better or None). Raises Broken, Dropped for a tie."""
    value = row["better"]
    number = _number(value)
    if number is not None and (strength or number < 0 or number % 1):
        if not number:
            raise Dropped("a tie", str(value))
        return int(number > 0), abs(number)
    if number is not None:
        first = 1 if names[0].endswith("1") else 0
        if number - first in (0, 1):
            return int(number - first), None
        raise Broken(
            f"'better' is {value!r:.20}, but the answers are {names[0]} and {names[1]}; give {first} or {first + 1}"
        )
    word = str(value).strip().lower()
    if word in TIES or word.startswith("tie"):
        raise Dropped("a tie", str(value))
    for index, name in enumerate(names):
        end = name.lower().rpartition("_")[2] if "_" in name else name[-1]
        if word in (
            name.lower(),
            end,
            f"model_{end}",
            f"response_{end}",
            f"assistant_{end}",
            "ab"[index],
            f"model_{'ab'[index]}",
        ):
            return index, None
    raise Broken(f"'better' is {value!r:.40}; it may be 0 or 1, a or b, model_a or model_b, {names[0]} or {names[1]}")


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return float(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
