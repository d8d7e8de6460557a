"""Training arguments of every stage: our defaults, the recipe's `trainer:`, and values derived from other keys."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments, set_seed

from align_cli.compat import libraries
from align_cli.model import zero
from align_cli.model.zero import deepspeed_config
from align_cli.training.job import Job

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def arguments(cls: type[Arguments], job: Job, **own: Any) -> Arguments:
    """Build the stage's training arguments.

    The recipe's `trainer:` overrides our defaults; `own` and values derived from other recipe keys override both. Must
    be called before any model is loaded, or ZeRO-3 does not shard while loading.
    """
    recipe, cuda = job.recipe, torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "gradient_checkpointing": cuda,
        "logging_steps": 1 if not cuda else 10,
        "logging_first_step": True,
        # prints a loss that is NaN as 0
        "logging_nan_inf_filter": False,
        "run_name": f"{recipe.name}-{job.run.path.name}",
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
        "bf16": job.precision.products == "bfloat16",
        "fp16": job.precision.products == "float16",
        "deepspeed": deepspeed_config(recipe.zero),
        "remove_unused_columns": True,
        "disable_tqdm": True,
        "log_level": "error",
        **own,
    }
    # by default, TensorBoard's logs would be among the checkpoints, which are deleted at the end
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(job.run.logs))
    given = dict(recipe.trainer)
    if given.get("save_total_limit") == 1:
        # the older checkpoint is deleted before the newer one is marked complete; a kill in between would leave none
        given["save_total_limit"] = 2
    if recipe.lora and recipe.zero.stage == 3:
        # frozen weights under ZeRO-3 need it, as in TRL's trainers (trl#2514, deepspeedai/DeepSpeed#8130)
        checkpointing = given.get("gradient_checkpointing_kwargs") or {}
        if checkpointing.get("use_reentrant") is False:
            job.say("gradient checkpointing is reentrant: LoRA under ZeRO-3 needs it")
        fixed["gradient_checkpointing_kwargs"] = {**checkpointing, "use_reentrant": True}
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints the operators it builds
        args = cls(**{**defaults, **given, **fixed})
        if args.deepspeed:
            import deepspeed

            libraries.deepspeed_without_nvml()
            zero.build_operators()
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
            zero.unlink_buffers()
    # adapters initialised before the trainer exists must be identical on every rank and in every run
    set_seed(recipe.seed)
    return args
