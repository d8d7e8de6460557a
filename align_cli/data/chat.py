"""Groups -> tokens, through the tokenizer's chat template: what the model sees, and which tokens are trained.

The whole conversation is rendered and tokenized once, exactly as `apply_chat_template` does it, and the rendered text
tells where each assistant turn begins and ends. A turn ends with its end-of-turn token, which is trained; what a
template puts after it (a newline, mostly) belongs to the next turn and is not. Where a template closes a turn with no
token at all, EOS is added to the last one, or the model would never learn to stop.

Shapes: t tokens of one conversation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from align_cli.data.groups import Group, Message, preference_pairs
from align_cli.data.turns import Dropped

IGNORED = -100
"""Label of a token that is not trained."""


class Unrenderable(Exception):
    """A conversation that the template refuses or renders so that its turns cannot be told apart."""


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
    """What became of groups on the way to tokens; what is dropped is entered into the counts of its source, too."""

    rows: int = 0
    truncated: int = 0
    dropped: Counter = field(default_factory=Counter)
    """Reason -> groups."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason -> place of the first such group."""
    lost: set[tuple[int, str]] = field(default_factory=set, repr=False)

    def drop(self, group: Group, reason: str) -> None:
        """Count a group as dropped, and its row, once, however often the source's weight repeats it."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, group.place)
        row = (id(group.count), group.place)
        if group.count is not None and row not in self.lost:
            self.lost.add(row)
            group.count.lose(group.place, Dropped(reason, group.prompt[-1]["content"]))


def render(tokenizer: Any, messages: list[Message], *, prompt: bool = False) -> str:
    """The conversation as the template writes it; with `prompt`, up to where the assistant is to answer.

    Raises Unrenderable with the template's own complaint.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # jinja's TemplateError and whatever a template raises by itself
        raise Unrenderable(f"the template refuses it ({str(error).splitlines()[0]})") from None


def prompt_ids(tokenizer: Any, prompt: list[Message]) -> list[int]:
    """Token ids of a prompt, up to where the assistant is to answer. Raises Unrenderable."""
    return tokenizer(render(tokenizer, prompt, prompt=True), add_special_tokens=False)["input_ids"]


def end_tokens(tokenizer: Any) -> set[int]:
    """Ids that can end a turn: every special token but BOS-only markers."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | {tokenizer.eos_token_id}


def generation_ends(tokenizer: Any) -> list[int]:
    """Ids at which sampling stops: EOS and the token with which the template closes an assistant's turn."""
    turns = conversation(tokenizer, [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}])
    last = turns.ids[max(index for index, on in enumerate(turns.trained) if on)]
    return sorted({tokenizer.eos_token_id, last})


def conversation(
    tokenizer: Any, prompt: list[Message], response: list[Message], *, last_turn_only: bool = False
) -> Turns:
    """A prompt and its response as tokens, with every assistant turn of the response trained (or only the last).

    Raises Unrenderable.
    """
    messages = [*prompt, *response]
    whole = render(tokenizer, messages)
    spans = []
    for index in range(len(prompt), len(messages)):
        if messages[index]["role"] != "assistant" or (last_turn_only and index < len(messages) - 1):
            continue
        before = render(tokenizer, messages[:index], prompt=True)
        # a generation prompt may hold more than the template keeps of it, such as an opened thinking block
        start = len(before) if whole.startswith(before) else _common(before, whole)
        stop = len(whole) if index == len(messages) - 1 else len(render(tokenizer, messages[: index + 1]))
        content = messages[index]["content"].strip()
        if content and content not in whole[start:stop]:
            raise Unrenderable("the template renders a turn so that it cannot be found again")
        spans.append((start, stop))
    ids, offsets = _tokenize(tokenizer, whole)
    trained = [False] * len(ids)
    ends = end_tokens(tokenizer)
    for number, (start, stop) in enumerate(spans):
        inside = [i for i, (left, right) in enumerate(offsets) if right > start and left < stop and right > left]
        closing = next((i for i in reversed(inside) if whole[offsets[i][0] : offsets[i][1]].strip()), None)
        if closing is None:
            continue
        closed = ids[closing] in ends
        for i in inside:
            trained[i] = i <= closing if closed else True
        if number == len(spans) - 1 and stop == len(whole):
            last = closing if closed else inside[-1]
            # what follows the end of the last turn is never generated, so it is not part of the sequence
            ids, trained = ids[: last + 1], trained[: last + 1]
            if not closed:
                ids, trained = [*ids, tokenizer.eos_token_id], [*trained, True]
    return Turns(ids, trained)


def responses(tokenizer: Any, group: Group) -> tuple[list[int], list[list[int]]]:
    """Token ids of a group's prompt, once, and of each of its K responses.

    The prompt ends where the tokens of prompt and response part from it, so that every response continues the same
    ids. Raises Unrenderable.
    """
    turns = [conversation(tokenizer, group.prompt, response, last_turn_only=True) for response in group.responses]
    starts = [turn.trained.index(True) if True in turn.trained else len(turn.ids) for turn in turns]
    start = min(starts)
    while start and any(turn.ids[:start] != turns[0].ids[:start] for turn in turns):
        start -= 1
    return turns[0].ids[:start], [turn.ids[start:] for turn in turns]


def sft_rows(
    tokenizer: Any, groups: Iterable[Group], *, max_length: int, last_turn_only: bool, tally: Tally
) -> Iterator[dict[str, list[int]]]:
    """`input_ids` and `labels` of each group's first response; counts what is cut or dropped into `tally`."""
    for group in groups:
        try:
            turns = conversation(tokenizer, group.prompt, group.responses[0], last_turn_only=last_turn_only)
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
    tokenizer: Any, group: Group, max_length: int, max_prompt_length: int | None, tally: Tally
) -> tuple[list[int], list[list[int]]] | None:
    """`responses` of a group whose prompt leaves room for one; None, counted, for any other."""
    try:
        prompt, answers = responses(tokenizer, group)
    except Unrenderable as error:
        tally.drop(group, str(error))
        return None
    limit = min(max_prompt_length or max_length - 1, max_length - 1)
    if len(prompt) > limit:
        tally.drop(group, f"prompt over {limit} tokens")
        return None
    return prompt, answers


def dpo_rows(
    tokenizer: Any,
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


def _tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character spans. The template has written BOS and EOS already, so none is added."""
    if not tokenizer.is_fast:
        raise Unrenderable("the tokenizer has no fast version, which knows where each token stands in the text")
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return coded["input_ids"], coded["offset_mapping"]


def _common(left: str, right: str) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
