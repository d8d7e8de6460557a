"""The recipe's `zero:` section as a DeepSpeed config, and helpers around DeepSpeed. Imports no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_cli import locks
from align_cli.compat import libraries
from align_cli.recipe.sections import Zero

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel


def deepspeed_config(zero: Zero) -> dict[str, Any] | None:
    """The DeepSpeed config for the trainer; None for stage 0 without further config.

    `auto` values are filled in from the training arguments. train_batch_size is omitted: under stage 3 a second, frozen
    model would inherit it, and DeepSpeed would reject the value as inconsistent.
    """
    if zero.stage == 0 and not zero.config:
        return None
    optimization: dict[str, Any] = {"stage": zero.stage}
    if zero.offload_optimizer:
        optimization["offload_optimizer"] = {"device": "cpu"}
    if zero.offload_param:
        optimization["offload_param"] = {"device": "cpu"}
    if zero.stage == 3:
        # without it, models saved under stage 3 contain empty tensors
        optimization["stage3_gather_16bit_weights_on_model_save"] = True
    config: dict[str, Any] = {
        "zero_optimization": optimization,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        # use transformers' AdamW, as a single process does; DeepSpeed's own CPU Adam would need a compiler
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }
    return _merged(config, zero.config)


def build_operators() -> None:
    """Build or load DeepSpeed's communication operator for CPU ranks, one process at a time.

    torch guards the build with a lock file that does not name its owner. If a killed process leaves one behind, every
    later run waits forever. Ours ends with its process, so a torch lock file that remains is stale.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if libraries.deepspeed_accelerator() != "cpu" or builder is None or not __compatible_ops__.get(builder.NAME, False):
        return
    folder = libraries.extension_folder(builder.name)
    with locks.waiting(folder / ".align-lock"):
        (folder / "lock").unlink(missing_ok=True)
        # later loads in this process reuse it
        builder.load(verbose=False)


def unlink_buffers() -> None:
    """Unlink DeepSpeed's shared memory buffers once every rank has opened them.

    DeepSpeed never removes them (66 MB per rank and run in /dev/shm). Once unlinked, the kernel frees them when the
    last rank exits, even if it is killed. Must be called on all ranks.
    """
    from align_cli import distributed

    distributed.barrier()
    mine = f"deepspeed_allreduce_buffer_*_{os.environ.get('MASTER_ADDR')}_{os.environ.get('MASTER_PORT')}_*"
    for file in Path("/dev/shm").glob(mine):
        file.unlink(missing_ok=True)


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    result = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def sharding() -> bool:
    """Whether models are sharded while they are loaded, that is, whether training arguments with stage 3 exist."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def local(parameter: Parameter) -> Tensor:
    """This rank's part of a parameter: its shard under ZeRO-3, else all of it."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def gathered(parameters: Iterable[Parameter], *, writing: bool = False) -> contextlib.AbstractContextManager[None]:
    """A context in which every rank has the full parameters, which are sharded under ZeRO-3. With `writing`, rank 0's
    changes are broadcast to all ranks."""
    if not sharding():
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if writing else None)


def on_device(model: PreTrainedModel, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context in which every rank has the full model on its device and can generate. Outside of it, the model is
    sharded under ZeRO-3, and under ZeRO-1 and 2 trainers keep it on the host until training starts."""
    if not sharding():
        model.to(device)
    return gathered(model.parameters())


def loading_whole() -> contextlib.AbstractContextManager[None]:
    """A context in which models are loaded unsharded on every rank. Use it for models that only score: `generate`
    waits for the other ranks as long as stage 3 is configured."""
    return libraries.no_zero3_loading()


def load_whole_from_now_on() -> None:
    """Load models unsharded from here on, so that each rank generates on its own. Training arguments with stage 3 make
    transformers shard every model while loading."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
