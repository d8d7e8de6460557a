"""KTO on TRL's trainer with tokenized responses.

Differences from TRL's KTOTrainer: rows are not tokenized, truncated or dropped again; the mismatched responses for the
KL estimate are taken from the whole optimizer step, not from a device's micro-batch, so that the result does not depend
on the number of ranks; held-out rows get an accuracy.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import KTOTrainer

from align_cli.compat.trl_private import PreparedRows
from align_cli.model import log_probs


class KtoTrainer(PreparedRows, KTOTrainer):
    """TRL's KTOTrainer for `prompt_ids`, `completion_ids`, `label`. `block` is the rows per step over all ranks."""

    def __init__(self, *args: Any, block: int, **kwargs: Any):
        self.block = block
        super().__init__(*args, **kwargs)

    def prepared(self, dataset: Dataset) -> Dataset:
        """The rows, each with a mismatched response if the loss estimates the KL."""
        if not self.calculate_KL or "KL_completion_ids" in dataset.column_names:
            return dataset
        return dataset.add_column("KL_completion_ids", rotated(dataset["completion_ids"], self.block))

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """TRL's metrics, and how often a good response has a higher implied reward than a bad one."""
        rewards, labels = self._rewards(eval_dataset)
        if labels.any() and not labels.all():
            self.eval_figures["rewards/accuracies"].append(ranked(rewards[labels], rewards[~labels]))
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    @torch.no_grad()
    def _rewards(self, dataset: Dataset | None) -> tuple[Tensor, Tensor]:
        """(rows,) β·log π/π_ref of the held-out responses, and (rows,) whether each is good."""
        rewards, labels, training = [], [], self.model.training
        self.model.eval()
        engine = (
            self.model_wrapped if self.is_deepspeed_enabled and self.model_wrapped is not self.model else self.model
        )
        for batch in self.get_eval_dataloader(dataset):
            batch = self.on_device(batch)
            with self.compute_loss_context_manager():
                policy = self._log_probs(engine, batch)
                reference = self._reference(batch)
            each = self.accelerator.gather_for_metrics((self.beta * (policy - reference), batch["label"]))
            rewards.append(each[0].float().cpu())
            labels.append(each[1].bool().cpu())
        self.model.train(training)
        return torch.cat(rewards), torch.cat(labels)

    def _reference(self, batch: dict[str, Tensor]) -> Tensor:
        if self.ref_model is not None:
            return self._log_probs(self.ref_model, batch)
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            return self._log_probs(self.model, batch)

    @staticmethod
    def _log_probs(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        """(b,) summed log-probabilities of the responses."""
        return log_probs.of_responses(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])[0]


def rotated(responses: list[list[int]], block: int) -> list[list[int]]:
    """For every row the response of the previous row of its block; the first row gets the last one's (KTO,
    arXiv 2402.01306, §4.1)."""
    made = []
    for start in range(0, len(responses), block):
        part = responses[start : start + block]
        made += part[-1:] + part[:-1]
    return made


def ranked(good: Tensor, bad: Tensor) -> float:
    """Probability that a good response has a higher reward than a bad one; ties count half."""
    difference = good.unsqueeze(1) - bad.unsqueeze(0)
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item()


def balance(good: int, bad: int, desirable: float, undesirable: float) -> str:
    """Advice if the weights violate eq. 8 of the paper, else the empty string."""
    if not good or not bad:
        return ""
    ratio = desirable * good / (undesirable * bad)
    if 1 <= ratio <= 4 / 3:
        return ""
    return (
        f"{good} good and {bad} bad responses: λ_D·n_D / (λ_U·n_U) is {ratio:.2f}, the paper recommends 1 to 1.33; "
        f"method.desirable_weight={undesirable * bad / good:.3g} gives 1"
    )
