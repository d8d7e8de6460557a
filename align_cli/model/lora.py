"""LoRA adapters: the PEFT config of a recipe, and merging an adapter into its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from align_cli.errors import UpstreamError
from align_cli.model import kind, load, templates, zero
from align_cli.recipe.sections import Lora


def peft_config(lora: Lora | None, new_tokens: Sequence[str] = (), task: str = "CAUSAL_LM") -> LoraConfig | None:
    """The recipe's `lora:` section as a PEFT config, or None. Reward models need the task SEQ_CLS, which also trains
    and saves the head; under other tasks it would keep its random initialisation. Raises UpstreamError if the chat
    template added tokens to the vocabulary: their rows of embedding and head would keep their random initialisation."""
    if lora is None:
        return None
    if new_tokens:
        raise UpstreamError(templates.frozen(list(new_tokens)))
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type=TaskType[task],
    )


def adapted(base: PreTrainedModel, config: LoraConfig, *, checkpointing: bool) -> PeftModel:
    """The model with a new adapter, whose weights, and a head's, are in `trained_dtype`.

    With checkpointing, the inputs require gradients, or checkpointed blocks would get none.
    """
    dtype = trained_dtype(base)
    model = get_peft_model(base, config, autocast_adapter_dtype=dtype == torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if checkpointing:
        model.enable_input_require_grads()
    return model


def trained_dtype(base: PreTrainedModel) -> torch.dtype:
    """The dtype of what is trained on frozen weights: float32, since bfloat16 would round small updates away.

    Under ZeRO-3 it is that of the frozen weights, as in TRL's trainers: DeepSpeed's optimizer holds float32 copies, and
    it gathers small parameters into one buffer of one dtype (deepspeedai/DeepSpeed#8072).
    """
    return base.dtype if zero.sharding() else torch.float32


def merge(adapter: str, destination: Path, *, trust_remote_code: bool = False) -> None:
    """Merge an adapter into its base and write the result to `destination`, atomically.

    The merge is done in float32, since adding the small update to bfloat16 weights would round it away. Raises
    UpstreamError if `adapter` is not an adapter, or its base does not exist or has changed.
    """
    contents = kind.look(adapter)
    if contents.kind == "other" and contents.base:
        raise UpstreamError(f"{adapter}: {contents.problem}")
    if contents.kind != "adapter" or contents.base is None:
        raise UpstreamError(f"{adapter}: is not an adapter; a full model needs no merging")
    if kind.look(contents.base).kind not in ("causal-lm", "reward-model", "hub"):
        raise UpstreamError(f"{adapter}: its base {contents.base} does not exist; put it back, then merge")
    loader: Any = AutoModelForSequenceClassification if contents.reward else AutoModelForCausalLM
    extra = {"num_labels": kind.heads(adapter)} if contents.reward else {}
    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code)
    with zero.loading_whole():
        base = loader.from_pretrained(
            contents.base, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True, **extra
        )
    load.widen(base, tokenizer, adapter=True)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    part = destination.with_name(f"{destination.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    merged.save_pretrained(part)
    tokenizer.save_pretrained(part)
    (part / "merged_from.json").write_text(json.dumps({"adapter": adapter, "base": contents.base}, indent=2) + "\n")
    if destination.exists():
        shutil.rmtree(destination)
    part.rename(destination)


def trainable_whole(model: PeftModel) -> PreTrainedModel:
    """The base with the adapter merged into its own weights, all of them trainable. Under ZeRO-3 the weights of one
    layer at a time are gathered."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            with zero.gathered(layer.get_base_layer().parameters(), writing=True):
                layer.merge()
    return model.unload().requires_grad_(True)
