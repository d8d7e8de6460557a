"""Groups -> rows for a reward model: the tokens of the prompt, and the tokens and rank of each response."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from align_cli.data.chat import Tally, fitting
from align_cli.data.groups import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def levels(group: Group) -> list[int]:
    """0 for the best responses, 1 for the next best, …; equal scores share a level."""
    if group.scores is None:
        return list(range(len(group.responses)))
    ranks: list[int] = []
    for at, score in enumerate(group.scores):
        ranks.append(0 if not at else ranks[-1] + (score != group.scores[at - 1]))
    return ranks


def ties(group: Group) -> int:
    """Number of tied pairs among the group's responses; they enter no comparison."""
    order = levels(group)
    return sum(order[i] == order[j] for i in range(len(order)) for j in range(i))


def rm_rows(
    tokenizer: PreTrainedTokenizerBase,
    groups: Iterable[Group],
    *,
    max_length: int,
    max_prompt_length: int | None,
    tally: Tally,
) -> Iterator[dict[str, Any]]:
    """`prompt_ids`, `responses` (K lists of ids, best first), `levels`, `grades` (the source's scores, or empty) and
    `probability` (the soft label that the first response is the better one, or None).

    A response ends with the token that closes its turn, where the score is read, unless it is truncated. A response
    that truncation makes equal to a better one is left out; a group left with fewer than two levels is dropped.
    """
    for group in groups:
        fit = fitting(tokenizer, group, max_length, max_prompt_length, tally)
        if fit is None:
            continue
        prompt, answers = fit
        room = max_length - len(prompt)
        cut = [answer[:room] for answer in answers]
        kept = [at for at in range(len(cut)) if cut[at] not in cut[:at]]
        order = levels(group)
        if len({order[at] for at in kept}) < 2:
            tally.drop(group, f"responses alike within {max_length} tokens")
            continue
        tally.truncated += any(len(answer) > room for answer in answers)
        tally.rows += 1
        yield {
            "prompt_ids": prompt,
            "responses": [cut[at] for at in kept],
            "levels": [order[at] for at in kept],
            "grades": [float(group.scores[at]) for at in kept] if group.scores is not None else [],
            "probability": group.probability,
        }
