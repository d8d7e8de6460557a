"""Callbacks of every trainer: progress line, metrics.jsonl, checkpoint markers, and a clean stop on a signal."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from align_cli import distributed
from align_cli.training.stop import StopRequest

DROPPED = ("epoch", "total_flos", "num_tokens", "runtime", "samples_per_second", "steps_per_second")
"""Log entries unrelated to the method, left out of metrics.jsonl with or without the prefix eval_."""
PLAIN_LINES = 20
"""Progress lines that a run prints if the console is not a terminal."""


class Metrics(TrainerCallback):
    """Writes one JSON object per logging step: step, epoch, loss, tokens_per_second, and the method's own metrics."""

    def __init__(self, file: Path, count_tokens: Callable[[], int]):
        self.file, self.count_tokens = file, count_tokens
        self.last: dict[str, Any] = {}
        self._mark = (time.monotonic(), 0)

    def on_train_begin(self, args, state, control, **kwargs):
        self._mark = (time.monotonic(), self.count_tokens())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "train_runtime" in logs:
            return
        row: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        row |= {key: value for key, value in logs.items() if key.removeprefix("eval_") not in DROPPED}
        if "loss" in logs:
            moment, tokens = time.monotonic(), self.count_tokens()
            row["tokens_per_second"] = round((tokens - self._mark[1]) / max(moment - self._mark[0], 1e-9), 1)
            self._mark = (moment, tokens)
        row = {key: value for key, value in row.items() if isinstance(value, (int, float, str))}
        self.last |= row
        if state.is_world_process_zero:
            # NaN is not valid JSON; write null so that parsers do not fail
            row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")


class ProgressLine(TrainerCallback):
    """A progress bar with step, loss, tokens/s and time left; plain lines if the console is not a terminal."""

    def __init__(self, label: str, metrics: Metrics, console: Console):
        self.label, self.metrics, self.console = label, metrics, console
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.due = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task(self.label, total=state.max_steps, completed=state.global_step, shown="")
        self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        names = ("loss", "eval_loss", "rewards/accuracies", "eval_rewards/accuracies", "rewards/margins")
        shown = [f"{key.replace('rewards/', '')} {logs[key]:.4f}" for key in names if key in logs]
        if "loss" in logs:
            shown.append(f"{self.metrics.last.get('tokens_per_second', 0):.0f} tokens/s")
        if self.bar is not None:
            self.bar.update(self.task, shown=" · ".join(shown))
        elif "eval_loss" in logs or state.global_step >= self.due or state.global_step == state.max_steps:
            self.due = state.global_step + state.max_steps / PLAIN_LINES
            line = f"{self.label} step {state.global_step}/{state.max_steps} · {' · '.join(shown)}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class CheckpointMarks(TrainerCallback):
    """Marks a checkpoint as complete once every rank has written its part."""

    def __init__(self, marker: str):
        self.marker = marker

    def on_save(self, args, state, control, **kwargs):
        distributed.barrier()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.marker).touch()


class DefaultSaves(TrainerCallback):
    """When a run writes a checkpoint if its recipe does not say: after every 20 % of its steps, as the training
    arguments have it, and every hour. A large checkpoint is left out as long as writing it would take more than 5 % of
    the time since the last one. Rank 0 decides for all ranks."""

    LARGE = 5 << 30
    """Bytes of a checkpoint that is large."""
    WORTH = 20
    """Seconds of training for each second of writing."""
    LONG = 3600.0
    """Seconds after which a checkpoint is written between the 20 %."""
    PARTS = 50
    """Parts of a run after which that is asked."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.cost, self.large = 0.0, False
        self.last = self.began = clock()

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = self.clock()

    def on_step_end(self, args, state, control, **kwargs):
        part = max(1, state.max_steps // self.PARTS)
        if not control.should_save and state.global_step % part:
            return
        self.began = self.clock()
        trained = self.began - self.last
        worth = trained >= self.WORTH * self.cost
        wanted = (control.should_save and (worth or not self.large)) or (worth and trained >= self.LONG)
        control.should_save = bool(distributed.largest(int(wanted and state.is_world_process_zero)))

    def on_save(self, args, state, control, **kwargs):
        self.last = self.clock()
        self.cost = self.last - self.began
        files = (Path(args.output_dir) / f"checkpoint-{state.global_step}").rglob("*")
        self.large = sum(file.stat().st_size for file in files if file.is_file()) >= self.LARGE


class OrderlyStop(TrainerCallback):
    """Saves a checkpoint and ends training after the current step if any rank received a signal."""

    def __init__(self):
        self.request = StopRequest()
        self._listening = contextlib.ExitStack()

    @property
    def received(self) -> int | None:
        """The signal that ended training."""
        return self.request.received

    def on_train_begin(self, args, state, control, **kwargs):
        self._listening.enter_context(self.request.listening())

    def on_step_end(self, args, state, control, **kwargs):
        if self.request.on_any_rank() is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self._listening.close()
