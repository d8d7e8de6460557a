"""What every trained stage shares: training arguments, rows as a dataset, the loop, the last save."""

from __future__ import annotations

import contextlib
import io
import json
import math
import platform
import random
import resource
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from align_cli.data import chat
from align_cli.data.groups import Count, read_groups, stream_eval, stream_groups
from align_cli.errors import DataError, LaunchError
from align_cli.methods.watch import CheckpointMarks, Metrics, OrderlyStop, ProgressLine
from align_cli.model import kind, zero
from align_cli.model.load import set_ends
from align_cli.model.zero import deepspeed_config
from align_cli.run.directory import COMPLETE, trim_metrics, write_atomically
from align_cli.stages.job import Job, Outcome, fold_in
from align_cli.stages.samples import Samples


def arguments(cls: type[TrainingArguments], job: Job, **own: Any) -> Any:
    """The stage's training arguments: our defaults, then the recipe's `trainer:`, then what other keys stand for.

    Must be built before any model, or ZeRO-3 does not shard while loading.
    """
    recipe, cuda = job.recipe, torch.cuda.is_available()
    defaults: dict[str, Any] = {
        # TRL's own default is bf16 on a machine that cannot do it, and float32 is what the recipe's dtype promises
        "bf16": cuda and torch.cuda.is_bf16_supported() and not recipe.trainer.get("fp16", False),
        "gradient_checkpointing": cuda,
        "logging_steps": 1 if not cuda else 10,
        "logging_first_step": True,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 0.2,
        "save_total_limit": 2,
        "eval_strategy": "no",
        "lr_scheduler_type": "cosine",
        "per_device_eval_batch_size": job.per_device,
        "dataloader_pin_memory": cuda,
        "include_num_input_tokens_seen": "no",
    }
    fixed: dict[str, Any] = {
        "output_dir": str(job.run.checkpoints),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        **({"max_length": recipe.data.max_length} if "max_length" in cls.__dataclass_fields__ else {}),
        "per_device_train_batch_size": job.per_device,
        "gradient_accumulation_steps": job.accumulation,
        "use_cpu": not cuda,
        "deepspeed": deepspeed_config(recipe.zero),
        "remove_unused_columns": True,
        "disable_tqdm": True,
        "log_level": "error",
        "run_name": f"{recipe.name}-{job.run.path.name}",
        **own,
    }
    given = dict(recipe.trainer)
    if given.get("save_total_limit") == 1:
        # the older checkpoint goes before the newer one is marked whole, and a kill between would leave none
        given["save_total_limit"] = 2
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed announces the operators it builds
        args = cls(**{**defaults, **given, **fixed})
        if args.deepspeed:
            import deepspeed

            zero.build_operators()
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
            zero.unlink_buffers()
    # adapters that are drawn before a trainer exists must be the same on every rank and every time
    set_seed(recipe.seed)
    return args


def datasets(job: Job, need: str, tokenized: Callable[..., Iterable[dict[str, Any]]]) -> tuple[Any, Any, list[Count]]:
    """Training and held-out rows as the trainer takes them, and the row counts, which are printed too.

    `tokenized(groups, tally)` turns groups into rows. The order is seeded and the same on every rank; streamed rows
    are shuffled through a buffer of 1000. Raises DataError for rows that cannot be used.
    """
    data, seed, counts = job.recipe.data, job.recipe.seed, []
    trained, evaluated = chat.Tally(), chat.Tally()
    if data.streaming:
        epochs = 0

        def epoch():
            nonlocal epochs
            epochs += 1
            # the rows of every epoch are the same, so those of the first are the ones that count
            yield from tokenized(stream_groups(data, need, seed, counts if epochs == 1 else []), chat.Tally())

        train = IterableDataset.from_generator(epoch).shuffle(seed=seed, buffer_size=1000)
        held_out = stream_eval(data, need, seed, counts)
        rows = _listed(tokenized(held_out, evaluated), seed)
        if isinstance(data.eval, float):
            # they are no part of any count, since the stream has yet to be read
            for reason, number in evaluated.dropped.items():
                job.say(f"{number} of {len(held_out)} held out: {reason}, first at {evaluated.first[reason]}")
    else:
        groups = read_groups(data, need, seed)
        held_out, counts = groups.eval, groups.counts
        train, rows = _listed(tokenized(groups.train, trained), seed), _listed(tokenized(held_out, evaluated), seed)
        if groups.leaked:
            job.say(f"{groups.leaked} prompts of data.eval are in data.train too: eval figures will flatter the model")
    for line in fold_in(counts, trained, data.max_dropped):
        job.say(line)
    for key, made, tally in (("train", train, trained), ("eval", rows, evaluated)):
        if tally.dropped and not len(made):
            reason, number = tally.dropped.most_common(1)[0]
            raise DataError(
                f"data.{key}: no row is left of it; most often: {reason} ({number}), first at {tally.first[reason]}; "
                "raise data.max_length or mend the rows"
            )
    return train, rows if held_out else None, counts


def _listed(rows: Iterable[dict[str, Any]], seed: int) -> Dataset:
    listed = list(rows)
    random.Random(seed).shuffle(listed)
    return Dataset.from_list(listed)


def run_to_end(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, job: Job, counts: list[Count]) -> Outcome:
    """Samples before, the loop, samples after, the save: everything from a built trainer to a finished run."""
    samples = Samples(job, tokenizer)
    samples.answer(trainer, "before")
    metrics, stopped_by = loop(trainer, job)
    if job.recipe.data.streaming:
        # other rows were counted, and their counts printed, before the first step
        for line in (line for count in counts for line in count.lines()):
            job.say(line)
    if stopped_by is None:
        samples.answer(trainer, "after")
        finish(trainer, tokenizer, job)
    return Outcome(metrics, counts, stopped_by)


def finish(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, job: Job, state_dict: dict[str, Any] | None = None
) -> None:
    """The last save. Checkpoints go, unless the recipe asked for them."""
    save(trainer, tokenizer, job, state_dict)
    if job.main and not {"save_steps", "save_strategy", "save_total_limit"} & set(job.recipe.trainer):
        # ours were for resuming only
        shutil.rmtree(job.run.checkpoints, ignore_errors=True)


def loop(trainer: Trainer, job: Job, last: TrainerCallback | None = None) -> tuple[dict[str, Any], int | None]:
    """Train from the last whole checkpoint, if there is one. Returns the final metrics and the signal that stopped it.

    Raises LaunchError if the checkpoint was written by another number of ranks under ZeRO.
    """
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    metrics = Metrics(job.run.metrics, lambda: trainer._total_train_tokens)
    stop = OrderlyStop()
    for callback in (
        metrics,
        ProgressLine(f"{job.recipe.name}/{job.run.path.name}", metrics, job.console),
        CheckpointMarks(COMPLETE),
        stop,
        *([last] if last else []),
    ):
        trainer.add_callback(callback)
    if job.main:
        job.run.drop_half_written()
    trainer.accelerator.wait_for_everyone()
    resume = job.run.latest_checkpoint()
    if resume is not None:
        _same_ranks(resume, job)
        step = json.loads((resume / "trainer_state.json").read_text())["global_step"]
        if job.main:
            trim_metrics(job.run.metrics, step)
        job.say(f"resuming from step {step} ({resume})")
    elif job.main:
        job.run.metrics.unlink(missing_ok=True)
    if job.main:
        job.run.checkpoints.mkdir(parents=True, exist_ok=True)
        (job.run.checkpoints / "ranks.json").write_text(json.dumps({"world_size": job.ranks}))
    result = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if stop.received is not None:
        return {}, stop.received
    final = {"train_loss": result.training_loss, "steps": trainer.state.global_step, "epochs": trainer.state.epoch}
    final |= {"seconds": round(result.metrics["train_runtime"], 1), "peak_memory_mib": _peak_memory()}
    final |= metrics.last
    if trainer.eval_dataset is not None:
        trainer.evaluate()
        final |= metrics.last
    return {key: value for key, value in final.items() if key not in ("step", "epoch") and _finite(value)}, None


def _peak_memory() -> int:
    """The most that this process has held so far, in MiB: of its GPU, or of main memory without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most >> (10 if platform.system() == "Linux" else 20)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))


def _same_ranks(checkpoint: Path, job: Job) -> None:
    record = checkpoint.parent / "ranks.json"
    made_by = json.loads(record.read_text())["world_size"] if record.is_file() else job.ranks
    if job.recipe.zero.stage and made_by != job.ranks:
        raise LaunchError(
            f"{checkpoint}: was written by {made_by} ranks, and ZeRO state cannot be cut for {job.ranks}; "
            f"resume with launch.num_gpus={made_by}, or start anew with force=true"
        )


def save(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, job: Job, state_dict: dict[str, Any] | None = None
) -> None:
    """Write the model, or the adapter, and the tokenizer into the run directory, and look at what was written.

    `state_dict`, the same on rank 0 under any ZeRO stage, is written where more than the model was trained.

    Raises RuntimeError if a tensor is missing or empty: some sharded saves are, in silence (DeepSpeed#3841, #7900).
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    generates = model.can_generate()
    if generates:
        set_ends(model, chat.generation_ends(tokenizer))
    if state_dict is None:
        trainer.save_model(str(job.run.path))
    elif job.main:
        model.save_pretrained(job.run.path, state_dict=state_dict)
    trainer.accelerator.wait_for_everyone()
    if not job.main:
        return
    for name in ("training_args.bin", "README.md"):
        (job.run.path / name).unlink(missing_ok=True)
    if isinstance(model, PeftModel):
        _name_base(job, model)
    tokenizer.save_pretrained(job.run.path)
    if generates:
        model.generation_config.save_pretrained(job.run.path)
    _look_at_weights(model, job.run.path)


def _name_base(job: Job, model: PeftModel) -> None:
    """The adapter's base, by the path it was read from and its weights' fingerprint."""
    file = job.run.path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = job.base
    write_atomically(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    entry = {"path": job.base, "fingerprint": kind.fingerprint(job.base)}
    write_atomically(job.run.path / "base.json", json.dumps(entry, indent=2) + "\n")


def _look_at_weights(model: Any, folder: Path) -> None:
    found: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        try:
            found |= {name: entry["shape"] for name, entry in kind.header(file).items() if name != "__metadata__"}
        except ValueError as error:
            raise RuntimeError(f"{file} was not written whole: {error}") from error
    if isinstance(model, PeftModel):
        if not found or any(0 in shape for shape in found.values()):
            raise RuntimeError(f"{folder}: the saved adapter is empty")
        return
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    for name, parameter in model.named_parameters():
        # under ZeRO-3 this rank holds a part; ds_shape is the whole
        shape = list(getattr(parameter, "ds_shape", parameter.shape))
        if name not in tied and found.get(name) != shape:
            raise RuntimeError(f"{folder}: {name} was saved as {found.get(name)}, the model holds {shape}")
