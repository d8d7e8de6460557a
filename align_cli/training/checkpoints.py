"""Checkpoints that a run resumes from, and the last save: the model, whole, in the run directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from align_cli.compat import libraries
from align_cli.data import chat
from align_cli.errors import LaunchError
from align_cli.model import kind
from align_cli.model.load import set_ends
from align_cli.run.directory import write_atomically
from align_cli.training.job import Job


def finish(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, job: Job, state_dict: dict[str, Any] | None = None
) -> None:
    """The last save. Checkpoints go, unless the recipe asked for them."""
    save(trainer, tokenizer, job, state_dict)
    if job.main and not {"save_steps", "save_strategy", "save_total_limit"} & set(job.recipe.trainer):
        # ours were for resuming only
        shutil.rmtree(job.run.checkpoints, ignore_errors=True)


def check_ranks(checkpoint: Path, job: Job) -> None:
    """Raise LaunchError if ZeRO state was written by another number of ranks."""
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
        _name_base(job)
    tokenizer.save_pretrained(job.run.path)
    if generates:
        model.generation_config.save_pretrained(job.run.path)
    _look_at_weights(model, job.run.path)


def _name_base(job: Job) -> None:
    """The adapter's base, by the path it was read from and its weights' fingerprint."""
    file = job.run.path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = job.base
    write_atomically(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    entry = {"path": job.base, "fingerprint": kind.fingerprint(job.base)}
    write_atomically(job.run.path / "base.json", json.dumps(entry, indent=2) + "\n")


def _look_at_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    saved: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        try:
            saved |= {name: entry["shape"] for name, entry in kind.header(file).items() if name != "__metadata__"}
        except ValueError as error:
            raise RuntimeError(f"{file} was not written whole: {error}") from error
    if isinstance(model, PeftModel):
        if not saved or any(0 in shape for shape in saved.values()):
            raise RuntimeError(f"{folder}: the saved adapter is empty")
        return
    tied = libraries.tied_weights(model)
    for name, parameter in model.named_parameters():
        # under ZeRO-3 this rank holds a part; ds_shape is the whole
        shape = list(getattr(parameter, "ds_shape", parameter.shape))
        if name not in tied and saved.get(name) != shape:
            raise RuntimeError(f"{folder}: {name} was saved as {saved.get(name)}, the model holds {shape}")
