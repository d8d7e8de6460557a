"""Groups -> tokens, through the tokenizer's chat template: what the model sees, and which tokens are trained.

The whole conversation is rendered and tokenized once, exactly as `apply_chat_template` does it, and `spans` finds each
assistant turn's response in the text. A turn ends with its end-of-turn token, which is trained; what a template puts
after it (usually a newline) belongs to the next turn and is not trained. If a template writes no end-of-turn token, EOS
is appended to the last turn; otherwise the model would never learn to stop.

Shapes: t tokens of one conversation.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from align_cli.data import spans, template
from align_cli.data.groups import Group, preference_pairs
from align_cli.data.template import Message, Tools, Unrenderable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from align_cli.data.turns import Dropped

__all__ = ["IGNORED", "Tally", "Turns", "Unrenderable", "conversation", "dpo_rows", "encoded", "fitting"]
__all__ += ["generation_ends", "prompt_ids", "render", "responses", "sft_rows"]

IGNORED = -100
"""Label of a token that is not trained."""


@dataclass(frozen=True)
class Turns:
    """One tokenized conversation."""

    ids: list[int]
    """(t,) token ids."""
    trained: list[bool]
    """(t,) whether the token is part of an assistant's response, its end-of-turn token included."""

    @property
    def labels(self) -> list[int]:
        """(t,) ids where trained, IGNORED elsewhere."""
        return [token if on else IGNORED for token, on in zip(self.ids, self.trained, strict=True)]


@dataclass
class Tally:
    """Counts of tokenized, truncated and dropped groups. A drop is also entered into the count of its source."""

    rows: int = 0
    truncated: int = 0
    dropped: Counter = field(default_factory=Counter)
    """Reason -> groups."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason -> place of the first such group."""
    notes: Counter = field(default_factory=Counter)
    """Note for the user -> number of rows (of responses, if several are compared) that it applies to."""
    counted: dict[str, int] = field(default_factory=dict)
    """Further counts of a stage."""
    lost: set[tuple[int, str]] = field(default_factory=set, repr=False)

    def add(self, name: str, number: int) -> None:
        """Add to a further count."""
        self.counted[name] = self.counted.get(name, 0) + number

    def drop(self, group: Group, reason: str) -> None:
        """Count a dropped group. Its row is counted only once, even if the source's weight repeats it."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, group.place)
        row = (id(group.count), group.place)
        if group.count is not None and row not in self.lost:
            self.lost.add(row)
            group.count.lose(group.place, Dropped(reason, group.prompt[-1]["content"]))


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, prompt: bool = False, tools: Tools = None
) -> str:
    """The rendered conversation; with `prompt`, it ends with the generation prompt.

    Raises Unrenderable with the template's own error message.
    """
    return template.of(tokenizer).render(messages, prompt=prompt, tools=tools)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], tools: Tools = None) -> list[int]:
    """Token ids of a prompt, generation prompt included. Raises Unrenderable."""
    return encoded(tokenizer, render(tokenizer, prompt, prompt=True, tools=tools))[0]


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that can end a turn: every special token and EOS."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | ({tokenizer.eos_token_id} - {None})


def generation_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which sampling stops: EOS and the token with which the template closes an assistant's turn.

    If the template requires a system turn, one is added. Raises Unrenderable if no turn can be rendered.
    """
    try:
        end = spans.ending(template.of(tokenizer))
    except Unrenderable:
        end = spans.ending(template.of(tokenizer), [{"role": "system", "content": "s"}])
    ends = {tokenizer.eos_token_id} | ({tokenizer.convert_tokens_to_ids(end)} if end else set())
    return sorted(ends - {None})


def conversation(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    response: list[Message],
    *,
    last_turn_only: bool = False,
    tools: Tools = None,
    notes: Counter | None = None,
) -> Turns:
    """Tokenize a prompt and its response. All assistant turns of the response (or only the last) are trained, except
    those marked `train: False`. Notes for the user about the row are counted into `notes`.

    The sequence ends with the token that closes the last turn, or with EOS if the template writes no such token.
    Raises Unrenderable.
    """
    messages = [*prompt, *response]
    turns = [at for at in range(len(prompt), len(messages)) if messages[at]["role"] == "assistant"]
    if last_turn_only:
        turns = turns[-1:]
    turns = [at for at in turns if messages[at].get("train", True)] or turns[-1:]
    rendering = spans.find(template.of(tokenizer), messages, turns, tools)
    if notes is not None:
        notes.update(rendering.notes)
    last = rendering.spans[-1]
    text = rendering.text[: last.stop]
    ids, offsets = _split_at(tokenizer, text, [span.start for span in rendering.spans])
    trained, at = [False] * len(ids), 0
    for span in rendering.spans:
        while at < len(ids) and offsets[at][0] < span.start:
            at += 1
        while at < len(ids) and offsets[at][0] < span.stop:
            trained[at] = offsets[at][1] > offsets[at][0] and offsets[at][1] <= span.stop
            at += 1
    if not last.closed:
        ids, trained = [*ids, tokenizer.eos_token_id], [*trained, True]
    return Turns(ids, trained)


def responses(
    tokenizer: PreTrainedTokenizerBase, group: Group, notes: Counter | None = None
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a group's prompt, once, and of each of its K responses.

    The prompt is the longest prefix without trained tokens that all K sequences share, so that every response continues
    the same ids. Raises Unrenderable.
    """
    turns = [
        conversation(tokenizer, group.prompt, response, last_turn_only=True, tools=group.tools, notes=notes)
        for response in group.responses
    ]
    starts = [turn.trained.index(True) if True in turn.trained else len(turn.ids) for turn in turns]
    start = min(starts)
    while start and any(turn.ids[:start] != turns[0].ids[:start] for turn in turns):
        start -= 1
    return turns[0].ids[:start], [turn.ids[start:] for turn in turns]


def sft_rows(
    tokenizer: PreTrainedTokenizerBase, groups: Iterable[Group], *, max_length: int, last_turn_only: bool, tally: Tally
) -> Iterator[dict[str, list[int]]]:
    """`input_ids` and `labels` of each group's first response; truncated and dropped groups are counted in `tally`."""
    for group in groups:
        try:
            turns = conversation(
                tokenizer,
                group.prompt,
                group.responses[0],
                last_turn_only=last_turn_only,
                tools=group.tools,
                notes=tally.notes,
            )
        except Unrenderable as error:
            tally.drop(group, str(error))
            continue
        if not any(turns.trained[:max_length]):
            tally.drop(group, f"no response token within {max_length} tokens")
            continue
        tally.truncated += len(turns.ids) > max_length
        tally.rows += 1
        yield {"input_ids": turns.ids[:max_length], "labels": turns.labels[:max_length]}


def fitting(
    tokenizer: PreTrainedTokenizerBase, group: Group, max_length: int, max_prompt_length: int | None, tally: Tally
) -> tuple[list[int], list[list[int]]] | None:
    """`responses` of a group; None if it cannot be rendered or its prompt leaves no room for a response, which `tally`
    counts as dropped."""
    try:
        prompt, answers = responses(tokenizer, group, tally.notes)
    except Unrenderable as error:
        tally.drop(group, str(error))
        return None
    limit = min(max_prompt_length or max_length - 1, max_length - 1)
    if len(prompt) > limit:
        tally.drop(group, f"prompt over {limit} tokens")
        return None
    return prompt, answers


def dpo_rows(
    tokenizer: PreTrainedTokenizerBase,
    groups: Iterable[Group],
    *,
    how: str,
    max_length: int,
    max_prompt_length: int | None,
    tally: Tally,
) -> Iterator[dict[str, list[int]]]:
    """`prompt_ids`, `chosen_ids`, `rejected_ids` of the pairs that each group gives (see `preference_pairs`)."""
    for group in groups:
        fit = fitting(tokenizer, group, max_length, max_prompt_length, tally)
        if fit is None:
            continue
        prompt, answers = fit
        room, pairs = max_length - len(prompt), preference_pairs(group, how)
        cut = [answer[:room] for answer in answers]
        if any(cut[better] == cut[worse] for better, worse in pairs):
            tally.drop(group, f"responses alike within {max_length} tokens")
            continue
        tally.truncated += any(len(answer) > room for answer in answers)
        tally.rows += 1
        for better, worse in pairs:
            yield {"prompt_ids": prompt, "chosen_ids": cut[better], "rejected_ids": cut[worse]}


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character spans. The template already writes BOS and EOS, so the tokenizer adds no special tokens.

    Raises Unrenderable.
    """
    if not tokenizer.is_fast:
        raise Unrenderable("the tokenizer has no fast version, which is needed for the character span of each token")
    try:
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except (TypeError, UnicodeEncodeError):
        raise Unrenderable(template.HALF) from None
    return coded["input_ids"], coded["offset_mapping"]


def _split_at(
    tokenizer: PreTrainedTokenizerBase, text: str, starts: list[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Like `encoded`, but no token crosses one of `starts`, where responses begin: generation also starts from a prompt
    that is tokenized up to exactly there."""
    ids, offsets = encoded(tokenizer, text)
    crossed = [
        start for start in starts for at in [bisect(offsets, (start, -1)) - 1] if at >= 0 and offsets[at][1] > start
    ]
    if not crossed:
        return ids, offsets
    cut_ids, cut_offsets = [], []
    for start, stop in pairwise([0, *crossed, len(text)]):
        part, places = encoded(tokenizer, text[start:stop])
        cut_ids += part
        cut_offsets += [(left + start, right + start) for left, right in places]
    # a tokenizer that prepends a space to every text would insert one at the cut; then the token is not split
    return (cut_ids, cut_offsets) if tokenizer.decode(cut_ids) == tokenizer.decode(ids) else (ids, offsets)
