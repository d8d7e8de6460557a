"""Held-out figures over all rows: independent of the batch, the order and the number of ranks.

transformers and TRL average the means of batches, so that a figure changes with the batch size and, because ranks fill
up the last batch, with their number. Here every row is measured once, and a figure is computed from all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pad_sequence

from align_cli import distributed

Value = TypeVar("Value")

PER_TOKEN = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
"""What TRL's fused head gives for every token."""


class HeldOut:
    """Mixin for trainers; must precede them in the bases."""

    @torch.no_grad()
    def measured(
        self, dataset: Dataset | IterableDataset, measure: Callable[[Module, dict[str, Any]], list[Value]]
    ) -> list[Value]:
        """The values of `measure(model, batch)`, one per row, for all rows in their order; the same on every rank.

        A collator that makes one sequence of a batch (padding-free) leaves one value for all its rows.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        rows = list(dataset) if isinstance(dataset, IterableDataset) else dataset
        mine, size = list(range(rank, len(rows), ranks)), self.args.per_device_eval_batch_size
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        # every forward pass of ZeRO-3 is a collective: ranks with fewer of them repeat one and leave its values out
        repeated = distributed.largest(len(parts)) - len(parts)
        model = self.model_wrapped if self.is_deepspeed_enabled and self.model_wrapped is not self.model else self.model
        training, own = self.model.training, {}
        self.model.eval()
        for part in [*parts, *[(parts or [[0]])[-1]] * repeated]:
            batch = self.on_device(self.data_collator([rows[at] for at in part]))
            with self.compute_loss_context_manager():
                values = measure(model, batch)
            assert len(values) in (1, len(part))
            own |= dict(zip(part, values, strict=False))
        self.model.train(training)
        every = {at: value for theirs in distributed.gather(own) for at, value in theirs.items()}
        return [every[at] for at in range(len(rows)) if at in every]

    def report(self, figures: dict[str, float], prefix: str) -> dict[str, float]:
        """Log held-out figures under a prefix. Returns them with the prefix."""
        logs = {f"{prefix}_{key}": value for key, value in figures.items()}
        training = self.model.training
        # TRL's `log` adds the figures of the mode that the model is in
        self.model.eval()
        self.log(logs)
        self.model.train(training)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch on this rank's device."""
        return {key: value.to(self.args.device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def of_tokens(outputs: Any, mask: Tensor) -> list[dict[str, Tensor]]:
    """For each sequence of a batch what the fused head gave for its tokens. mask: (b, t), true where a token counts."""
    given = {name: getattr(outputs, name, None) for name in PER_TOKEN}
    # prompt learning puts virtual tokens in front
    tables = {name: table[:, -mask.shape[1] :].detach() for name, table in given.items() if table is not None}
    return [{name: table[row][mask[row]].cpu() for name, table in tables.items()} for row in range(len(mask))]


class Replay:
    """A model that returns given outputs, so that TRL's loss can be computed over all rows at once."""

    def __init__(self, *outputs: Any):
        self.outputs = list(outputs)

    def __call__(self, **inputs: Any) -> Any:
        return self.outputs.pop(0)


class Outputs:
    """The outputs of one forward pass over all sequences, as TRL's fused head returns them: (rows, t) per token."""

    def __init__(self, sequences: list[dict[str, Tensor]], device: torch.device):
        lengths = torch.tensor([len(one["log_probs"]) for one in sequences])
        for name in sequences[0]:
            setattr(self, name, pad_sequence([one[name] for one in sequences], batch_first=True).to(device))
        self.mask = (torch.arange(self.log_probs.shape[1]) < lengths.unsqueeze(1)).long().to(device)
        # a mixture of experts' balance is a figure of batches, not of rows
        self.aux_loss = torch.zeros((), device=device)

    def inputs(self) -> dict[str, Tensor]:
        """The inputs that belong to it; a first column stands for the prompt."""
        prompt = torch.zeros_like(self.mask[:, :1])
        completion = torch.cat([prompt, self.mask], 1)
        return {
            "input_ids": torch.zeros_like(completion),
            "attention_mask": torch.cat([prompt + 1, self.mask], 1),
            "completion_mask": completion,
        }
