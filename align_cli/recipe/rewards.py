"""Reward sources, and the guards that monitor a run for collapse and over-optimisation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from align_cli.recipe.generation import OptionalGenerator
from align_cli.recipe.sections import Count, Positive, as_source, section


@section
class Verify:
    """A verifiable reward: 1 for a correct response, 0 for any other."""

    kind: Literal["exact", "numeric", "regex", "json-schema"]
    """When a response is correct. exact: same text, ignoring whitespace; numeric: same last number; regex: the pattern
    in the column matches; json-schema: JSON, bare or in a fenced block, that is valid under the schema in the column
    (draft 2020-12 unless the schema names another; formats are checked)."""
    column: str
    """Data column with the correct answer, pattern or schema."""
    extract: str | None = None
    """Pattern that extracts the text to compare: the last match in the response, or its first group if the pattern has
    one. null: compare the whole response."""

    def rules(self) -> Iterator[tuple[str, str]]:
        try:
            re.compile(self.extract or "")
        except re.error as error:
            yield "verify.extract", f"{self.extract!r} is not a valid pattern ({error}); correct it"


@section
class RewardSource:
    """A source of rewards: exactly one of path, verify, python and judge."""

    path: str | None = None
    """A finished `align rm` run."""
    verify: Verify | None = None
    """Instead of a run: compare the response with a data column."""
    python: str | None = None
    """Instead of a run: `module:function`, called as function(prompts, responses) with a list of message lists and a
    list of texts; returns one number per response. Requires --allow-code."""
    judge: OptionalGenerator = None
    """Instead of a run, for method.rounds of DPO: a judge compares all pairs of a prompt's answers, each in both
    orders. An answer's reward is its mean probability of being the better one."""
    constitution: str = "default"
    """For a judge: a YAML file of principles, or the name of a file in recipes/constitution. One principle is drawn for
    each prompt."""
    principles: Annotated[list[str], Field(min_length=1)] | None = None
    """For a judge: ids of the principles to draw from. null: all, in which case the prompts should be of one kind
    (red-team or harmless)."""
    chat_template: str | None = None
    """Same as model.chat_template, for a reward model whose tokenizer has no template."""
    weight: float = 1.0
    """Weight in the sum of several rewards."""
    aggregate: Literal["mean", "worst", "minus-std"] = "mean"
    """How to combine an ensemble's scores: mean, worst, or mean - k·std (arXiv 2310.02743)."""
    k: Positive = 1.0
    """k of minus-std."""
    normalize: bool = True
    """Subtract the mean and divide by the standard deviation that are stored in the manifest of the reward model."""
    clip: Positive | None = None
    """Clip scores to ±clip after normalization; null: no clipping."""

    def rules(self) -> Iterator[tuple[str, str]]:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            finding = f"is set together with {' and '.join(given[1:])}" if given else "is missing"
            yield given[0] if given else "path", f"{finding}; set exactly one of {', '.join(SOURCES)}"
        if self.verify is not None:
            yield from self.verify.rules()
        if self.judge is not None:
            yield from self.judge.problems("judge")
        elif self.principles is not None:
            yield "principles", "applies only to a judge; remove it, or set judge"

    def described(self) -> str:
        """What the plan says of it."""
        if self.verify is not None:
            return f"{self.verify.kind}, compared with '{self.verify.column}'"
        if self.judge is not None:
            return f"{self.judge.described()}, a judge under {self.constitution}"
        return self.path or f"{self.python} (Python)"


SOURCES = ("path", "verify", "python", "judge")
"""Fields of a reward, of which exactly one must be set."""


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
    """A condition on one metric of metrics.jsonl, and what to do when it holds."""

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
    """Metric to monitor. kl: nats per sequence; gold_reward: score of the held-out reward model; reward_spread:
    standard deviation of an ensemble's scores; nan: fires as soon as any metric is NaN or infinite, without a
    threshold."""
    above: float | None = None
    """Fires if the metric is above this value."""
    below: float | None = None
    """Fires if the metric is below this value."""
    drop: Positive | None = None
    """Fires if the metric is more than this below its best while the reward is at its best: over-optimisation."""
    act: Act = "warn"
    """What to do when the guard fires. warn: print a warning; raise_kl: multiply β by 1.5 after each rollout while the
    condition holds, then reduce it in the same steps; rollback: restore the best checkpoint and stop; stop: finish
    the run now, with the reason in the manifest."""
    patience: Count = 3
    """Number of consecutive rollouts for which the condition must hold; nan fires at the first."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.metric != "nan" and self.above is None and self.below is None and self.drop is None:
            yield "guards", f"the guard on {self.metric} has no threshold; give above, below or drop"


def guard_rules(guards: list[Guard], gold: RewardSource | None) -> Iterator[tuple[str, str]]:
    """Problems of guards and of the metrics they monitor."""
    for guard in guards:
        yield from guard.rules()
    if any(guard.metric == "gold_reward" for guard in guards) and gold is None:
        yield "gold", "is missing, but a guard monitors gold_reward; name a held-out reward model"
    if gold is not None:
        yield from ((f"gold.{key}", text) for key, text in gold.rules())
        for name in ("verify", "judge"):
            if getattr(gold, name) is not None:
                yield f"gold.{name}", "works only as a reward; name a held-out reward model or a function"


def reward_keys(count: int) -> list[str]:
    """The keys of `count` rewards in messages."""
    return [f"reward[{at}]" for at in range(count)] if count > 1 else ["reward"][:count]


def keyed(rewards: list[RewardSource] | None) -> list[tuple[str, RewardSource]]:
    """(key, source) of the rewards of a recipe."""
    return list(zip(reward_keys(len(rewards or [])), rewards or [], strict=True))


def gold_functions(gold: RewardSource | None) -> list[tuple[str, str]]:
    """(key, module:function) of the gold reward, if it is a Python function."""
    return [("gold.python", gold.python)] if gold is not None and gold.python is not None else []


def gold_models(gold: RewardSource | None) -> list[tuple[str, str]]:
    """(key, path) of the gold reward model, if it is a run."""
    return [("gold.path", gold.path)] if gold is not None and gold.path is not None else []


def reward_rules(rewards: list[RewardSource], *, rounds: bool = False) -> Iterator[tuple[str, str]]:
    """Problems of each reward source."""
    for place, source in keyed(rewards):
        yield from ((f"{place}.{key}", text) for key, text in source.rules())
        if source.judge is not None and not rounds:
            yield (
                f"{place}.judge",
                "works only in `align dpo` with method.rounds; name an `align rm` run here",
            )
