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
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from align_cli import distributed
from align_cli.compat.libraries import attention
from align_cli.errors import UpstreamError
from align_cli.model import kind, zero
from align_cli.model.load import pretrained, widen
from align_cli.recipe.sections import Model

HEAD = "score"
"""Attribute name of the head in transformers' sequence classifiers."""


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
    if not isinstance(getattr(loaded, HEAD, None), torch.nn.Linear):
        raise UpstreamError(
            f"model.path: {path}: {type(loaded).__name__} has no linear head named {HEAD}; use a decoder that has one"
        )
    widen(loaded, tok, adapter=adapter)
    # without it a classifier scores padding as the last token (trl#937)
    loaded.config.pad_token_id = loaded.config.get_text_config().pad_token_id = tok.pad_token_id
    loaded.config.use_cache = False
    return scoring(loaded)


def load_run(path: str, tok: PreTrainedTokenizerBase, dtype: str = "float32") -> Any:
    """A finished reward model in eval mode, either full or an adapter on its base. Raises UpstreamError."""
    contents = kind.look(path)
    if contents.kind != "adapter":
        model = load(Model(path=path), tok, dtype=dtype, path=path)
    else:
        if contents.base is None or kind.look(contents.base).kind not in ("causal-lm", "hub"):
            raise UpstreamError(f"{path}: its base {contents.base} does not exist; put it back, or name a merged model")
        shapes = [entry["shape"] for name, entry in _saved(path).items() if name.endswith(f"{HEAD}.weight")]
        if not shapes:
            raise UpstreamError(f"{path}: its adapter holds no head; it was not trained by `align rm`")
        base = load(Model(path=contents.base), tok, dtype=dtype, path=contents.base, heads=shapes[0][0], adapter=True)
        model = PeftModel.from_pretrained(base, path)
    return model.to(distributed.device()).eval()


def _saved(path: str) -> dict[str, Any]:
    return {name: entry for file in Path(path).glob("*.safetensors") for name, entry in kind.header(file).items()}


def scoring(model: PreTrainedModel) -> PreTrainedModel:
    """Patch the model's forward and return the model. With `ends` (n, e), forward returns (n, e, h) float32 scores at
    those tokens.

    The head runs outside of autocast: bfloat16 would round differences between rewards to about 1 %. With
    `hidden=True` the (n, e, d) hidden states are returned instead. Without `ends` it is transformers' own forward.
    """
    plain = model.forward

    def forward(self: Any, input_ids: Tensor | None = None, ends: Tensor | None = None, hidden: bool = False, **inputs):
        if ends is None:
            return plain(input_ids=input_ids, **inputs)
        given = {key: inputs[key] for key in ("attention_mask", "position_ids") if inputs.get(key) is not None}
        trunk = getattr(self, self.base_model_prefix)
        states = trunk(input_ids=input_ids, use_cache=False, **masked(self, given)).last_hidden_state
        picked = states.gather(1, ends.unsqueeze(2).expand(-1, -1, states.shape[2]))
        if hidden:
            return picked.float()
        head = getattr(self, HEAD)
        with torch.autocast(picked.device.type, enabled=False):
            return head(picked.to(head.weight.dtype)).float()

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
