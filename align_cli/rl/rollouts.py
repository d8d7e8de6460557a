"""Shared by PPO, RLOO and GRPO: sampling with per-row seeds, scores from our reward sources, and minibatches.

A mixin for TRL's online trainers. Differences from them: a row's sample does not depend on rank or batch; a rollout is
split into minibatches by striding, not by shuffling on each rank; checkpoints are saved only between rollouts, so that
a resumed run never needs samples that were lost.

Shapes: b samples of this rank, t response tokens, p prompt tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler

from align_cli import distributed
from align_cli.compat.trl_private import OnlineHooks, Responses, set_trained_tokens
from align_cli.data import chat
from align_cli.generation.engine import BatchedEngine, Engine, TransformersEngine, TrlEngine
from align_cli.generation.sampling import Sampler, row_seed
from align_cli.rewards.reward import Messages, Reward


class EpochOrder(torch.utils.data.Sampler):
    """TRL's order of prompts, shuffled for each epoch with the seed plus the epoch's number.

    TRL's generator keeps its state from one epoch to the next, so a run resumed in a later epoch would repeat the first
    epoch's order. `epoch` returns the current number: accelerate passes it only to some samplers, and not through the
    wrapper that skips the batches a resumed run has already trained on.
    """

    def __init__(self, inner: RepeatSampler, epoch: Callable[[], int]):
        self.inner, self.epoch = inner, epoch

    def __iter__(self):
        self.inner.generator.manual_seed(self.inner.seed + self.epoch())
        yield from self.inner

    def __len__(self) -> int:
        return len(self.inner)


class Rollouts(OnlineHooks):
    """Mixin; call `prepare_rollouts` after constructing the trainer."""

    def prepare_rollouts(
        self,
        *,
        rewards: list[Reward],
        sampler: Sampler,
        missing_eos: float | None,
        length_penalty: float,
        gold: Reward | None = None,
    ) -> None:
        self.rewards, self.sampler, self.gold = rewards, sampler, gold
        self.missing_eos, self.length_penalty = missing_eos, length_penalty
        self.scores: Tensor = torch.zeros(0)
        self.minibatches: list[dict[str, Any]] | None = None
        """The current rollout, split into micro-steps; None before the first rollout and after resuming."""
        self.clock: Counter[str] = Counter()
        self.latest: dict[str, float] = {}
        if unused := self.accelerator.unwrap_model(self.model).generation_config.suppress_tokens:
            self._suppress(unused)

    def _suppress(self, tokens: list[int]) -> None:
        """Never sample these tokens; the engine of `hf` reads them from the model."""
        if not self.use_vllm:
            self.generation_config.suppress_tokens = tokens
            return
        given = self.vllm_generation.generation_kwargs
        given["logit_bias"] = dict.fromkeys(tokens, -100.0) | given.get("logit_bias", {})

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.args.steps_per_generation * self.num_iterations // self.args.gradient_accumulation_steps

    def policy_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The policy's trained weights, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    # -- sampling

    def prompt_order(self, dataset: Dataset | None) -> EpochOrder:
        """TRL's order, reshuffled for each epoch."""
        return EpochOrder(super().prompt_order(dataset), lambda: int(self.state.epoch or 0))

    def prompt_tokens(self, prompts: list[Messages]) -> list[list[int]]:
        """Token ids of prompts, rendered as in every other stage. TRL's method would pass the template keys that a
        dataset fills with nulls."""
        return [chat.prompt_ids(self.prompt_tokenizer, prompt) for prompt in prompts]

    def sample(self, prompts: list[list[int]], generate: Callable[[list[list[int]]], Any]) -> Responses:
        """Responses of the engine in use, each sampled with its row's own seed if the engine supports it."""
        started = time.perf_counter()
        first = self.accelerator.process_index * len(prompts)
        stream = self.state.global_step if self.model.training else -1 - self.state.global_step
        seeds = [row_seed(self.args.seed, stream, first + at) for at in range(len(prompts))]
        made = self._engine(generate).respond(prompts, seeds)
        self.clock["rollout"] += time.perf_counter() - started
        return made.ids, made.log_probs

    def _engine(self, generate: Callable[[list[list[int]]], Any]) -> Engine:
        """The engine that the recipe names; for vllm, TRL's own generation."""
        if self.use_vllm:

            def pushed(prompts: list[list[int]]) -> Any:
                with self.policy_alone():
                    return generate(prompts)

            return TrlEngine(pushed)
        if self.use_transformers_continuous_batching:
            half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
            return BatchedEngine(self._whole_model, self.generation_config, self.continuous_batching_config, half)
        return TransformersEngine(
            self._whole_model, self.sampler, self.eos_token_ids, self.prompt_tokenizer.pad_token_id
        )

    def policy_alone(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the model contains nothing but the policy: what samples or is sent to an engine."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _whole_model(self) -> Iterator[PreTrainedModel]:
        with contextlib.ExitStack() as alone:
            alone.enter_context(self.policy_alone())
            with unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model:
                try:
                    with self.accelerator.autocast():
                        yield model
                finally:
                    # before TRL gives every module in the model its ZeRO-3 hooks again
                    alone.close()

    def rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout, with our metrics."""
        rollout = super().rollout(inputs)
        if self.model.training:
            # TRL records a metric of the same name
            del self.figures["reward"][-1]
        return rollout

    # -- scores

    def reward(
        self, inputs: list[dict[str, Any]], prompts: list[Messages], completions: list[Messages], ids: list[list[int]]
    ) -> Tensor:
        """(b over all ranks, 1) scores; also stores this rank's in `self.scores`."""
        started = time.perf_counter()
        texts = [completion[0]["content"] for completion in completions]
        total = torch.zeros(len(texts), device=self.accelerator.device)
        spread = torch.zeros_like(total)
        for reward in self.rewards:
            # also waits for a judge or a function that takes much longer on one rank; the gathers below would time out
            score, std = distributed.together(lambda reward=reward: reward(prompts, texts, inputs))
            total, spread = total + score.to(total), spread + std.to(total)
        lengths = torch.tensor([len(response) for response in ids], device=total.device, dtype=total.dtype)
        ended = torch.tensor([response[-1] in self.eos_token_ids for response in ids], device=total.device)
        proxy = total
        total = total - self.length_penalty * lengths
        if self.missing_eos is not None:
            # replaces the score of responses that did not end (summarize_from_feedback)
            total = torch.where(ended, total, torch.full_like(total, self.missing_eos))
        self.scores = total
        self.clock["score"] += time.perf_counter() - started
        self._watch(prompts, texts, total, proxy, spread, lengths, ended)
        return self.accelerator.gather(total.unsqueeze(1))

    def _watch(
        self, prompts, texts, total: Tensor, proxy: Tensor, spread: Tensor, lengths: Tensor, ended: Tensor
    ) -> None:
        columns = [
            total,
            proxy,
            spread,
            lengths,
            ended.float(),
            torch.tensor([distinct_2(text) for text in texts]).to(proxy),
        ]
        if self.gold is not None:
            columns.append(distributed.together(lambda: self.gold(prompts, texts)[0]).to(proxy))
        # one transfer for all figures
        table = self.accelerator.gather(torch.stack(columns, 1)).double().cpu()
        names = ["reward", "score", "reward_spread", "response_length", "eos_rate", "distinct_2", "gold_reward"]
        for name, column in zip(names, table.unbind(1), strict=False):
            self.note(name, column.mean().item())
        self.note("score_std", table[:, 1].std(unbiased=False).item())
        self.note("reward_length_correlation", correlation(table[:, 1], table[:, 3]))

    def note(self, name: str, value: float | Tensor) -> None:
        """Record a metric for the next line of metrics.jsonl and for the guards. A tensor is this rank's part of a mean
        over ranks, which `settle` computes: reading it at once would make the host wait for the device."""
        self.figures[name].append(value)
        self.latest[name] = value

    def settle(self) -> None:
        """Replace metrics noted as tensors by their means over ranks, in one exchange. Must be called on all ranks."""
        places = [
            (values, at, name)
            for name, values in self.figures.items()
            for at, value in enumerate(values)
            if isinstance(value, Tensor)
        ]
        if not places:
            return
        parts = torch.stack([values[at].float() for values, at, _ in places])
        for (values, at, name), mean in zip(places, self.accelerator.reduce(parts, "mean").tolist(), strict=True):
            values[at] = self.latest[name] = mean

    # -- minibatches

    def micro_batch(self, batch: Any) -> Any:
        """This micro-step's slice of the current rollout. Samples a new rollout when the last one is used up."""
        if not self.model.training:
            return super().micro_batch(batch)
        every = self.args.steps_per_generation * self.num_iterations
        if self.micro_step % every == 0 or self.minibatches is None:
            rollout = self.rollout(batch)
            micro, accumulated = self.args.steps_per_generation, self.args.gradient_accumulation_steps
            b = len(rollout["completion_ids"])
            count = micro // accumulated
            # row i is in minibatch i mod n on any number of ranks, since each holds a block of consecutive rows
            order = [at for which in range(count) for at in range(which, b, count)]
            size = b // micro
            self.minibatches = [sliced(rollout, order[n * size : (n + 1) * size]) for n in range(micro)]
        return self.minibatches[self.micro_step % self.args.steps_per_generation]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the seconds spent in rollouts and scoring since the last log."""
        self.settle()
        if "loss" in logs and self.clock:
            logs |= {f"seconds_{name}": round(value, 3) for name, value in self.clock.items()}
            self.clock.clear()
        # a NaN loss shows here first
        self.latest |= {name: logs[name] for name in ("loss", "grad_norm") if name in logs}
        set_trained_tokens(self, int(self.state.num_input_tokens_seen))
        if self.figures["entropy"]:
            self.latest["entropy"] = self.figures["entropy"][-1]
        super().log(logs, *args, **kwargs)


class GroupRollouts(Rollouts):
    """Mixin for RLOO and GRPO, whose β is TRL's `beta` and whose baseline is the prompt's other samples."""

    @property
    def kl_coefficient(self) -> float:
        """β."""
        return self.beta

    @kl_coefficient.setter
    def kl_coefficient(self, beta: float) -> None:
        self.beta = beta

    def note_kl(self) -> None:
        """Record KL and β. KL is in nats per sequence, as in PPO; TRL records it per token."""
        per_token = self.figures["kl"]
        if self.model.training:
            if per_token:
                self.note("kl", per_token.pop() * self.latest["response_length"])
            self.note("beta", self.beta)


class BetweenRollouts(TrainerCallback):
    """Delays checkpoints and stops to the end of the current rollout."""

    def __init__(self, updates: Callable[[], int]):
        self.updates, self.due, self.stopping = updates, False, False

    def on_step_end(self, args, state, control, **kwargs):
        self.due |= control.should_save
        self.stopping |= control.should_training_stop and state.global_step < state.max_steps
        if state.global_step % self.updates() == 0 or state.global_step >= state.max_steps:
            control.should_save, control.should_training_stop = self.due, control.should_training_stop or self.stopping
            self.due = False
        else:
            control.should_save = control.should_training_stop = False


def sliced(rollout: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The given rows of every tensor that has one entry per row."""
    b = len(rollout["completion_ids"])
    return {
        key: value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == b else value
        for key, value in rollout.items()
    }


def distinct_2(text: str) -> float:
    """Share of distinct bigrams among a text's word bigrams; 1 if it has none (Li et al., 2016)."""
    words = text.split()
    bigrams = list(zip(words, words[1:], strict=False))
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation; 0 if either input is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / scale) if scale > 1e-12 else 0.0
