"""Where rewards come from, and the guards that watch what optimising them does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from align_cli.recipe.generation import OptionalGenerator
from align_cli.recipe.sections import Count, Positive, as_source, section


@section
class Verify:
    """A reward that is checked, not learned: 1 for a response that is right, 0 for any other."""

    kind: Literal["exact", "numeric", "regex", "json-schema"]
    """exact: the same text, white space apart; numeric: the same last number; regex: the cell's pattern is found;
    json-schema: JSON, bare or in a fenced block, that the cell's schema allows (draft 2020-12 unless it
    names another, formats included)."""
    column: str
    """Column of the data that holds what is right."""
    extract: str | None = None
    """Pattern whose last match in the response, its first group if it has one, is what is compared. null: all of it."""

    def rules(self) -> Iterator[tuple[str, str]]:
        try:
            re.compile(self.extract or "")
        except re.error as error:
            yield "verify.extract", f"{self.extract!r} is not a valid pattern ({error}); correct it"


@section
class RewardSource:
    """Where a response's reward comes from."""

    path: str | None = None
    """A finished `align rm` run."""
    verify: Verify | None = None
    """In place of a run: compare the response with a column of the data."""
    python: str | None = None
    """In place of a run: `module:function`, called as function(prompts, responses) with lists of messages and of texts,
    giving a number a response. Runs only if the command was given --allow-code."""
    judge: OptionalGenerator = None
    """In place of a run, in rounds of DPO: compare a prompt's answers with each other, each two in both orders. An
    answer's reward is the mean probability that it is the better one."""
    constitution: str = "default"
    """For a judge: a YAML file of principles, or the name of one in recipes/constitution; one is drawn for each
    prompt."""
    principles: Annotated[list[str], Field(min_length=1)] | None = None
    """For a judge: names of the principles that are drawn from; null: all, for which the prompts should be of one
    kind."""
    chat_template: str | None = None
    """As model.chat_template, for a reward model whose tokenizer has none."""
    weight: float = 1.0
    """Rewards of several sources are added up with these."""
    aggregate: Literal["mean", "worst", "minus-std"] = "mean"
    """How an ensemble's scores become one: their mean, the worst, or mean - k·std (arXiv 2310.02743)."""
    k: Positive = 1.0
    """For minus-std."""
    normalize: bool = True
    """Subtract the shift and divide by the standard deviation that the run's manifest holds."""
    clip: Positive | None = None
    """Scores beyond ±clip, after normalization, count as ±clip."""

    def rules(self) -> Iterator[tuple[str, str]]:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            finding = f"and {' and '.join(given[1:])} both say" if given else "or verify, python or judge must say"
            yield (
                given[0] if given else "path",
                f"{finding} where the reward comes from; give one of them, and null for any other",
            )
        if self.verify is not None:
            yield from self.verify.rules()
        if self.judge is not None:
            yield from self.judge.problems("judge")
        elif self.principles is not None:
            yield "principles", "is for a judge; remove it, or set judge"


SOURCES = ("path", "verify", "python", "judge")
"""Fields of a reward that say where it comes from."""


def _as_rewards(value: Any) -> Any:
    if isinstance(value, (str, dict)):
        value = [value]
    return [as_source(entry) for entry in value] if isinstance(value, list) else value


Rewards = Annotated[
    list[RewardSource],
    BeforeValidator(_as_rewards, json_schema_input_type=str | RewardSource | list[str | RewardSource]),
    Field(min_length=1),
]

Gold = Annotated[RewardSource | None, BeforeValidator(as_source, json_schema_input_type=str | RewardSource | None)]

Act = Literal["warn", "raise_kl", "rollback", "stop"]


@section
class Guard:
    """A watcher of one figure of metrics.jsonl."""

    metric: Literal[
        "kl",
        "response_length",
        "eos_rate",
        "distinct_2",
        "entropy",
        "reward_length_correlation",
        "gold_reward",
        "reward_spread",
        "nan",
    ]
    """kl is in nats a sequence; gold_reward is a held-out reward model's; reward_spread an ensemble's; nan is any
    metric that is NaN or infinite: fires at once and needs no threshold."""
    above: float | None = None
    """The figure must not exceed this."""
    below: float | None = None
    """The figure must not fall below this."""
    drop: Positive | None = None
    """The figure must not fall this far below its best, while the reward is at its own best: over-optimisation."""
    act: Act = "warn"
    """warn: say so; raise_kl: β grows by a half each rollout until the sign is gone, and goes back; rollback: take the
    best checkpoint's weights and stop; stop: end the run, finished, with the reason in the manifest."""
    patience: Count = 3
    """Rollouts in a row that must show the sign."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.metric != "nan" and self.above is None and self.below is None and self.drop is None:
            yield "guards", f"the guard on {self.metric} has no threshold; give above, below or drop"


def guard_rules(guards: list[Guard], gold: RewardSource | None) -> Iterator[tuple[str, str]]:
    """What concerns guards and what they watch."""
    for guard in guards:
        yield from guard.rules()
    if any(guard.metric == "gold_reward" for guard in guards) and gold is None:
        yield "gold", "is missing, and a guard watches gold_reward; name a held-out reward model"
    if gold is not None:
        yield from ((f"gold.{key}", text) for key, text in gold.rules())
        for name in ("verify", "judge"):
            if getattr(gold, name) is not None:
                yield f"gold.{name}", "is for rewards; name a held-out reward model or a function"


def reward_keys(count: int) -> list[str]:
    """What so many rewards are called in messages."""
    return [f"reward[{at}]" for at in range(count)] if count > 1 else ["reward"][:count]


def keyed(rewards: list[RewardSource] | None) -> list[tuple[str, RewardSource]]:
    """(key, source) of the rewards of a recipe."""
    return list(zip(reward_keys(len(rewards or [])), rewards or [], strict=True))


def gold_models(gold: RewardSource | None) -> list[tuple[str, str]]:
    """(key, path) of the gold reward model, if one is named."""
    return [("gold.path", gold.path)] if gold is not None and gold.path is not None else []


def reward_rules(rewards: list[RewardSource], *, rounds: bool = False) -> Iterator[tuple[str, str]]:
    """What is wrong with each source of reward."""
    for place, source in keyed(rewards):
        yield from ((f"{place}.{key}", text) for key, text in source.rules())
        if source.judge is not None and not rounds:
            yield (
                f"{place}.judge",
                "compares the answers of a round of DPO (method.rounds); name an `align rm` run here",
            )
