"""All uses of private names of transformers, accelerate, torch and DeepSpeed (tests/compat/test_private_names.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate.state import GradientState
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, Trainer


def load_best_model(trainer: Trainer) -> None:
    """Load the weights of the trainer's best checkpoint into its model."""
    trainer._load_best_model()


def attention(config: PretrainedConfig) -> str:
    """The attention implementation in use: sdpa, eager, …"""
    return getattr(config, "_attn_implementation", None) or ""


def tied_weights(model: PreTrainedModel) -> set[str]:
    """Names of weights that are tied to another weight and therefore not saved."""
    return set(getattr(model, "_tied_weights_keys", None) or {})


def made_from_config(config: GenerationConfig) -> bool:
    """Whether the config holds the architecture's defaults, since the model has no generation_config.json."""
    return bool(getattr(config, "_from_model_config", False))


@contextlib.contextmanager
def no_zero3_loading() -> Iterator[None]:
    """A context in which transformers ignores ZeRO-3 and loads models unsharded on every rank."""
    from transformers.integrations import deepspeed

    sharding = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = sharding


def exchange_gradients(state: GradientState, now: bool) -> None:
    """Set whether the next backward pass ends an optimizer step, after which gradients are exchanged."""
    state._set_sync_gradients(now)


def extension_folder(name: str) -> Path:
    """The directory in which torch builds the C++ extension of this name."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, verbose=False))


def deepspeed_accelerator() -> str:
    """The accelerator that DeepSpeed uses: cpu, cuda, …"""
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()._name


def deepspeed_without_nvml() -> None:
    """Let DeepSpeed ask torch for free memory, not NVML, for which it reads CUDA_VISIBLE_DEVICES as integers: a list
    of GPU or MIG ids would end ZeRO-2 with a ValueError. To be called after `import deepspeed`."""
    from deepspeed.accelerator import cuda_accelerator

    cuda_accelerator.pynvml = None
