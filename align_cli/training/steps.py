"""Base trainer for reward models and preference losses: trains on groups, split into micro-batches by tokens.

A data loader's batch holds all of a rank's groups of one optimizer step; `batch_tokens` limits how many go through the
model at a time. The prompt of a group is computed once if the model allows it (`training.layout`). The loss is the mean
over the groups of all ranks, independent of the split.

Shapes: b groups.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from transformers import Trainer

from align_cli import distributed
from align_cli.compat.libraries import exchange_gradients
from align_cli.compat.trl_private import set_trained_tokens
from align_cli.model.reward_head import takes_4d_masks
from align_cli.run.directory import write_atomically
from align_cli.training import layout as layouts
from align_cli.training.arguments import Arguments, arguments
from align_cli.training.job import Job
from align_cli.training.layout import Packed, Row

Figures = TypeVar("Figures")
"""What a method notes of a micro-batch."""
Value = TypeVar("Value")

clock = time.perf_counter
TIMED = 3
"""Forward passes of each layout that are timed."""
AGREE = 0.05
"""Relative difference up to which the outputs of both layouts count as equal. bfloat16 rounding is about 0.01."""


class Batch:
    """Groups of a batch, wrapped so that the data loader does not collate or move their contents."""

    def __init__(self, rows: list[Row]):
        self.rows = rows


def collate(rows: list[Row]) -> dict[str, Batch]:
    """A data loader's batch."""
    return {"groups": Batch(rows)}


def step_arguments(cls: type[Arguments], job: Job) -> Arguments:
    """Training arguments for a StepTrainer: a data loader's batch holds all of this rank's groups of one step."""
    return arguments(
        cls,
        job,
        per_device_train_batch_size=job.per_device * job.accumulation,
        gradient_accumulation_steps=1,
        remove_unused_columns=False,
    )


class StepTrainer(Trainer, Generic[Figures]):
    """A trainer over groups. Subclasses compute the losses of a micro-batch."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        layout: str,
        batch_tokens: int,
        say: Callable[[str], None] = lambda text: None,
        record: Path | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, data_collator=collate, **kwargs)
        self.layout, self.batch_tokens, self.say = layout, batch_tokens, say
        self.record = record
        """File that keeps what `auto` stands for."""
        self.measures = self.args.device.type != "cpu"
        """Whether `auto` asks for the faster layout. On a CPU it is the one that computes fewer tokens, and a choice by
        time would differ from run to run."""
        self.pad = self.processing_class.pad_token_id
        set_trained_tokens(self, 0)
        self.model_accepts_loss_kwargs = False

    # -- overridden by methods

    def weights(self, rows: list[Row]) -> Tensor:
        """(b,) weight of each group in the mean."""
        return torch.ones(len(rows))

    def losses(self, model: Module, rows: list[Row]) -> tuple[Tensor, Figures]:
        """(b,) losses of a micro-batch, and its metrics for `note`."""
        raise NotImplementedError

    def note(self, figures: Figures, rows: list[Row]) -> None:
        """Accumulate the metrics of a micro-batch for the next log."""
        raise NotImplementedError

    def probe(self, model: Module, packed: Packed, rows: list[Row]) -> Tensor:
        """The output that must agree between both layouts for the shared one to be used."""
        raise NotImplementedError

    # -- layout

    def settled(self, model: Module, rows: list[Row]) -> str:
        """The layout in use; what `auto` stands for is chosen once, and kept for a resumed run."""
        if self.layout == "auto":
            self.layout = self._kept() or self._chosen(model, rows)
            if self.record is not None and self.accelerator.is_main_process:
                write_atomically(self.record, self.layout)
        return self.layout

    def _kept(self) -> str | None:
        """The choice of the run that is resumed, on every rank; None if there is none that this machine can follow."""
        main = self.accelerator.is_main_process and self.record is not None and self.record.is_file()
        kept = distributed.broadcast(self.record.read_text(encoding="utf-8") if main else None)
        return kept if kept == "rows" or (kept == "shared" and self._takes_4d_masks()) else None

    def _takes_4d_masks(self) -> bool:
        return takes_4d_masks(self.accelerator.unwrap_model(self.model))

    def _chosen(self, model: Module, rows: list[Row]) -> str:
        """The shared layout if its outputs agree with those of rows, and, on a GPU, if it is also the faster one there:
        padding costs attention kernels of a GPU less than a mask does. Both compute some of these groups, without
        gradients and dropout, so that nothing else changes. All ranks choose the same."""
        error, speed = torch.tensor(1.0, device=self.args.device), None
        if self._takes_4d_masks():
            parts = layouts.fill(rows, "rows", self.batch_tokens)
            # of all micro-batches the one of middle length; for the outputs alone one group will do
            some = [rows[at] for at in parts[len(parts) // 2]] if self.measures else rows[:1]
            training = self.model.training
            model.eval()
            with torch.no_grad(), self.compute_loss_context_manager():
                compute = {
                    name: lambda make=make: self.probe(model, make(some, self.pad, self.args.device), some)
                    for name, make in layouts.LAYOUTS.items()
                }
                one, many = compute["shared"](), compute["rows"]()
                if self.measures:
                    speed = self._speed(compute["shared"], compute["rows"])
            model.train(training)
            error = (one - many).norm() / many.norm()
        error = self.accelerator.gather(error.reshape(1)).max().item()
        if error >= AGREE:
            self.say("this model's attention does not support 4-D masks: the prompt is computed anew for each response")
            return "rows"
        if speed is None:
            return "shared"
        faster, ratio = ("shared", speed) if speed >= 1 else ("rows", 1 / speed)
        self.say(f"layout: {faster}, {ratio:.2f} times as fast as the other one on the first groups")
        return faster

    def _speed(self, shared: Callable[[], Tensor], rows: Callable[[], Tensor]) -> float:
        """How many times as fast the first function is as the second, over all ranks. Both were called before."""
        seconds = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for _ in range(TIMED):
            for at, compute in enumerate((shared, rows)):
                self._synchronize()
                start = clock()
                compute()
                self._synchronize()
                seconds[at] += clock() - start
        total = self.accelerator.reduce(seconds, "sum").tolist()
        return distributed.broadcast(total[1] / total[0])

    def _synchronize(self) -> None:
        if self.args.device.type != "cpu":
            torch.accelerator.synchronize()

    def packed(self, model: Module, rows: list[Row]) -> Packed:
        """A micro-batch of these groups, in the layout in use."""
        return layouts.LAYOUTS[self.settled(model, rows)](rows, self.pad, self.args.device)

    # -- training

    def training_step(
        self, model: Module, inputs: dict[str, Batch], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward over one optimizer step's groups. Returns the loss, scaled so that its mean over ranks
        is the mean over groups."""
        model.train()
        rows = inputs["groups"].rows
        self.settled(model, rows)
        weights = self.weights(rows)
        total = self._summed(weights.sum())
        parts = self._even(layouts.fill(rows, self.layout, self.batch_tokens))
        loss = torch.zeros((), device=self.args.device)
        for number, (part, real) in enumerate(parts, 1):
            picked = [rows[at] for at in part]
            with self._synchronizing(model, number == len(parts)), self.compute_loss_context_manager():
                each, figures = self.losses(model, picked)
                share = weights[part].to(each.device) * real * self.accelerator.num_processes / total
                value = (each * share).sum()
                extra = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                self.accelerator.backward(value, **extra)
            loss += value.detach()
            if real:
                self.note(figures, picked)
        return loss

    def _even(self, parts: list[list[int]]) -> list[tuple[list[int], float]]:
        """Micro-batches as (indices of groups, weight). Ranks with fewer of them repeat their last one with weight 0,
        because every forward pass of ZeRO-3 runs collectives."""
        count = torch.tensor([len(parts)], device=self.args.device)
        most = int(self.accelerator.gather(count).max())
        return [(part, 1.0) for part in parts] + [(parts[-1], 0.0)] * (most - len(parts))

    @contextlib.contextmanager
    def _synchronizing(self, model: Module, last: bool) -> Iterator[None]:
        """A context in which gradients are exchanged, and DeepSpeed steps, only after the last micro-batch."""
        state = self.accelerator.gradient_state
        exchange_gradients(state, last)
        ddp = hasattr(model, "no_sync") and not self.is_deepspeed_enabled
        with model.no_sync() if ddp and not last else contextlib.nullcontext():
            yield
        exchange_gradients(state, True)

    def _summed(self, value: Tensor) -> float:
        return self.accelerator.reduce(value.to(self.args.device), "sum").item()

    def floating_point_ops(self, inputs: dict[str, Batch]) -> int:
        return 0

    # -- evaluation

    @torch.no_grad()
    def measured(self, rows: list[Row], measure: Callable[[Module, list[Row]], list[Value]]) -> list[Value]:
        """The result of `measure(model, groups)` for every group, in the order of `rows`, identical on every rank."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = list(range(rank, len(rows), ranks)) or [0]
        model = self.model_wrapped if self.is_deepspeed_enabled and self.model_wrapped is not self.model else self.model
        training = self.model.training
        model.eval()
        with self.compute_loss_context_manager():
            self.settled(model, [rows[mine[0]]])
            own: dict[int, Value] = {}
            for part, real in self._even(layouts.fill([rows[at] for at in mine], self.layout, self.batch_tokens)):
                values = measure(model, [rows[mine[at]] for at in part])
                if real:
                    own |= {mine[at]: value for at, value in zip(part, values, strict=True)}
        model.train(training)
        every = {at: value for theirs in distributed.gather(own) for at, value in theirs.items()}
        return [every[at] for at in range(len(rows))]

    def report(self, figures: dict[str, float], prefix: str) -> dict[str, float]:
        """Log held-out metrics under a prefix. Returns them with the prefix."""
        logs = {f"{prefix}_{key}": value for key, value in figures.items()}
        self.log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs
