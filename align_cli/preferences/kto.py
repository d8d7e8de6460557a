"""KTO on TRL's trainer with tokenized responses.

Differences from TRL's KTOTrainer: rows are not tokenized, truncated or dropped again; each epoch draws a new order;
the mismatched responses for the KL estimate are taken from the whole optimizer step, not from a device's micro-batch,
so that the result does not depend on the number of ranks; held-out rows get an accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import Module
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback
from trl import KTOTrainer

from align_cli.compat.trl_private import OwnOrder, PreparedRows
from align_cli.model import log_probs
from align_cli.training.held_out import HeldOut, Outputs, Replay, of_tokens

Item = TypeVar("Item")


class EpochOrder(Sampler[tuple[int, int]]):
    """(a row, the row whose response is its mismatch), in an order drawn anew for each epoch. It depends on nothing but
    the seed and the epoch, so that a resumed run and any number of ranks see the same."""

    def __init__(self, rows: int, block: int, seed: int):
        self.rows, self.block, self.seed = rows, block, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[tuple[int, int]]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.rows, generator=draw).tolist()
        return zip(order, rotated(order, self.block), strict=True)


class Mismatched(torch.utils.data.Dataset):
    """Rows addressed by the pairs of an EpochOrder."""

    def __init__(self, rows: Dataset):
        self.rows, self.responses = rows, rows.select_columns("completion_ids")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, pair: tuple[int, int]) -> dict[str, Any]:
        row, other = pair
        return self.rows[row] | {"KL_completion_ids": self.responses[other]["completion_ids"]}


class CountEpochs(TrainerCallback):
    """Tells an EpochOrder which epoch begins. accelerate does not reach it through a resumed run's data loader."""

    def __init__(self, order: EpochOrder):
        self.order = order

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.order.epoch = int(state.epoch or 0)


class KtoTrainer(HeldOut, OwnOrder, PreparedRows, KTOTrainer):
    """TRL's KTOTrainer for `prompt_ids`, `completion_ids`, `label`. `block` is the rows per step over all ranks."""

    def __init__(self, *args: Any, block: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.order = EpochOrder(len(self.train_dataset), block, self.args.seed)
        self.add_callback(CountEpochs(self.order))
        self.train_dataset = Mismatched(self.train_dataset)
        if self.calculate_KL and self.eval_dataset is not None:
            # mismatches of held-out rows depend on no batch
            responses = rotated(self.eval_dataset["completion_ids"], len(self.eval_dataset))
            self.eval_dataset = self.eval_dataset.add_column("KL_completion_ids", responses)

    def row_order(self) -> EpochOrder:
        """The order of training rows, with their mismatches."""
        return self.order

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """TRL's loss and figures over all held-out responses, with one estimate of the KL from all mismatches; and how
        often a good response has a higher implied reward than a bad one."""
        rows = self.measured(self.eval_dataset if eval_dataset is None else eval_dataset, self._responses)
        device = self.accelerator.device
        outputs = Outputs([row["policy"] for row in rows], device)
        inputs = outputs.inputs()
        for name in ("label", "ref_logps", "ref_KL_logps"):
            inputs[name] = torch.tensor([row[name] for row in rows], device=device)
        mismatched = Outputs([{"log_probs": row["kl"]} for row in rows], device)
        inputs |= {f"KL_{key}": value for key, value in mismatched.inputs().items()}
        first = [mismatched] if self.calculate_KL else []
        figures = {"loss": self.whole_loss(Replay(*first, outputs), inputs)}
        rewards, labels = self.beta * (outputs.log_probs.sum(1) - inputs["ref_logps"]), inputs["label"].bool()
        if labels.any() and not labels.all():
            figures["rewards/accuracies"] = ranked(rewards[labels], rewards[~labels])
        return self.report(figures, metric_key_prefix)

    def _responses(self, model: Module, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        """For every row what the policy gives for the tokens of its response, the reference's sum, both sums of the
        mismatched response, and whether the response is good."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        outputs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        )
        sequences = of_tokens(outputs, batch["completion_mask"][:, 1:].bool())
        other = {key.removeprefix("KL_"): value for key, value in batch.items() if key.startswith("KL_")}
        none = torch.zeros(len(labels))
        kl = self._log_probs(model, other).cpu() if self.calculate_KL else none
        reference = self._reference(model, batch).tolist()
        of_other = self._reference(model, other).tolist() if self.calculate_KL else none.tolist()
        return [
            {"policy": sequence, "label": bool(label), "ref_logps": sum_, "ref_KL_logps": other_sum, "kl": one.view(1)}
            for sequence, label, sum_, other_sum, one in zip(
                sequences, batch["label"], reference, of_other, kl, strict=True
            )
        ]

    def _reference(self, model: Module, batch: dict[str, Tensor]) -> Tensor:
        if self.ref_model is not None:
            return self._log_probs(self.ref_model, batch)
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            return self._log_probs(model, batch)

    @staticmethod
    def _log_probs(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        """(b,) summed log-probabilities of the responses."""
        return log_probs.of_responses(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])[0]


def rotated(items: Sequence[Item], block: int) -> list[Item]:
    """For every item the previous one of its block; the first gets the last one's (KTO, arXiv 2402.01306, §4.1). A last
    block of a single item, which would be its own mismatch, is part of the one before."""
    starts = list(range(0, len(items), block))
    if len(starts) > 1 and len(items) - starts[-1] == 1:
        starts.pop()
    made = []
    for start, end in zip(starts, [*starts[1:], len(items)], strict=True):
        part = list(items[start:end])
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
