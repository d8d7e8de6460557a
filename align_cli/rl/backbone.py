"""One frozen backbone that serves as policy, reference, value function and reward model through adapters.

The reference is the backbone with its adapters disabled, so the backbone must contain the SFT weights (an adapter
parent is merged first). The reward model must be an adapter trained on the same weights.

PEFT has two silent traps. Switching adapters disables gradients of the inactive ones, so a loss over two adapters would
train only one: `role` enables them again. And a checkpointed block is recomputed with the adapter that is active in the
backward pass, so each loss must run backward before the next switch: `rl/ppo.py` does so.

Shapes: b rows, t tokens, d hidden size, h heads.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from align_cli.errors import UpstreamError
from align_cli.model import kind
from align_cli.model.lora import adapted, trained_dtype
from align_cli.model.reward_head import HEAD, Head

POLICY, VALUE, REWARD = "default", "value", "reward"
HEAD_KEY = f"base_model.model.{HEAD}.weight"


class SharedBackbone:
    """A PeftModel with one adapter per role, and a scalar head for each role except the policy."""

    def __init__(
        self,
        base: PreTrainedModel,
        policy: LoraConfig,
        *,
        reward: str | None,
        value: str | None,
        checkpointing: bool = False,
    ):
        """`reward` and `value` are adapters of reward models. If `reward` is None, the backbone has no reward
        role. If `value` is None, the value function starts from the policy, with a zero head."""
        self.model: PeftModel = adapted(base, policy, checkpointing=checkpointing)
        self.trained_dtype = trained_dtype(base)
        self.value_run = value
        self.model.add_module(f"{VALUE}_head", self._add(VALUE, value) if value else self._fresh(VALUE, policy))
        if reward:
            self.model.add_module(f"{REWARD}_head", self._add(REWARD, reward).frozen())
        self.as_policy()

    def as_policy(self) -> None:
        """Activate the policy's adapter and make policy and value function trainable. Must be called before an
        optimizer is built and after adapters are loaded, since loading enables gradients of the active one only."""
        adapters = {
            role: [p for name, p in self.model.named_parameters() if f".{role}." in name]
            for role in (POLICY, VALUE, REWARD)
        }
        self.trained, self.frozen = adapters[POLICY] + adapters[VALUE], adapters[REWARD]
        self._switch(POLICY)

    def _add(self, role: str, run: str) -> Head:
        """Load a reward model's adapter under the role's name; returns its head."""
        weights = load_peft_weights(run, device="cpu")
        if HEAD_KEY not in weights:
            raise UpstreamError(f"{run}: its adapter holds no head; it was not trained by `align rm`")
        saved = weights.pop(HEAD_KEY).float()
        config = LoraConfig.from_pretrained(run)
        # load a classifier's adapter into a language model: the same layers, without the head
        config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
        self._add_adapter(role, config)
        set_peft_model_state_dict(self.model, weights, adapter_name=role)
        head = Head(saved.shape[1], saved.shape[0], bias=False)
        head.weight.data.copy_(saved)
        return head.to(self.trained_dtype) if role == VALUE else head

    def _fresh(self, role: str, config: LoraConfig) -> Head:
        """Add an adapter like the policy's under the role's name; returns a zero head."""
        self._add_adapter(role, config)
        embedding = self.model.get_input_embeddings().weight
        # under ZeRO-3 the weight itself is empty here
        head = Head(getattr(embedding, "ds_shape", embedding.shape)[1], 1, bias=False)
        nn.init.zeros_(head.weight)
        return head.to(self.trained_dtype)

    def _add_adapter(self, role: str, config: LoraConfig) -> None:
        self.model.add_adapter(role, config, autocast_adapter_dtype=self.trained_dtype == torch.float32)

    def _switch(self, role: str) -> None:
        self.model.base_model.set_adapter(role)
        for parameter in self.trained:
            parameter.requires_grad_(True)
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    @contextlib.contextmanager
    def role(self, role: str) -> Iterator[None]:
        """A context in which the value or the reward adapter is active; the policy's is active again afterwards."""
        self._switch(role)
        try:
            yield
        finally:
            self._switch(POLICY)

    def scores(self, role: str, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, t, h) outputs of the role's head at every token. Must be called within `role`."""
        causal = self.model.base_model.model
        trunk = getattr(causal, causal.base_model_prefix)
        hidden = trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.model.get_submodule(f"{role}_head")(hidden)

    @contextlib.contextmanager
    def without_heads(self) -> Iterator[None]:
        """A context in which the model does not contain the heads."""
        names = [name for name, _ in self.model.named_children() if name in (f"{VALUE}_head", f"{REWARD}_head")]
        heads = {name: self.model.get_submodule(name) for name in names}
        for name in heads:
            delattr(self.model, name)
        try:
            yield
        finally:
            for name, head in heads.items():
                self.model.add_module(name, head)

    def policy_only(self) -> None:
        """Delete the other roles' adapters, so that only the policy is saved."""
        for role in {VALUE, REWARD} & set(self.model.peft_config):
            self.model.delete_adapter(role)
        self.as_policy()

    def save_value(self, folder: Path, base: str) -> None:
        """Save the value function in the format of a reward model's adapter (`AutoModelForSequenceClassification`)."""
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
        kind.name_base(folder, base, kind.fingerprint(base))
