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
from align_cli.run.directory import RECORD, write_atomically
from align_cli.training import finite
from align_cli.training.job import Job

SAVING = {"save_steps", "save_strategy", "save_total_limit"}
"""Trainer fields with which a recipe says when to write checkpoints, and that they are kept."""


def finish(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, job: Job, state_dict: dict[str, Any] | None = None
) -> None:
    """Save the final model. Deletes the checkpoints unless the recipe configures them."""
    save(trainer, tokenizer, job, state_dict)
    if job.main and not SAVING & set(job.recipe.trainer):
        # our default checkpoints serve only to resume
        shutil.rmtree(job.run.checkpoints, ignore_errors=True)


def record(job: Job) -> None:
    """Write how many ranks, with how many rows a step, in which precision, train from here on."""
    made_by = {"world_size": job.ranks, "precision": job.precision.as_manifest(), "earlier": job.earlier}
    made_by["batch"] = job.per_device * job.accumulation * job.ranks
    write_atomically(job.run.checkpoints / RECORD, json.dumps(made_by) + "\n")


def check_resumable(checkpoint: Path, step: int, job: Job) -> None:
    """Compare the ranks and the precision with those that wrote the checkpoint of `step`, and say what differs.

    Raises LaunchError if the checkpoint has no optimizer state, or was written with another number
    of rows a step, or holds ZeRO state that a different number of ranks, or another precision, wrote.
    """
    zero_state = any(checkpoint.glob("global_step*"))
    if not zero_state and not (checkpoint / "optimizer.pt").is_file():
        raise LaunchError(
            f"{checkpoint}: holds only weights (trainer.save_only_model), so that the optimizer and the schedule would "
            "start anew; start over with force=true, or take it as model.path of another run"
        )
    file = checkpoint.parent / RECORD
    wrote = json.loads(file.read_text()) if file.is_file() else {}
    job.earlier += wrote.get("earlier", [])
    rows = job.per_device * job.accumulation * job.ranks
    if wrote.get("batch", rows) != rows:
        raise LaunchError(
            f"{checkpoint}: was written with {wrote['batch']} rows a step, but this run has {rows}; resume with "
            f"{wrote['world_size']} ranks, set data.batch_size, or start anew with force=true"
        )
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

    Raises TrainingError if a trained weight is not finite, and RuntimeError if a tensor is missing or empty: some
    sharded saves fail silently (DeepSpeed#3841, #7900).
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if broken := finite.broken_weight(model):
        raise finite.error(job.run, trainer, f"{broken} is not finite")
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
    kind.name_base(job.run.path, job.base, job.base_fingerprint)


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
