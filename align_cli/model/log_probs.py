"""Makes a causal language model compute the log-probabilities of selected tokens only.

Its head runs over the hidden states of those tokens, in tiles that do not keep the logits (TRL's fused head).

Shapes: n rows, t tokens of a row, m tokens whose log-probabilities are computed.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from align_cli.model.reward_head import masked


def scoring(model: PreTrainedModel) -> PreTrainedModel:
    """Patch the model's forward and return the model. With a mask `positions` (n, t), forward returns the (m,) float32
    log-probabilities of the tokens after those positions, row by row. Without `positions` it is transformers' own."""
    add_fused_lm_head(model)
    fused = model.forward

    # keep the original signature: `generate` validates its arguments against it
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, positions: Tensor | None = None, **inputs: Any) -> Any:
        if positions is None:
            return fused(*args, **inputs)
        given = {key: inputs[key] for key in ("attention_mask", "position_ids") if inputs.get(key) is not None}
        ids = inputs["input_ids"]
        targets = ids.roll(-1, 1)[positions].unsqueeze(0)

        def pick(trunk: Any, args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[positions].unsqueeze(0)
            return output

        hook = self.base_model.register_forward_hook(pick)
        try:
            output = fused(input_ids=ids, **masked(self, given), shift_labels=targets, fused_lm_head=True)
        finally:
            hook.remove()
        return output.log_probs[0].float()

    model.forward = types.MethodType(forward, model)
    return model


def of_responses(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(n,) summed float32 log-probabilities of the response tokens, and (n,) summed entropies if the model's fused
    head returns them, else None. All inputs are (n, t); the model has TRL's fused head (`add_fused_lm_head`)."""
    labels = input_ids.masked_fill(response_mask == 0, -100)
    made = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    entropy = made.entropy.float().sum(1) if getattr(made, "entropy", None) is not None else None
    return made.log_probs.float().sum(1), entropy
