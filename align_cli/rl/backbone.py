"""One frozen backbone that plays policy, reference, value function and reward model through adapters.

The reference is the backbone with its adapters off, so the SFT weights must be in it (an adapter parent is merged
first); the reward model must be an adapter that was trained on the very same weights.

Two traps of PEFT, both silent. Switching adapters takes the gradient away from those that are switched off, so a loss
over two of them trains one: `role` gives it back. And a checkpointed block is computed again under whatever adapter is
on by then, so each loss must run backward before the next switch: `methods/ppo.py` does.

Shapes: b rows, t tokens, d hidden size, h heads.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from align_cli.errors import UpstreamError
from align_cli.model.reward_head import HEAD

POLICY, VALUE, REWARD = "default", "value", "reward"
HEAD_KEY = f"base_model.model.{HEAD}.weight"


class SharedBackbone:
    """A PeftModel with an adapter and, but for the policy, a scalar head for each role."""

    def __init__(self, base: PreTrainedModel, policy: LoraConfig, *, reward: str | None, value: str | None):
        """`reward` and `value` are adapters of reward models; None for no reward model, and for a value function that
        starts as the policy does, with a head of zeros."""
        self.model: PeftModel = get_peft_model(base, policy)
        self.value_run = value
        self.model.add_module(f"{VALUE}_head", self._add(VALUE, value) if value else self._fresh(VALUE, policy))
        if reward:
            head = self._add(REWARD, reward)
            # the trainer must not make this one a parameter of its optimizer
            self.model.add_module(f"{REWARD}_head", head.requires_grad_(False))
        self.as_policy()

    def as_policy(self) -> None:
        """The policy's adapter on, policy and value function trainable: how it must be before an optimizer is built and
        after adapters were loaded, which leaves gradients to the active one only."""
        adapters = {
            role: [p for name, p in self.model.named_parameters() if f".{role}." in name]
            for role in (POLICY, VALUE, REWARD)
        }
        self.trained, self.frozen = adapters[POLICY] + adapters[VALUE], adapters[REWARD]
        self._switch(POLICY)

    def _add(self, role: str, run: str) -> nn.Linear:
        """Load a reward model's adapter under the role's name; returns its head."""
        weights = load_peft_weights(run, device="cpu")
        if HEAD_KEY not in weights:
            raise UpstreamError(f"{run}: its adapter holds no head; it was not trained by `align rm`")
        saved = weights.pop(HEAD_KEY).float()
        config = LoraConfig.from_pretrained(run)
        # a classifier's adapter on a language model: the same layers, without the head
        config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
        self.model.add_adapter(role, config)
        set_peft_model_state_dict(self.model, weights, adapter_name=role)
        head = nn.Linear(saved.shape[1], saved.shape[0], bias=False)
        head.weight.data.copy_(saved)
        return head

    def _fresh(self, role: str, config: LoraConfig) -> nn.Linear:
        """An adapter like the policy's under the role's name; returns a head of zeros."""
        self.model.add_adapter(role, config)
        head = nn.Linear(self.model.get_input_embeddings().weight.shape[1], 1, bias=False)
        nn.init.zeros_(head.weight)
        return head

    def _switch(self, role: str) -> None:
        self.model.base_model.set_adapter(role)
        for parameter in self.trained:
            parameter.requires_grad_(True)
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    @contextlib.contextmanager
    def role(self, role: str) -> Iterator[None]:
        """The backbone as the value function or the reward model; the policy again afterwards."""
        self._switch(role)
        try:
            yield
        finally:
            self._switch(POLICY)

    def scores(self, role: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, t, h) what the role's head says at every token. To be called within `role`."""
        causal = self.model.base_model.model
        trunk = getattr(causal, causal.base_model_prefix)
        hidden = trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        head = self.model.get_submodule(f"{role}_head")
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.to(head.weight.dtype)).float()

    def policy_only(self) -> None:
        """Let go of the other roles, so that what is saved is the policy."""
        for role in {VALUE, REWARD} & set(self.model.peft_config):
            self.model.delete_adapter(role)
        self.as_policy()

    def save_value(self, folder: Path, base: str) -> None:
        """The value function as a reward model's adapter: `AutoModelForSequenceClassification` reads it."""
        weights = get_peft_model_state_dict(self.model, adapter_name=VALUE)
        weights = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
        weights[HEAD_KEY] = self.model.get_submodule(f"{VALUE}_head").weight.detach().cpu().contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if self.value_run:
            config = json.loads((Path(self.value_run) / "adapter_config.json").read_text(encoding="utf-8"))
        else:
            self.model.peft_config[VALUE].save_pretrained(folder)
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            config |= {"task_type": "SEQ_CLS", "modules_to_save": [HEAD], "inference_mode": True}
        config["base_model_name_or_path"] = base
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
