"""The recipe's `zero:` section as a DeepSpeed config, and what DeepSpeed builds for itself. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align_cli.recipe.sections import Zero


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

    torch guards the build with a lock file that says nothing of its owner: one that a killed process left makes every
    later run wait for ever. Ours is let go by the kernel, so whoever holds it knows that torch's is a leftover.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if get_accelerator()._name != "cpu" or builder is None or not __compatible_ops__.get(builder.NAME, False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with (folder / ".align-lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
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


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Within, models that are loaded are whole on every rank. For those that only score: `generate` waits for the other
    ranks as long as stage 3 is announced."""
    from transformers.integrations import deepspeed

    sharding = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = sharding


def load_whole_from_now_on() -> None:
    """Let models that are loaded from here on be whole on every rank, and generate alone: training arguments with stage
    3 make transformers shard each one while it loads."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
