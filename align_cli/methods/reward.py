"""Training and measuring a reward model on groups: K forward passes a ranking, not one for every side of every pair.

Departs from TRL's RewardTrainer: a batch element is a prompt with its K responses, an optimizer step is cut into
micro-batches by tokens instead of rows, and held-out figures come with their baselines.

Shapes: b groups, k responses, h heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from align_cli.methods import layout as layouts
from align_cli.methods import losses, quality
from align_cli.methods.layout import Row
from align_cli.model.reward import takes_4d_masks

AGREE = 0.05
"""Relative difference of hidden states up to which both layouts count as the same: bfloat16 rounding is 0.01."""


class Batch:
    """Groups as they pass through a data loader, which must not look into them."""

    def __init__(self, rows: list[Row]):
        self.rows = rows


def collate(rows: list[Row]) -> dict[str, Batch]:
    """A data loader's batch."""
    return {"groups": Batch(rows)}


class Objective:
    """A method's loss over groups."""

    def __init__(self, loss: str, *, margin: float | str | None, center: float):
        self.loss, self.margin, self.center = loss, margin, center

    def weights(self, rows: list[Row]) -> Tensor:
        """(b,) what each group counts for in the mean: its pairs, where every pair is an element, else 1."""
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


class RankingTrainer(Trainer):
    """Trains a scoring model (`model.reward.scoring`) on groups.

    A data loader's batch is all of a rank's groups of one optimizer step; `batch_tokens` decides how many go through
    the model at a time. The loss is the mean over the groups of all ranks, however they are cut.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        layout: str,
        batch_tokens: int,
        say: Callable[[str], None] = lambda text: None,
        **kwargs: Any,
    ):
        super().__init__(*args, data_collator=collate, **kwargs)
        self.objective, self.batch_tokens, self.say = objective, batch_tokens, say
        self.layout = layout
        self.pad = self.processing_class.pad_token_id
        self._total_train_tokens = 0
        self._sums = torch.zeros(4)
        self.model_accepts_loss_kwargs = False

    # -- scores

    def scores(self, model: Any, rows: list[Row]) -> tuple[Tensor, int]:
        """(b, k, h) scores of the groups' responses, 0 where there is none; and the tokens that it took."""
        packed = layouts.LAYOUTS[self._settled(model, rows)](rows, self.pad, self.args.device)
        return packed.regroup(model(**packed.inputs)), packed.tokens

    def _settled(self, model: Any, rows: list[Row]) -> str:
        """The layout in use; `auto` tries the shared one on the first groups and keeps it if it gives the same."""
        if self.layout != "auto":
            return self.layout
        error = torch.tensor(1.0, device=self.args.device)
        if takes_4d_masks(self.accelerator.unwrap_model(self.model)):
            training = self.model.training
            model.eval()
            with torch.no_grad():
                one, many = (
                    packed.regroup(model(**packed.inputs, hidden=True))
                    for packed in (make(rows[:1], self.pad, self.args.device) for make in layouts.LAYOUTS.values())
                )
            model.train(training)
            error = (one - many).norm() / many.norm()
        error = self.accelerator.gather(error.reshape(1)).max().item()
        self.layout = "shared" if error < AGREE else "rows"
        if self.layout == "rows":
            self.say("this model's attention takes no 4-D masks: every response goes through it with its own prompt")
        return self.layout

    # -- training

    def training_step(self, model: Any, inputs: dict[str, Batch], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over one optimizer step's groups. Returns the loss, scaled so that the mean over ranks
        is the mean over groups."""
        model.train()
        rows = inputs["groups"].rows
        self._settled(model, rows)
        weights = self.objective.weights(rows)
        total = self._summed(weights.sum())
        parts = self._even(layouts.fill(rows, self.layout, self.batch_tokens))
        loss = torch.zeros((), device=self.args.device)
        for number, (part, real) in enumerate(parts, 1):
            picked = [rows[at] for at in part]
            with self._synchronizing(model, number == len(parts)), self.compute_loss_context_manager():
                scores, tokens = self.scores(model, picked)
                each = self._each(scores, picked)
                share = weights[part].to(each.device) * real * self.accelerator.num_processes / total
                value = (each * share).sum()
                extra = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                self.accelerator.backward(value, **extra)
            loss += value.detach()
            if real:
                self._note(scores.detach(), picked, tokens)
        return loss

    def _each(self, scores: Tensor, rows: list[Row]) -> Tensor:
        """(b,) losses, a mean over heads; in an ensemble each head counts a group as often as it drew it."""
        if "heads" not in rows[0]:
            return self.objective(scores, rows).mean(1)
        drawn = torch.tensor([row["heads"] for row in rows], device=scores.device, dtype=scores.dtype)
        return (self.objective(scores, rows) * drawn).mean(1)

    def _even(self, parts: list[list[int]]) -> list[tuple[list[int], float]]:
        """(groups, 1) a micro-batch; ranks with fewer repeat their last one with weight 0, since collectives run in
        every forward pass of ZeRO-3."""
        count = torch.tensor([len(parts)], device=self.args.device)
        most = int(self.accelerator.gather(count).max())
        return [(part, 1.0) for part in parts] + [(parts[-1], 0.0)] * (most - len(parts))

    @contextlib.contextmanager
    def _synchronizing(self, model: Any, last: bool):
        """Gradients are exchanged, and DeepSpeed steps, only after the last micro-batch."""
        state = self.accelerator.gradient_state
        state._set_sync_gradients(last)
        held = model.no_sync() if not last and hasattr(model, "no_sync") and not self.is_deepspeed_enabled else None
        with held or contextlib.nullcontext():
            yield
        state._set_sync_gradients(True)

    def _summed(self, value: Tensor) -> float:
        return self.accelerator.reduce(value.to(self.args.device), "sum").item()

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    # -- figures

    def _note(self, scores: Tensor, rows: list[Row], tokens: int) -> None:
        mean = scores.mean(2)
        levels = _levels(rows, mean)
        targets = losses.pair_targets(levels)
        difference = mean.unsqueeze(2) - mean.unsqueeze(1)
        right = (difference > 0).float() + 0.5 * (difference == 0).float()
        sums = [(targets * right).sum(), (targets * difference).sum(), targets.sum(), torch.tensor(float(tokens))]
        self._sums += torch.stack([value.float().cpu() for value in sums])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds accuracy and mean margin of the training pairs since the last log."""
        if "loss" in logs and "train_runtime" not in logs:
            right, margin, pairs, tokens = self.accelerator.reduce(self._sums.to(self.args.device), "sum").tolist()
            logs |= {"accuracy": right / max(pairs, 1), "margin": margin / max(pairs, 1)}
            self._total_train_tokens += int(tokens)
            self._sums.zero_()
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Loss and quality on the held-out groups, logged and returned with `metric_key_prefix`."""
        rows = list(eval_dataset if eval_dataset is not None else self.eval_dataset)
        found = self.score_all(rows)
        mean = [[sum(heads) / len(heads) for heads in group] for group in found]
        lengths = [[len(response) for response in row["responses"]] for row in rows]
        figures = quality.measure(quality.pairs(mean, [row["levels"] for row in rows], lengths))
        figures = {"loss": self._loss_of(found, rows)} | figures
        if found and len(found[0][0]) > 1:
            spread = [torch.tensor(heads).std(unbiased=True).item() for group in found for heads in group]
            figures["spread"] = sum(spread) / len(spread)
        logs = {f"{metric_key_prefix}_{key}": value for key, value in figures.items()}
        self.log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _loss_of(self, found: list[list[list[float]]], rows: list[Row]) -> float:
        weights = self.objective.weights(rows)
        each = []
        for group, row in zip(found, rows, strict=True):
            each.append(self.objective(torch.tensor([group]), [row]).mean())
        return ((torch.stack(each) * weights).sum() / weights.sum()).item()

    @torch.no_grad()
    def score_all(self, rows: list[Row]) -> list[list[list[float]]]:
        """Per group and response the scores of all heads, in the order of `rows`, the same on every rank."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = list(range(rank, len(rows), ranks)) or [0]
        model = self.model_wrapped if self.is_deepspeed_enabled and self.model_wrapped is not self.model else self.model
        training = self.model.training
        model.eval()
        with self.compute_loss_context_manager():
            self._settled(model, [rows[mine[0]]])
            batches = self._even(layouts.fill([rows[at] for at in mine], self.layout, self.batch_tokens))
            found: dict[int, list[list[float]]] = {}
            for part, real in batches:
                picked = [rows[mine[at]] for at in part]
                scores, _ = self.scores(model, picked)
                if real:
                    for at, row, values in zip(part, picked, scores.float().cpu(), strict=True):
                        found[mine[at]] = values[: len(row["responses"])].tolist()
        model.train(training)
        if ranks > 1:
            gathered: list[Any] = [None] * ranks
            torch.distributed.all_gather_object(gathered, found)
            found = {at: values for part in gathered for at, values in part.items()}
        return [found[at] for at in range(len(rows))]
