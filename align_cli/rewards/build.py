"""Builds rewards from a recipe's sources: reward models, checks, Python functions and judges.

To add a kind of reward, add a field to `recipe.rewards.RewardSource` and a branch to `build`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align_cli import distributed
from align_cli.data import chat
from align_cli.data.groups import Group
from align_cli.errors import UpstreamError
from align_cli.model import kind, load, reward_head
from align_cli.recipe.rewards import RewardSource
from align_cli.recipe.sections import Model
from align_cli.rewards import checks, function
from align_cli.rewards.judge import Judge
from align_cli.rewards.prompts import cell
from align_cli.rewards.reward import Messages, Reward, Scorer
from align_cli.training import layout
from align_cli.training.job import Job
from align_cli.training.placement import Place

SCORED_TOKENS = 8192
"""Maximum tokens per forward pass of a reward model."""

AtEnds = Callable[[dict[str, Tensor]], Tensor]
"""Packed micro-batch -> (n, 1, h) scores at the ends of the responses."""


def build_all(job: Job, place: Place, backbone: Scorer | None = None) -> list[Reward]:
    """The recipe's rewards. `backbone`, if given, replaces reward models that are adapters on the policy's backbone."""
    return [build(job, source, key, place, backbone) for key, source in job.recipe.reward_sources()]


def build(job: Job, source: RewardSource, key: str, place: Place, backbone: Scorer | None = None) -> Reward:
    """The reward of one source; `key` is its recipe key. Raises AlignError if it cannot be used."""
    settings = {"weight": source.weight, "aggregate": source.aggregate, "k": source.k, "clip": source.clip, "name": key}
    if source.verify:
        return Reward(_checked(source), cell=cell(source.verify.column), **settings)
    if source.judge:
        return Reward(Judge(job, source, key), **settings)
    if source.python:
        return Reward(function_scorer(source.python), **settings)
    scale = kind.manifest(source.path).get("reward", {}) if source.normalize else {}
    return Reward(
        backbone or run_scorer(job, Model(path=source.path, chat_template=source.chat_template), place),
        mean=torch.tensor([0.0] if scale.get("shift_in_weights") else scale.get("mean", [0.0])),
        std=torch.tensor(scale.get("std", [1.0])).clamp(min=1e-6),
        **settings,
    )


def _checked(source: RewardSource) -> Scorer:
    """A scorer (cells, texts) -> (b, 1) rewards of 1 or 0."""
    check = checks.verifier(source.verify.kind, source.verify.extract)
    return lambda wanted, texts: torch.tensor(check(wanted, texts)).unsqueeze(1)


def function_scorer(entry: str) -> Scorer:
    """A scorer (prompts, texts) -> (b, 1) that calls a Python function.

    It raises UpstreamError if the function raises or does not return one finite number per response.
    """
    call = function.load(entry)

    def score(prompts: list[Messages], texts: list[str]) -> Tensor:
        try:
            given = torch.as_tensor(call(prompts, texts), dtype=torch.float32).detach().cpu()
        except (Exception, SystemExit) as error:  # a user's function may raise anything, or exit
            raise UpstreamError(f"{entry}: raised {type(error).__name__}: {error}") from error
        if given.shape != (len(texts),) or not given.isfinite().all():
            finding = f"shape {tuple(given.shape)}" if given.shape != (len(texts),) else "numbers that are not finite"
            raise UpstreamError(f"{entry}: gave {finding} for {len(texts)} responses; return one finite number each")
        return given.unsqueeze(1)

    return score


def run_scorer(job: Job, named: Model, place: Place) -> Scorer:
    """A scorer (prompts, texts) -> (b, h) that runs a reward model with its own tokenizer and template."""
    tokenizer = load.tokenizer(named)
    model = place(reward_head.load_run(named.path, tokenizer, job.precision.scorer))
    return text_scorer(job, tokenizer, lambda inputs: model(**inputs))


def text_scorer(job: Job, tokenizer: PreTrainedTokenizerBase, at_ends: AtEnds) -> Scorer:
    """A scorer (prompts, texts) -> (b, h) that tokenizes texts and scores them with `at_ends` in micro-batches."""
    max_length = job.recipe.data.max_length

    @torch.no_grad()
    def score(prompts: list[Messages], texts: list[str]) -> Tensor:
        rows: list[dict[str, Any]] = []
        for prompt, text in zip(prompts, texts, strict=True):
            # an empty response becomes a space, so that its turn is rendered
            group = Group(prompt, [[{"role": "assistant", "content": text or " "}]])
            try:
                ids, (answer,) = chat.responses(tokenizer, group)
            except chat.Unrenderable as error:
                raise UpstreamError(f"reward: {tokenizer.name_or_path}: {error}; set its chat_template") from None
            rows.append({"prompt_ids": ids, "responses": [answer[: max(max_length - len(ids), 1)]]})
        scores = layout.scored(
            rows,
            at_ends,
            tokenizer.pad_token_id,
            tokens=SCORED_TOKENS,
            device=distributed.device(),
            even=_as_many_on_every_rank,
        )
        return torch.cat(scores)

    return score


def _as_many_on_every_rank(parts: list[list[int]]) -> list[list[int]]:
    """Repeat the last micro-batch until all ranks have the same number: forward passes of ZeRO-3 are collective."""
    return parts + [parts[-1]] * (distributed.largest(len(parts)) - len(parts))
