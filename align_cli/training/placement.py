"""Placement of frozen models on devices in the same way as the trainer places the trained model."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

from align_cli.model import load
from align_cli.training.job import Job

Place = Callable[[Module], Module]
"""Places a frozen model on this rank's device, or shards it under ZeRO-3."""


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode, with gradients disabled."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def placing(trainer: Trainer) -> Place:
    """A function that places a frozen model as the trainer places its own model: sharded under ZeRO-3."""

    def placed(model: Module) -> Module:
        if trainer.is_deepspeed_enabled:
            return prepare_deepspeed(model, trainer.accelerator)
        return trainer.accelerator.prepare_model(model, evaluation_mode=True)

    return placed


def reference(job: Job, tokenizer: PreTrainedTokenizerBase, trainer: Trainer, temperature: float) -> Module:
    """The frozen reference, prepared to compute log-probabilities of sampled tokens."""
    model = load.policy(job.recipe.model, tokenizer, dtype=job.dtype, path=job.reference or job.base)
    add_fused_lm_head(model, temperature=temperature)
    return placing(trainer)(frozen(model))


def release(*engines: Module | None) -> None:
    """Free the memory of models and DeepSpeed engines. The caller must hold no other references to them."""
    for engine in engines:
        if hasattr(engine, "destroy"):
            engine.destroy()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
