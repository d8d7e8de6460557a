"""Groups -> rows for KTO: a prompt, one response, and whether it is a good one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from align_cli.data.chat import Tally, fitting
from align_cli.data.groups import Group, labelled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def kto_rows(
    tokenizer: PreTrainedTokenizerBase,
    groups: Iterable[Group],
    *,
    split: Literal["best-worst", "best-rest"],
    max_length: int,
    max_prompt_length: int | None,
    tally: Tally,
) -> Iterator[dict[str, Any]]:
    """`prompt_ids`, `completion_ids` and `label` of the responses that each group gives (see `labelled`)."""
    for group in groups:
        fit = fitting(tokenizer, group, max_length, max_prompt_length, tally)
        if fit is None:
            continue
        prompt, answers = fit
        room, chosen = max_length - len(prompt), labelled(group, split)
        if any(
            on and answers[at][:room] == answers[other][:room] for at, on in chosen for other, off in chosen if not off
        ):
            tally.drop(group, f"responses alike within {max_length} tokens")
            continue
        tally.truncated += any(len(answers[at]) > room for at, _ in chosen)
        tally.rows += 1
        for at, good in chosen:
            yield {"prompt_ids": prompt, "completion_ids": answers[at][:room], "label": good}
