"""The training loop that every stage shares, from a built trainer to a finished run."""

from __future__ import annotations

import json
import math
import platform
import resource
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from align_cli import distributed
from align_cli.compat.trl_private import trained_tokens
from align_cli.data.groups import Count
from align_cli.errors import TrainingError
from align_cli.run.directory import COMPLETE, trim_metrics
from align_cli.training.callbacks import CheckpointMarks, DefaultSaves, Metrics, OrderlyStop, ProgressLine
from align_cli.training.checkpoints import check_resumable, finish, record
from align_cli.training.finite import Finite
from align_cli.training.job import Job, Outcome
from align_cli.training.samples import Samples
from align_cli.training.steps import StepTrainer


def run_to_end(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, job: Job, counts: list[Count]) -> Outcome:
    """Answer the samples, train, answer them again, and save: everything from a built trainer to a finished run."""
    samples = Samples(job, tokenizer)
    samples.answer(trainer, "before")
    metrics, stopped_by = loop(trainer, job)
    if job.recipe.data.streaming:
        # counts of rows that are not streamed were printed before the first step
        for line in (line for count in counts for line in count.lines()):
            job.say(line)
    if stopped_by is None:
        samples.answer(trainer, "after")
        finish(trainer, tokenizer, job)
    extra = {"layout": trainer.layout} if isinstance(trainer, StepTrainer) else {}
    return Outcome(metrics, counts, stopped_by, extra)


def loop(trainer: Trainer, job: Job, last: TrainerCallback | None = None) -> tuple[dict[str, Any], int | None]:
    """Train, from the last complete checkpoint if one exists. Returns final metrics and the signal that stopped it.

    Raises LaunchError if the checkpoint was written under ZeRO by a different number of ranks.
    """
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    metrics = Metrics(job.run.metrics, lambda: trained_tokens(trainer))
    stop = OrderlyStop()
    guarded = any(
        guard.metric == "nan" and guard.act in ("stop", "rollback") for guard in getattr(job.recipe, "guards", ())
    )
    finite = Finite(trainer, job.run, guarded)
    for callback in (
        metrics,
        ProgressLine(f"{job.recipe.name}/{job.run.path.name}", metrics, job.console),
        CheckpointMarks(COMPLETE),
        *([] if {"save_steps", "save_strategy"} & set(job.recipe.trainer) else [DefaultSaves()]),
        stop,
        *([last] if last else []),
        finite,
    ):
        trainer.add_callback(callback)
    _look_for_steps(trainer)
    resume = distributed.from_rank_0(lambda: _starting_point(job))
    result = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if stop.received is not None:
        return {}, stop.received
    if not guarded:
        finite.check()
    final = {"train_loss": result.training_loss, "steps": trainer.state.global_step, "epochs": trainer.state.epoch}
    final |= {"seconds": round(result.metrics["train_runtime"], 1), "peak_memory_mib": _peak_memory()}
    final |= metrics.last
    if trainer.eval_dataset is not None:
        trainer.evaluate()
        final |= metrics.last
    return {key: value for key, value in final.items() if key not in ("step", "epoch") and _finite(value)}, None


def _look_for_steps(trainer: Trainer) -> None:
    """Raises TrainingError if the rows do not make one step: transformers would train nothing and call it done."""
    batches = trainer.get_train_dataloader()
    if isinstance(batches.dataset, torch.utils.data.IterableDataset):
        return
    if len(batches) == 0:
        rows = len(trainer.train_dataset)
        raise TrainingError(
            f"data.train: {rows} rows do not make one step, so that nothing would be trained; give more rows, "
            "or lower data.batch_size"
        )


def _starting_point(job: Job) -> Path | None:
    """The checkpoint to resume from, if any, on rank 0, which makes the run directory agree with it."""
    job.run.drop_half_written()
    resume = job.run.latest_checkpoint()
    if resume is None:
        job.run.metrics.unlink(missing_ok=True)
    else:
        step = json.loads((resume / "trainer_state.json").read_text())["global_step"]
        check_resumable(resume, step, job)
        trim_metrics(job.run.metrics, step)
        job.say(f"resuming from step {step} ({resume})")
    job.run.checkpoints.mkdir(parents=True, exist_ok=True)
    record(job)
    return resume


def _peak_memory() -> int:
    """Peak memory of this process so far, in MiB: GPU memory, or main memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most >> (10 if platform.system() == "Linux" else 20)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))
