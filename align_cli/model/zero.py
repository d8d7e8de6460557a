"""The recipe's `zero:` section as a DeepSpeed config, and what DeepSpeed builds for itself. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_cli.compat import libraries
from align_cli.recipe.sections import Zero

if TYPE_CHECKING:
    import torch
    from torch.nn import Parameter
    from transformers import PreTrainedModel


def deepspeed_config(zero: Zero) -> dict[str, Any] | None:
    """The config to hand to the trainer, or None where nothing is sharded and no key is given.

    `auto` values are filled in from the training arguments. train_batch_size is left out: under stage 3 a second,
    frozen model would inherit it and refuse its own arithmetic.
    """
    if zero.stage == 0 and not zero.config:
        return None
    optimization: dict[str, Any] = {"stage": zero.stage}
    if zero.offload_optimizer:
        optimization["offload_optimizer"] = {"device": "cpu"}
    if zero.offload_param:
        optimization["offload_param"] = {"device": "cpu"}
    if zero.stage == 3:
        # without it a save under stage 3 holds empty tensors
        optimization["stage3_gather_16bit_weights_on_model_save"] = True
    config: dict[str, Any] = {
        "zero_optimization": optimization,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        # transformers' AdamW is what one process uses too; DeepSpeed's own CPU Adam would need a compiler
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }
    return _merged(config, zero.config)


def build_operators() -> None:
    """Build, or load, DeepSpeed's operator for ranks on CPUs, one process at a time.

    torch guards the build with a lock file that does not name its owner: one that a killed process left makes every
    later run wait for ever. The kernel releases our flock on exit, so a remaining torch lock file is stale.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if libraries.deepspeed_accelerator() != "cpu" or builder is None or not __compatible_ops__.get(builder.NAME, False):
        return
    folder = libraries.extension_folder(builder.name)
    with (folder / ".align-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        # later loads in this process find it loaded
        builder.load(verbose=False)


def unlink_buffers() -> None:
    """Take the names of DeepSpeed's shared buffers away once every rank has them open.

    DeepSpeed never removes them, 66 MB a rank and run in /dev/shm; without a name the kernel frees them with the last
    rank, however that ends. To be called on all ranks.
    """
    import torch

    torch.distributed.barrier()
    mine = f"deepspeed_allreduce_buffer_*_{os.environ.get('MASTER_ADDR')}_{os.environ.get('MASTER_PORT')}_*"
    for file in Path("/dev/shm").glob(mine):
        file.unlink(missing_ok=True)


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    result = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def gathered(parameters: Iterable[Parameter], *, writing: bool = False) -> contextlib.AbstractContextManager[None]:
    """Within, every rank has the whole parameters, of which it holds a part under ZeRO-3. With `writing`, what rank 0
    changed goes to all ranks."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if writing else None)


def on_device(model: PreTrainedModel, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within, every rank has the whole model on its device and can generate: under ZeRO-3 it holds a part, and under
    ZeRO-1 and 2 trainers leave the model on the host until they train."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        model.to(device)
    return gathered(model.parameters())


def loading_whole() -> contextlib.AbstractContextManager[None]:
    """Within, models that are loaded are whole on every rank. For those that only score: `generate` waits for the other
    ranks as long as stage 3 is announced."""
    return libraries.no_zero3_loading()


def load_whole_from_now_on() -> None:
    """Let models that are loaded from here on be whole on every rank, and generate alone: training arguments with stage
    3 make transformers shard each one while it loads."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
