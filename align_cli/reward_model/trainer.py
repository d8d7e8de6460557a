"""Trains and evaluates a reward model on groups: K forward passes per ranking, not two per pair.

Differs from TRL's RewardTrainer: a batch element is a prompt with its K responses, an optimizer step is split into
micro-batches by tokens instead of rows, and held-out metrics come with their baselines.

Shapes: b groups, k responses, h heads.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import Module

from align_cli.compat.trl_private import set_trained_tokens, trained_tokens
from align_cli.reward_model import losses, quality
from align_cli.training.layout import Packed, Row
from align_cli.training.steps import StepTrainer


class Objective:
    """A method's loss over groups."""

    def __init__(self, loss: str, *, margin: float | str | None, center: float):
        self.loss, self.margin, self.center = loss, margin, center

    def weights(self, rows: list[Row]) -> Tensor:
        """(b,) weight of each group in the mean: its number of pairs for the pairwise loss, else 1."""
        if self.loss != "pairwise":
            return torch.ones(len(rows))
        return torch.tensor([float(_comparisons(row)) for row in rows])

    def __call__(self, scores: Tensor, rows: list[Row]) -> Tensor:
        """(b, h) losses of (b, k, h) scores."""
        levels, probability = _levels(rows, scores), _probabilities(rows, scores)
        heads = []
        for head in scores.unbind(2):
            targets = losses.pair_targets(levels, probability)
            if self.loss == "plackett-luce":
                value = losses.plackett_luce_loss(head, levels)
            elif self.loss == "best-of-k":
                value = losses.best_of_k_loss(head, levels)
            else:
                value = losses.ranking_loss(head, targets, self._margins(rows, head))
            if self.center:
                value = value + self.center * losses.centering(head, targets)
            heads.append(value)
        return torch.stack(heads, 1)

    def _margins(self, rows: list[Row], scores: Tensor) -> Tensor | float:
        if self.margin != "scores":
            return float(self.margin or 0.0)
        grades = torch.zeros_like(scores)
        for at, row in enumerate(rows):
            grades[at, : len(row["grades"])] = torch.tensor(row["grades"], device=scores.device)
        return grades.unsqueeze(2) - grades.unsqueeze(1)


def _comparisons(row: Row) -> int:
    order = row["levels"]
    return sum(order[i] < order[j] for i in range(len(order)) for j in range(len(order)))


def _levels(rows: list[Row], scores: Tensor) -> Tensor:
    levels = torch.full(scores.shape[:2], -1, device=scores.device)
    for at, row in enumerate(rows):
        levels[at, : len(row["levels"])] = torch.tensor(row["levels"], device=scores.device)
    return levels


def _probabilities(rows: list[Row], scores: Tensor) -> Tensor:
    given = [float("nan") if row.get("probability") is None else row["probability"] for row in rows]
    return torch.tensor(given, device=scores.device, dtype=scores.dtype)


class RankingTrainer(StepTrainer[tuple[Tensor, int]]):
    """Trains a scoring model (`model.reward_head.scoring`) on groups."""

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.objective = objective
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        self._tokens = 0

    # -- scores

    def scores(self, model: Module, rows: list[Row]) -> tuple[Tensor, int]:
        """(b, k, h) scores of the groups' responses, 0 for padding; and the number of tokens computed."""
        packed = self.packed(model, rows)
        return packed.regroup(model(**packed.inputs)), packed.tokens

    def probe(self, model: Module, packed: Packed, rows: list[Row]) -> Tensor:
        """(b, k, d) hidden states at the responses' ends."""
        return packed.regroup(model(**packed.inputs, hidden=True))

    # -- training

    def weights(self, rows: list[Row]) -> Tensor:
        """(b,) weights of the objective."""
        return self.objective.weights(rows)

    def losses(self, model: Module, rows: list[Row]) -> tuple[Tensor, tuple[Tensor, int]]:
        """(b,) losses, averaged over heads; and the scores and the number of tokens computed."""
        scores, tokens = self.scores(model, rows)
        return self._each(scores, rows), (scores.detach(), tokens)

    def _each(self, scores: Tensor, rows: list[Row]) -> Tensor:
        """(b,) losses, averaged over heads; in an ensemble each head weights a group by its bootstrap count."""
        if "heads" not in rows[0]:
            return self.objective(scores, rows).mean(1)
        drawn = torch.tensor([row["heads"] for row in rows], device=scores.device, dtype=scores.dtype)
        return (self.objective(scores, rows) * drawn).mean(1)

    # -- metrics

    def note(self, figures: tuple[Tensor, int], rows: list[Row]) -> None:
        """Accumulate the number of correctly ordered pairs and their margins, on the device: reading them would make
        the host wait for it."""
        scores, tokens = figures
        mean = scores.mean(2)
        levels = _levels(rows, mean)
        targets = losses.pair_targets(levels)
        difference = mean.unsqueeze(2) - mean.unsqueeze(1)
        right = (difference > 0).float() + 0.5 * (difference == 0).float()
        self._sums += torch.stack([(targets * right).sum(), (targets * difference).sum(), targets.sum()])
        self._tokens += tokens

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add accuracy and mean margin of the training pairs since the last log."""
        if "loss" in logs and "train_runtime" not in logs:
            sums = torch.cat([self._sums, self._sums.new_tensor([self._tokens])])
            right, margin, pairs, tokens = self.accelerator.reduce(sums, "sum").tolist()
            logs |= {"accuracy": right / max(pairs, 1), "margin": margin / max(pairs, 1)}
            set_trained_tokens(self, trained_tokens(self) + int(tokens))
            self._sums.zero_()
            self._tokens = 0
        super().log(logs, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Dataset | list[Row] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and quality on the held-out groups, logged and returned with `metric_key_prefix`."""
        rows = list(eval_dataset if eval_dataset is not None else self.eval_dataset)
        scores = self.score_all(rows)
        mean = [[sum(heads) / len(heads) for heads in group] for group in scores]
        lengths = [[len(response) for response in row["responses"]] for row in rows]
        figures = quality.measure(quality.pairs(mean, [row["levels"] for row in rows], lengths))
        figures = {"loss": self._loss_of(scores, rows)} | figures
        if scores and len(scores[0][0]) > 1:
            spread = [torch.tensor(heads).std(unbiased=True).item() for group in scores for heads in group]
            figures["spread"] = sum(spread) / len(spread)
        return self.report(figures, metric_key_prefix)

    def _loss_of(self, scores: list[list[list[float]]], rows: list[Row]) -> float:
        weights = self.objective.weights(rows)
        each = []
        for group, row in zip(scores, rows, strict=True):
            each.append(self.objective(torch.tensor([group]), [row]).mean())
        return ((torch.stack(each) * weights).sum() / weights.sum()).item()

    def score_all(self, rows: list[Row]) -> list[list[list[float]]]:
        """Scores of all heads per group and response, in the order of `rows`, identical on every rank."""

        def measure(model: Module, picked: list[Row]) -> list[list[list[float]]]:
            scores, _ = self.scores(model, picked)
            each = zip(picked, scores.float().cpu(), strict=True)
            return [values[: len(row["responses"])].tolist() for row, values in each]

        return self.measured(rows, measure)
