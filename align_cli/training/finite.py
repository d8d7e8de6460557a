"""Ends a run whose loss or weights are not finite, before such weights are saved."""

from __future__ import annotations

import math

import torch
from torch.nn import Module
from transformers import Trainer, TrainerCallback

from align_cli import distributed
from align_cli.errors import TrainingError
from align_cli.model import zero
from align_cli.run.directory import RunDirectory


def broken_weight(model: Module) -> str:
    """The name of a trained parameter that holds NaN or infinity on any rank, or the empty string. A collective."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    finite = [zero.local(parameter).isfinite().all() for _, parameter in trained]
    # one transfer for all of them
    bad = bool(finite) and not torch.stack(finite).all()
    mine = next((name for (name, _), fine in zip(trained, finite, strict=True) if not fine), "") if bad else ""
    return next((name for name in distributed.gather(mine) if name), "")


def error(run: RunDirectory, trainer: Trainer, finding: str) -> TrainingError:
    """The error of a run that cannot go on; `finding` says what is not finite."""
    last = run.latest_checkpoint()
    left = f"; {last} has the last finite weights" if last else ""
    return TrainingError(
        f"{run.path}: step {trainer.state.global_step}: {finding}; lower trainer.learning_rate, or look for such "
        f"numbers in the model and the data, and run again with force=true{left}"
    )


class Finite(TrainerCallback):
    """Ends a run whose loss or weights are not finite, before such weights are saved: all later steps and stages would
    compute nothing. transformers would go on, and print a loss that is NaN as 0.

    `guarded`: a guard of the recipe ends the run on such a loss, so that only weights are watched.
    """

    def __init__(self, trainer: Trainer, run: RunDirectory, guarded: bool = False):
        self.trainer, self.run, self.guarded = trainer, run, guarded

    def on_log(self, args, state, control, logs=None, **kwargs):
        # under fp16, a gradient that overflows is normal: its step is left out and the loss scale lowered
        watched = ("loss",) if args.fp16 else ("loss", "grad_norm")
        broken = [key for key in watched if key in (logs or {}) and not math.isfinite(float(logs[key]))]
        if broken and not self.guarded:
            raise self.error(f"{broken[0]} is {float(logs[broken[0]])}")

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and (broken := broken_weight(self.trainer.model)):
            if not self.guarded:
                raise self.error(f"{broken} is not finite")
            control.should_save = False

    def check(self) -> None:
        """Raises TrainingError if a trained weight is not finite. A collective."""
        if broken := broken_weight(self.trainer.model):
            raise self.error(f"{broken} is not finite")

    def error(self, finding: str) -> TrainingError:
        """The error of this run at its current step."""
        return error(self.run, self.trainer, finding)
