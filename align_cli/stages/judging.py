"""A judge as a reward: the answers to a prompt are compared with each other, each two in both orders, under a principle
of a constitution (arXiv 2212.08073, §4; averaged over both orders as in RLAIF, arXiv 2309.00267).

An answer's score is the mean probability that it is better than another one to the same prompt, which is comparable
among the answers to one prompt and not across prompts.

Shapes: b answers.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, groupby
from typing import Any

import torch

from align_cli.methods import feedback
from align_cli.model.endpoint import cost
from align_cli.model.zero import loading_whole
from align_cli.recipe import constitution
from align_cli.recipe.constitution import Constitution, Principle
from align_cli.recipe.rewards import RewardSource, reward_keys
from align_cli.recipe.sections import Model
from align_cli.stages.job import Job
from align_cli.stages.kept import Kept
from align_cli.stages.labelling import useless
from align_cli.stages.speakers import Local, Remote, probe


class Judging:
    """(prompts, texts) -> (b, 1) scores; the answers to one prompt stand beside each other."""

    def __init__(self, job: Job, source: RewardSource, key: str):
        self.job, judge = job, source.judge
        self.law: Constitution = constitution.chosen(source.constitution, source.principles, key)
        self.kept = Kept(job)

        def spend(used: dict[str, int]) -> None:
            self.kept.spend("judge", used)

        if judge.endpoint:
            self.speaker: Local | Remote = Remote(job, judge, f"{key}.judge", spend)
        else:
            with loading_whole():
                named = Model(path=judge.path, chat_template=judge.chat_template)
                self.speaker = Local(job, named, judge.path, spend)

    def __call__(self, asked: list[Any], texts: list[str]) -> torch.Tensor:
        questions, places = [], []
        for prompt, rows in groupby(range(len(texts)), key=asked.__getitem__):
            principle = self.principle(prompt)
            for one, other in combinations(list(rows), 2):
                if not useless([texts[one], texts[other]]):
                    for first, second in ((one, other), (other, one)):
                        text = feedback.question(prompt, principle.comparison, texts[first], texts[second])
                        questions.append(text)
                    places.append((one, other))
        found = self._choose(questions)
        if silent := sum(p is None for p in found):
            self.kept.spend("judge", {"undecided": silent})
        better = {
            pair: feedback.label(*(0.5 if p is None else p for p in found[2 * n : 2 * n + 2]))
            for n, pair in enumerate(places)
        }
        return torch.tensor(_means(asked, texts, better)).unsqueeze(1)

    def principle(self, prompt: list[dict[str, str]]) -> Principle:
        """The one that the answers to this prompt are compared under."""
        return random.Random(f"{self.job.recipe.seed} comparison {prompt}").choice(self.law.principles)

    def _choose(self, questions: list[str]) -> list[float | None]:
        """P(A) for each question; None where the judge names no letter."""
        size = self.job.recipe.generation.batch if isinstance(self.speaker, Local) else 1
        order = sorted(range(len(questions)), key=lambda at: len(questions[at]))
        units = [order[start : start + size] for start in range(0, len(order), size)]

        def ask(unit: list[int]) -> list[tuple[float, float] | None]:
            return self.speaker.choose([questions[at] for at in unit], [None] * len(unit))

        with ThreadPoolExecutor(self.speaker.workers) as pool:
            answers = pool.map(ask, units)
            found = {
                at: pair
                for unit, pairs in zip(units, answers, strict=True)
                for at, pair in zip(unit, pairs, strict=True)
            }
        return [found[at] and feedback.probability(*found[at]) for at in range(len(questions))]


def judged(recipe: Any) -> list[tuple[str, RewardSource]]:
    """(key, reward) of every reward that is a judge's."""
    rewards = getattr(recipe, "reward", None) or []
    return [(key, one) for one, key in zip(rewards, reward_keys(len(rewards)), strict=True) if one.judge is not None]


def probe_judges(job: Job) -> None:
    """As `speakers.probe`, for the judges of a recipe."""
    probe(Kept(job), [(f"{key}.judge", one.judge) for key, one in judged(job.recipe)])


def laws(recipe: Any) -> list[Constitution]:
    """The constitutions of a recipe's judges."""
    return [constitution.chosen(one.constitution, one.principles, key) for key, one in judged(recipe)]


def usage(job: Job) -> dict[str, Any]:
    """For a round's manifest, what its judges used (tokens, requests, retries, questions without an answer) and the
    constitutions. Empty without a judge."""
    named = judged(job.recipe)
    if not named:
        return {}
    used = Kept(job).spent().get("judge", {})
    record = {"usage": used, "constitution": [{"path": law.path, "sha256": law.sha256} for law in laws(job.recipe)]}
    if len(named) == 1 and (paid := cost(used, named[0][1].judge)) is not None:
        record["cost"] = paid
    return {"judge": record}


def _means(asked: list[Any], texts: list[str], better: dict[tuple[int, int], float]) -> list[float]:
    """For each answer the mean of P(it is better) over the others of its prompt. Equal answers draw, and an empty one
    loses to any other."""
    means = []
    for _, rows in groupby(range(len(texts)), key=asked.__getitem__):
        group = list(rows)
        for one in group:
            wins = []
            for other in group:
                if one == other:
                    continue
                pair = (min(one, other), max(one, other))
                if pair in better:
                    wins.append(better[pair] if one < other else 1 - better[pair])
                else:
                    blank = [not texts[at].strip() for at in (one, other)]
                    wins.append(0.5 if blank[0] == blank[1] else float(blank[1]))
            means.append(sum(wins) / len(wins) if wins else 0.5)
    return means
