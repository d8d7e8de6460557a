"""PPO on TRL's GRPOTrainer: a critic, token-level KL in the reward, GAE, clipped value loss, a KL controller.

InstructGPT (arXiv 2203.02155, eq. 2) with the constants of "The N implementation details of RLHF with PPO". TRL removed
its own PPO in 1.13. Rollouts, ZeRO, resuming and the clipped policy loss are GRPOTrainer's; its loss accepts advantages
of shape (b, t) from subclasses.

Shapes: b samples, p prompt tokens, t response tokens, d hidden size.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from align_cli import distributed
from align_cli.compat.libraries import exchange_gradients
from align_cli.rl.backbone import POLICY, VALUE, SharedBackbone
from align_cli.rl.losses import clipped_value_loss
from align_cli.rl.returns import KLController, gae, kl_estimate, moments, shaped_rewards, whiten
from align_cli.rl.rollouts import Rollouts


class PPOConfig(GRPOConfig):
    """GRPOConfig that allows one sample per prompt, since the baseline is the value function, not other samples."""

    def __post_init__(self):
        wanted, local = self.num_generations, self.per_device_train_batch_size * (self.steps_per_generation or 1)
        if wanted == 1:
            # a value that passes TRL's check: at least two, and a divisor of the rollout
            self.num_generations = local if local > 1 else 2
        super().__post_init__()
        self.num_generations = wanted


@dataclass
class Settings:
    """The constants of PPO."""

    gamma: float
    lam: float
    vf_coef: float
    value_clip: float
    estimator: str
    whiten: bool
    ptx_coef: float = 0.0


class Critic:
    """A separate value model, added to the policy as a submodule to share its optimizer, engine and checkpoints."""

    PART = "value_model"
    separate = False
    """Whether the value loss needs a backward pass of its own."""

    def __init__(self, policy: PreTrainedModel, value_model: PreTrainedModel):
        policy.add_module(self.PART, value_model)
        self.policy, self.value_model = policy, value_model

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """A context in which the policy does not contain the value model."""
        delattr(self.policy, self.PART)
        try:
            yield
        finally:
            self.policy.add_module(self.PART, self.value_model)

    def active(self) -> contextlib.AbstractContextManager[None]:
        """A context in which `values` may be called."""
        return contextlib.nullcontext()

    def values(self, input_ids: Tensor, attention_mask: Tensor, t: int) -> Tensor:
        """(b, t) V(s) before each of the last t tokens is sampled, read at the preceding token."""
        trunk = getattr(self.value_model, self.value_model.base_model_prefix)
        hidden = trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.value_model.score(hidden[:, -t - 1 : -1]).mean(2)


class SharedCritic:
    """The value function as an adapter on the policy's backbone."""

    separate = True

    def __init__(self, backbone: SharedBackbone):
        self.backbone = backbone

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the backbone does not contain the other roles' heads."""
        return self.backbone.without_heads()

    def active(self) -> contextlib.AbstractContextManager[None]:
        """A context in which `values` may be called: the value adapter is active."""
        return self.backbone.role(VALUE)

    def values(self, input_ids: Tensor, attention_mask: Tensor, t: int) -> Tensor:
        """(b, t) V(s) before each of the last t tokens is sampled."""
        return self.backbone.scores(VALUE, input_ids, attention_mask)[:, -t - 1 : -1].mean(2)


class ValueHead(TrainerCallback):
    """Saves the value head in checkpoints, since PEFT saves only the adapters."""

    FILE = "value_head.safetensors"

    def __init__(self, backbone: SharedBackbone):
        self.head = backbone.model.get_submodule(f"{VALUE}_head")

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero and not args.deepspeed:
            save_file(self.head.state_dict(), Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE)

    def on_train_begin(self, args, state, control, **kwargs):
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE
        if state.global_step and distributed.from_rank_0(file.is_file):
            self.head.load_state_dict(load_file(file))


class PPOTrainer(Rollouts, GRPOTrainer):
    """GRPOTrainer whose advantages come from a value function. Call `prepare_ppo` after construction."""

    def prepare_ppo(
        self,
        *,
        critic: Critic | SharedCritic,
        reference: Module | None,
        controller: KLController,
        settings: Settings,
        ptx: Iterator[dict[str, Tensor]] | None = None,
    ) -> None:
        """`reference` is a prepared frozen model, or None for the policy with its adapter disabled."""
        self.critic, self.reference, self.controller, self.settings, self.ptx = (
            critic,
            reference,
            controller,
            settings,
            ptx,
        )

    @property
    def kl_coefficient(self) -> float:
        """β."""
        return self.controller.beta

    @kl_coefficient.setter
    def kl_coefficient(self, beta: float) -> None:
        self.controller.beta = beta

    def rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A rollout with token-level advantages, returns, old values and old log-probabilities."""
        rollout = super().rollout(inputs)
        if not self.model.training:
            return rollout
        started = time.perf_counter()
        set_ = self.settings
        mask = rollout["completion_mask"].float()
        ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
        seen = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
        old, reference, values = self._look_back(rollout, ids, seen, mask.shape[1])
        log_ratio = (old - reference) * mask
        rewards = shaped_rewards(self.scores, log_ratio, mask, beta=self.controller.beta, estimator=set_.estimator)
        advantages, returns = gae(rewards, values, mask, gamma=set_.gamma, lam=set_.lam)
        if set_.whiten:
            advantages = whiten(advantages, mask, self.accelerator.reduce(moments(advantages, mask), "sum"))
        self._figures(log_ratio, values, returns, mask)
        self.clock["look_back"] += time.perf_counter() - started
        return rollout | {
            "advantages": advantages,
            "old_per_token_logps": old,
            "old_values": values * mask,
            "returns": returns,
        }

    @torch.no_grad()
    def _look_back(self, rollout: dict[str, Any], ids: Tensor, seen: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """(b, t) log-probabilities under policy and reference, and values, all at rollout time."""
        size = self.args.per_device_train_batch_size
        training = self.model.training
        self.model.eval()
        old = rollout.get("old_per_token_logps")
        if old is None:
            old = self._log_probs(self.model, ids, seen, t)
        if self.reference is not None:
            reference = self._log_probs(self.reference, ids, seen, t)
        else:
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                reference = self._log_probs(self.model, ids, seen, t)
        with self.critic.active(), self.accelerator.autocast():
            values = torch.cat(
                [self.critic.values(ids[at : at + size], seen[at : at + size], t) for at in range(0, len(ids), size)]
            )
        self.model.train(training)
        return old.float(), reference.float(), values

    def _log_probs(self, model: Module, ids: Tensor, seen: Tensor, t: int) -> Tensor:
        size = self.args.per_device_train_batch_size
        return self.token_log_probs(model, ids, seen, t, batch_size=size)

    def _figures(self, log_ratio: Tensor, values: Tensor, returns: Tensor, mask: Tensor) -> None:
        """Record KL and explained variance over all ranks, and update β for the next rollout."""
        per_sequence = torch.stack([kl_estimate(log_ratio, how).mul(mask).sum(1) for how in ("k1", "k3")], 1)
        kls = self.accelerator.gather(per_sequence).mean(0)
        sums = torch.stack([moments(returns - values * mask, mask), moments(returns, mask)])
        # one transfer for all figures
        every = torch.cat([kls, self.accelerator.reduce(sums, "sum").flatten()])
        kl, kl_k3, n, e1, e2, _, r1, r2 = every.tolist()
        variance = r2 / n - (r1 / n) ** 2
        self.note("kl", kl)
        self.note("kl_k3", kl_k3)
        self.note("explained_variance", 1 - (e2 / n - (e1 / n) ** 2) / variance if variance > 1e-12 else 0.0)
        self.note("beta", self.controller.beta)
        self.controller.update(kl, int(self.accelerator.num_processes * len(mask)))

    def policy_alone(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model does not contain the value function."""
        return self.critic.apart()

    def policy_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The policy's trained weights, without the value function's."""
        named = super().policy_parameters()
        if self.critic.separate:
            return {name: parameter for name, parameter in named.items() if f".{POLICY}." in name}
        return {name: parameter for name, parameter in named.items() if not name.startswith(f"{Critic.PART}.")}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Create the optimizer for policy and value function, also after a checkpoint's adapters were loaded."""
        if self.critic.separate:
            self.critic.backbone.as_policy()
        return super().create_optimizer(*args, **kwargs)

    def training_step(
        self, model: Module, inputs: list[dict[str, Any]], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in GRPOTrainer, plus a separate backward pass for the value loss if the critic is an adapter of the
        backbone. DDP expects one forward pass through its wrapper, so gradients are all-reduced here instead."""
        state, last = self.accelerator.gradient_state, self.accelerator.sync_gradients
        ours = isinstance(model, DistributedDataParallel)
        with model.no_sync() if ours else contextlib.nullcontext():
            exchange_gradients(state, last and not self.critic.separate)
            loss = super().training_step(model, inputs, num_items_in_batch)
            exchange_gradients(state, last)
            if self.critic.separate:
                loss = loss + self._value_step()
        if ours and last:
            distributed.average([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        return loss

    def policy_loss(self, model: Module, inputs: dict[str, Any]) -> Tensor:
        """Clipped policy loss + c·clipped value loss + γ·LM loss on pretraining rows, each a mean over all ranks."""
        loss = super().policy_loss(model, inputs)
        if self.critic.separate:
            self._micro_batch = inputs
        else:
            loss = loss + self._value_loss(inputs)
        if self.ptx is not None:
            with self.accelerator.autocast():
                lm = model(**next(self.ptx)).loss
            self.note("ptx_loss", lm.detach())
            loss = loss + self.settings.ptx_coef * lm / self.current_gradient_accumulation_steps
        return loss

    def _value_step(self) -> Tensor:
        """Forward and backward of the value loss with the value adapter active. Returns the loss."""
        with self.critic.active():
            loss = self._value_loss(self._micro_batch)
            self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        return loss.detach()

    def _value_loss(self, inputs: dict[str, Any]) -> Tensor:
        """c·clipped value loss, a mean over the response tokens of all ranks."""
        mask = inputs["completion_mask"].float()
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with self.accelerator.autocast():
            values = self.critic.values(ids, seen, mask.shape[1])
        each = clipped_value_loss(values, inputs["old_values"], inputs["returns"], self.settings.value_clip)
        # the normalizer of the policy loss: all response tokens of one accumulation window
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        value_loss = (each * mask).sum() / tokens
        self.note("value_loss", (each.detach() * mask).sum() / mask.sum())
        return self.settings.vf_coef * value_loss
