"""A judge as a reward: compares all pairs of a prompt's answers, each in both orders, under a principle of a
constitution (arXiv 2212.08073, §4; averaged over both orders as in RLAIF, arXiv 2309.00267).

An answer's score is the mean probability that it is better than another answer to the same prompt. Scores are
comparable between answers to one prompt, but not across prompts.

Shapes: b answers.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, groupby
from typing import Any

import torch

from align_cli.generation.generators import check_endpoints, from_source
from align_cli.model.zero import loading_whole
from align_cli.recipe import constitution
from align_cli.recipe.constitution import Constitution, Principle
from align_cli.recipe.rewards import RewardSource
from align_cli.recipe.sections import Recipe
from align_cli.rewards.comparison import label, no_pair, probability, question
from align_cli.rewards.reward import Messages
from align_cli.training.job import Job
from align_cli.training.journal import RowJournal


class Judge:
    """A scorer (prompts, texts) -> (b, 1); answers to the same prompt must be adjacent."""

    def __init__(self, job: Job, source: RewardSource, key: str):
        self.job, judge = job, source.judge
        self.constitution: Constitution = constitution.chosen(source.constitution, source.principles, key)
        self.journal = RowJournal(job)

        def spend(used: dict[str, int]) -> None:
            self.journal.spend("judge", used)

        recipe = job.recipe
        with loading_whole():
            dtype = job.precision.generator
            self.generator = from_source(judge, f"{key}.judge", recipe.generation, spend, dtype=dtype, say=job.say)

    def __call__(self, prompts: list[Messages], texts: list[str]) -> torch.Tensor:
        questions, places = [], []
        for prompt, rows in groupby(range(len(texts)), key=prompts.__getitem__):
            principle = self.principle(prompt)
            for one, other in combinations(list(rows), 2):
                if not no_pair([texts[one], texts[other]]):
                    for first, second in ((one, other), (other, one)):
                        text = question(prompt, principle.comparison, texts[first], texts[second])
                        questions.append(text)
                    places.append((one, other))
        probabilities = self._choose(questions)
        if silent := sum(p is None for p in probabilities):
            self.journal.spend("judge", {"undecided": silent})
        better = {
            pair: label(*(0.5 if p is None else p for p in probabilities[2 * n : 2 * n + 2]))
            for n, pair in enumerate(places)
        }
        return torch.tensor(_means(prompts, texts, better)).unsqueeze(1)

    def principle(self, prompt: list[dict[str, str]]) -> Principle:
        """The principle, drawn by a hash of seed and prompt, for comparing answers to this prompt."""
        return random.Random(f"{self.job.recipe.seed} comparison {prompt}").choice(self.constitution.principles)

    def _choose(self, questions: list[str]) -> list[float | None]:
        """P(A) for each question; None if the judge names no letter."""
        units = self.generator.units([[{"role": "user", "content": text}] for text in questions])

        def ask(unit: list[int]) -> list[tuple[float, float] | None]:
            return self.generator.choose([questions[at] for at in unit], [None] * len(unit))

        with ThreadPoolExecutor(self.generator.workers) as pool:
            answers = pool.map(ask, units)
            choices = {
                at: pair
                for unit, pairs in zip(units, answers, strict=True)
                for at, pair in zip(unit, pairs, strict=True)
            }
        return [choices[at] and probability(*choices[at]) for at in range(len(questions))]


def check_judges(recipe: Recipe) -> None:
    """`check_endpoints` for the judges of a recipe."""
    check_endpoints([(f"{key}.judge", source.judge) for key, source in recipe.judges()])


def constitutions(recipe: Recipe) -> list[Constitution]:
    """The constitutions of a recipe's judges."""
    return [constitution.chosen(source.constitution, source.principles, key) for key, source in recipe.judges()]


def usage(job: Job) -> dict[str, Any]:
    """The judges' entry in a round's manifest: usage (tokens, requests, retries, undecided questions), cost and
    constitutions. Empty without a judge."""
    judges = job.recipe.judges()
    if not judges:
        return {}
    used = RowJournal(job).spent().get("judge", {})
    named = [{"path": one.path, "sha256": one.sha256} for one in constitutions(job.recipe)]
    record = {"usage": used, "constitution": named}
    if len(judges) == 1 and (cost := judges[0][1].judge.cost(used)) is not None:
        record["cost"] = cost
    return {"judge": record}


def _means(prompts: list[Messages], texts: list[str], better: dict[tuple[int, int], float]) -> list[float]:
    """The mean of P(answer is better) over the other answers to its prompt. Equal answers draw, and an empty answer
    loses to any other."""
    means = []
    for _, rows in groupby(range(len(texts)), key=prompts.__getitem__):
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
