"""Selects and orders groups: the seeded eval split, the source weights, the mixture, and the pairs of a ranking.

The split and the weights hash content with sha256 and the recipe's seed, not with Python's `hash`, so that every rank,
every machine and every resumed run makes the same choice. Prompts are split, not rows, so that no prompt is on both
sides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from align_cli.data.format import Group

Row = TypeVar("Row")


def canonical(content: Any) -> str:
    """Content as JSON text that is the same on every machine."""
    return json.dumps(content, ensure_ascii=True, sort_keys=True, separators=(",", ":"))


def hashed(seed: int, salt: str, content: Any) -> int:
    """64 bits of sha256; different salts make the choices for different purposes independent."""
    digest = hashlib.sha256(f"{seed}\n{salt}\n{canonical(content)}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def share(seed: int, salt: str, content: Any) -> float:
    """The hash as a number in [0, 1)."""
    return hashed(seed, salt, content) / 2**64


def content(group: Group) -> list[Any]:
    """The contents of a group, without its place."""
    return [group.prompt, group.responses, group.label]


def smallest(keys: set[int], fraction: float) -> set[int]:
    """The given fraction of the keys, smallest first: at least one, at most all but one; empty if len(keys) < 2."""
    if len(keys) < 2:
        return set()
    return set(sorted(keys)[: min(max(round(fraction * len(keys)), 1), len(keys) - 1)])


def weighted(rows: list[Row], weight: float, key: Callable[[Row], int]) -> list[Row]:
    """The rows repeated `weight` times. The fractional part are those with the smallest hashes, which `key` returns; at
    least one row is kept."""
    whole, part = int(weight), weight - int(weight)
    if not part or not rows:
        return rows * whole
    order = sorted(range(len(rows)), key=lambda at: key(rows[at]))
    some = set(order[: max(round(part * len(rows)), 0 if whole else 1)])
    return rows * whole + [row for at, row in enumerate(rows) if at in some]


def interleaved(streams: list[Iterator[Group]], weights: list[float]) -> Iterator[Group]:
    """Smooth weighted round-robin: the stream that is furthest behind its share goes next."""
    open_ = dict(enumerate(streams))
    given = [0] * len(streams)
    while open_:
        at = min(open_, key=lambda index: ((given[index] + 1) / weights[index], index))
        group = next(open_[at], None)
        if group is None:
            del open_[at]
            continue
        given[at] += 1
        yield group


def labelled(group: Group, how: Literal["best-worst", "best-rest"]) -> list[tuple[int, bool]]:
    """(index of a response, whether it is a good one): the row's label, or for a ranking, its best response as good and
    its worst (`best-worst`) or all worse ones (`best-rest`) as bad."""
    if group.label is not None:
        return [(0, group.label)]
    worse = [(b, w) for b, w in preference_pairs(group, "all") if b == 0]
    return [(0, True), *((w, False) for _, w in (worse[-1:] if how == "best-worst" else worse))]


def preference_pairs(
    group: Group, how: Literal["best-worst", "best-random", "all", "adjacent"]
) -> list[tuple[int, int]]:
    """(better, worse) indices into the group's responses, best pairs first; pairs of equal scores are left out."""
    k = len(group.responses)
    match how:
        case "best-worst":
            pairs = [(0, k - 1)]
        case "best-random" if k > 1:
            pairs = [(0, 1 + hashed(0, "pair", content(group)) % (k - 1))]
        case "adjacent":
            pairs = [(at, at + 1) for at in range(k - 1)]
        case _:
            pairs = [(better, worse) for better in range(k) for worse in range(better + 1, k)]
    scores = group.scores
    return [(b, w) for b, w in pairs if b != w and (scores is None or scores[b] > scores[w])]
