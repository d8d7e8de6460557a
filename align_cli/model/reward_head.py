"""Turns a causal language model into a reward model: one scalar per response, computed at its last token.

The head is a linear map from the last hidden state, initialised with std 1/√(d+1) (summarize_from_feedback).
The saved model is a plain `AutoModelForSequenceClassification`; several heads on one trunk are its labels.

Shapes: n rows, t tokens of a row, e responses that end in a row, h heads, d hidden size.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from align_cli import distributed
from align_cli.compat.libraries import attention
from align_cli.errors import UpstreamError
from align_cli.model import kind, zero
from align_cli.model.load import pretrained, widen
from align_cli.recipe.sections import Model

HEAD = "score"
"""Attribute name of the head in transformers' sequence classifiers."""


class Head(nn.Linear):
    """A linear map whose product is float32, whatever the weight's dtype: bfloat16 would round differences between
    rewards to about 1 %."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, h) float32 scores of (…, d) hidden states."""
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(hidden.float(), self.weight.float(), bias)

    def frozen(self, weight: Tensor | None = None) -> Head:
        """This head with its weight, or the given one, as a float32 buffer, which DeepSpeed neither casts to bfloat16
        nor shards, nor an optimizer finds."""
        with zero.gathered([self.weight]):
            kept = (self.weight if weight is None else weight).detach().float().clone()
        del self.weight
        self.register_buffer("weight", kept)
        return self


def from_policy(
    model: Model, tok: PreTrainedTokenizerBase, *, dtype: str, seeds: list[int], path: str, adapter: bool = False
) -> PreTrainedModel:
    """The model of `path` with one new scalar head per seed; `adapter` as in `widen`. Raises UpstreamError."""
    loaded = load(model, tok, dtype=dtype, path=path, heads=len(seeds), adapter=adapter)
    head = getattr(loaded, HEAD)
    with zero.gathered([head.weight], writing=True):
        d = head.weight.shape[1]
        for row, seed in enumerate(seeds):
            drawn = torch.randn(d, generator=torch.Generator().manual_seed(seed)) / (d + 1) ** 0.5
            head.weight.data[row].copy_(drawn)
    return loaded


def load(
    model: Model,
    tok: PreTrainedTokenizerBase,
    *,
    dtype: str,
    path: str,
    heads: int | None = None,
    adapter: bool = False,
) -> PreTrainedModel:
    """The sequence classifier of `path`, patched by `scoring`; `adapter` as in `widen`. Raises UpstreamError.

    With `heads` None, the saved number of heads is kept.
    """
    labels = {} if heads is None else {"num_labels": heads}
    loaded = pretrained(AutoModelForSequenceClassification, model, path, dtype, **labels)
    if not isinstance(getattr(loaded, HEAD, None), nn.Linear):
        raise UpstreamError(
            f"model.path: {path}: {type(loaded).__name__} has no linear head named {HEAD}; use a decoder that has one"
        )
    getattr(loaded, HEAD).__class__ = Head
    widen(loaded, tok, adapter=adapter)
    # without it a classifier scores padding as the last token (trl#937)
    loaded.config.pad_token_id = loaded.config.get_text_config().pad_token_id = tok.pad_token_id
    loaded.config.use_cache = False
    return scoring(loaded)


def load_run(path: str, tok: PreTrainedTokenizerBase, dtype: str = "float32", *, trainable: bool = False) -> Any:
    """A finished reward model in eval mode, either full or an adapter on its base. Raises UpstreamError.

    Unless trainable, its head stays as it was saved, in float32, whatever the dtype of the other weights.
    """
    contents = kind.look(path)
    if contents.kind == "other":
        raise UpstreamError(f"{path}: {contents.problem}")
    if contents.kind != "adapter":
        model = load(Model(path=path), tok, dtype=dtype, path=path)
    else:
        if contents.base is None or kind.look(contents.base).kind not in ("causal-lm", "hub"):
            raise UpstreamError(f"{path}: its base {contents.base} does not exist; put it back, or name a merged model")
        if (heads := kind.heads(path)) is None:
            raise UpstreamError(f"{path}: its adapter holds no head; it was not trained by `align rm`")
        base = load(Model(path=contents.base), tok, dtype=dtype, path=contents.base, heads=heads, adapter=True)
        model = PeftModel.from_pretrained(base, path)
    if not trainable:
        saved = _saved_head(path)
        for head in [module for module in model.modules() if isinstance(module, Head)]:
            head.frozen(saved)
    return model.to(distributed.device()).eval()


def _saved_head(path: str) -> Tensor | None:
    """The head's weight as it stands in the directory's files; None for a hub id."""
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name.endswith(f"{HEAD}.weight"):
                    return tensors.get_tensor(name)
    return None


def scoring(model: PreTrainedModel) -> PreTrainedModel:
    """Patch the model's forward and return the model. With `ends` (n, e), forward returns (n, e, h) float32 scores at
    those tokens.

    With `hidden=True` the (n, e, d) hidden states are returned instead. Without `ends` it is transformers' own forward.
    """
    plain = model.forward

    def forward(self: Any, input_ids: Tensor | None = None, ends: Tensor | None = None, hidden: bool = False, **inputs):
        if ends is None:
            return plain(input_ids=input_ids, **inputs)
        given = {key: inputs[key] for key in ("attention_mask", "position_ids") if inputs.get(key) is not None}
        trunk = getattr(self, self.base_model_prefix)
        states = trunk(input_ids=input_ids, use_cache=False, **masked(self, given)).last_hidden_state
        picked = states.gather(1, ends.unsqueeze(2).expand(-1, -1, states.shape[2]))
        return picked.float() if hidden else getattr(self, HEAD)(picked)

    model.forward = types.MethodType(forward, model)
    return model


def masked(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, with a boolean 4-D mask converted to an additive one unless the attention is sdpa."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 4 or attention(model.config) == "sdpa":
        return inputs
    dtype = torch.get_autocast_dtype(mask.device.type) if torch.is_autocast_enabled(mask.device.type) else model.dtype
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return inputs | {"attention_mask": added}


def takes_4d_masks(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the attention implementation accepts 4-D masks. Whether it applies them correctly needs a trial run."""
    return attention(model.config) in ("sdpa", "eager")
