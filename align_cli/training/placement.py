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


def policy(job: Job, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The job's initial policy. Raises UpstreamError."""
    return _loaded(job, tokenizer, job.base)


def _loaded(job: Job, tokenizer: PreTrainedTokenizerBase, path: str) -> PreTrainedModel:
    recipe = job.recipe
    return load.policy(recipe.model, tokenizer, dtype=job.dtype, path=path, adapter=recipe.lora is not None)


def separate_reference(job: Job, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """The frozen reference, loaded with the policy's settings; None if the policy with its adapter disabled serves.

    Trainers must be given it: TRL would load one by the policy's `_name_or_path`, without revision and new tokens.
    """
    path = job.reference or (None if job.recipe.lora else job.base)
    return frozen(_loaded(job, tokenizer, path)) if path else None


def scoring_reference(
    job: Job, tokenizer: PreTrainedTokenizerBase, trainer: Trainer, temperature: float
) -> Module | None:
    """As `separate_reference`, placed as the trainer's model and prepared to compute log-probabilities of sampled
    tokens."""
    model = separate_reference(job, tokenizer)
    if model is None:
        return None
    add_fused_lm_head(model, temperature=temperature)
    return placing(trainer)(model)


def release(*engines: Module | None) -> None:
    """Free the memory of models and DeepSpeed engines. The caller must hold no other references to them."""
    for engine in engines:
        if hasattr(engine, "destroy"):
            engine.destroy()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
