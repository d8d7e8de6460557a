"""A causal language model that gives the log-probabilities of chosen tokens, and computes no others.

Its head runs over the hidden states of those tokens alone, in tiles that keep no logits (TRL's fused head).

Shapes: n rows, t tokens of a row, m tokens asked for.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from align_cli.model.reward import masked


def scoring(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose forward with `asked` (n, t) gives the (m,) float32 log-probabilities of the tokens after
    those positions, row by row. Without `asked` it is transformers' own forward."""
    add_fused_lm_head(model)
    fused = model.forward

    # the original signature: `generate` checks what it is given against it
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, asked: Tensor | None = None, **inputs: Any) -> Any:
        if asked is None:
            return fused(*args, **inputs)
        given = {key: inputs[key] for key in ("attention_mask", "position_ids") if inputs.get(key) is not None}
        ids = inputs["input_ids"]
        targets = ids.roll(-1, 1)[asked].unsqueeze(0)

        def pick(trunk: Any, args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[asked].unsqueeze(0)
            return output

        hook = self.base_model.register_forward_hook(pick)
        try:
            found = fused(input_ids=ids, **masked(self, given), shift_labels=targets, fused_lm_head=True)
        finally:
            hook.remove()
        return found.log_probs[0].float()

    model.forward = types.MethodType(forward, model)
    return model
