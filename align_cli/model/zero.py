"""The recipe's `zero:` section as a DeepSpeed config. Imports no torch."""

from __future__ import annotations

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


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    result = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result
