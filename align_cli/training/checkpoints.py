"""Checkpoints that a run resumes from, and the final save of the whole model into the run directory."""

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

SAVING = {"save_steps", "save_strategy", "save_total_limit"}
"""Trainer fields with which a recipe says when to write checkpoints, and that they are kept."""
RECORD = "ranks.json"
"""File beside the checkpoints: who wrote them."""


def finish(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, job: Job, state_dict: dict[str, Any] | None = None
) -> None:
    """Save the final model. Deletes the checkpoints unless the recipe configures them."""
    save(trainer, tokenizer, job, state_dict)
    if job.main and not SAVING & set(job.recipe.trainer):
        # our default checkpoints serve only to resume
        shutil.rmtree(job.run.checkpoints, ignore_errors=True)


def record(job: Job) -> None:
    """Write how many ranks, in which precision, train from here on."""
    made_by = {"world_size": job.ranks, "precision": job.precision.as_manifest(), "earlier": job.earlier}
    write_atomically(job.run.checkpoints / RECORD, json.dumps(made_by) + "\n")


def check_resumable(checkpoint: Path, step: int, job: Job) -> None:
    """Compare the ranks and the precision with those that wrote the checkpoint of `step`, and say what differs.

    Raises LaunchError if the checkpoint holds ZeRO state that a different number of ranks, or another precision, wrote.
    """
    file = checkpoint.parent / RECORD
    wrote = json.loads(file.read_text()) if file.is_file() else {}
    job.earlier += wrote.get("earlier", [])
    made_by, before, now = wrote.get("world_size", job.ranks), wrote.get("precision"), job.precision.as_manifest()
    if before and any(before[key] != now[key] for key in ("weights", "products")):
        types = f"{before['weights']} weights and {before['products']} products ({before['machine']})"
        if job.recipe.zero.stage:
            raise LaunchError(
                f"{checkpoint}: was written with {types}, and ZeRO state keeps its types, but this run would have "
                f"{job.precision} ({now['machine']}); resume on such a machine, or start anew with force=true"
            )
        job.earlier.append(before | {"until_step": step})
        job.say(f"warning: until step {step} this run had {types}; from here on {job.precision} ({now['machine']})")
    if job.recipe.zero.stage and made_by != job.ranks:
        raise LaunchError(
            f"{checkpoint}: was written by {made_by} ranks, and ZeRO state cannot be resharded for {job.ranks}; "
            f"resume with launch.num_gpus={made_by}, or start anew with force=true"
        )


def save(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, job: Job, state_dict: dict[str, Any] | None = None
) -> None:
    """Write the model (or adapter) and the tokenizer into the run directory, and verify the written weights.

    `state_dict` is written in place of the trainer's weights, for trainers that hold more than the model (a value
    function). Rank 0 has it whole under any ZeRO stage.

    Raises RuntimeError if a tensor is missing or empty: some sharded saves fail silently (DeepSpeed#3841, #7900).
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
    """Record the adapter's base: the path it was read from, and the fingerprint that its weights had then."""
    file = job.run.path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = job.base
    write_atomically(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    entry = {"path": job.base, "fingerprint": job.base_fingerprint}
    write_atomically(job.run.path / "base.json", json.dumps(entry, indent=2) + "\n")


def _look_at_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    saved: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        try:
            saved |= {name: entry["shape"] for name, entry in kind.header(file).items() if name != "__metadata__"}
        except ValueError as error:
            raise RuntimeError(f"{file} is incomplete: {error}") from error
    if isinstance(model, PeftModel):
        if not saved or any(0 in shape for shape in saved.values()):
            raise RuntimeError(f"{folder}: the saved adapter is empty")
        return
    tied = libraries.tied_weights(model)
    for name, parameter in model.named_parameters():
        # under ZeRO-3 this rank holds a shard; ds_shape is the full shape
        shape = list(getattr(parameter, "ds_shape", parameter.shape))
        if name not in tied and saved.get(name) != shape:
            raise RuntimeError(f"{folder}: {name} was saved as {saved.get(name)}, the model holds {shape}")
