"""Public wrappers for private methods of TRL's trainers (tests/compat/test_private_names.py).

Our trainers override hooks that TRL calls by private names. These mixins map each private method to a public one, which
a trainer may override; its default implementation calls TRL's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from datasets import Dataset
from torch import Tensor
from torch.nn import Module
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from trl.trainer import utils

Responses = tuple[list[list[int]], Any]
"""(token ids of responses, their log-probabilities if the engine returns them)."""


class OnlineHooks:
    """Mixin for GRPOTrainer and RLOOTrainer; must precede them in the bases."""

    gives_log_probs = True
    """Whether the trainer's `_generate_single_turn` returns log-probabilities with the ids; RLOOTrainer's does not."""

    # -- methods that our trainers override

    def prompt_tokens(self, prompts: list[Any]) -> list[list[int]]:
        """Token ids of prompts."""
        return super()._tokenize_prompts(prompts)[0]

    def sample(self, prompts: list[list[int]], generate: Callable[[list[list[int]]], Any]) -> Responses:
        """Responses to prompts; `generate` is TRL's implementation."""
        made = generate(prompts)
        return made if isinstance(made, tuple) else (made, None)

    def rollout(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A rollout: responses, sampled and scored, with all inputs of the loss."""
        return super()._generate_and_score_completions(inputs)

    def reward(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], ids: list[list[int]]
    ) -> Tensor:
        """(samples over all ranks, 1) rewards."""
        return super()._calculate_rewards(inputs, prompts, completions, ids)

    def micro_batch(self, batch: Any) -> Any:
        """The inputs of one forward and backward pass."""
        return super()._prepare_inputs(batch)

    def policy_loss(self, model: Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of a micro-batch."""
        return super()._compute_loss(model, inputs)

    def prompt_order(self, dataset: Dataset | None) -> Sampler:
        """The order in which prompts are sampled."""
        return super()._get_train_sampler(dataset)

    # -- state of TRL's trainers

    @property
    def figures(self) -> dict[str, list[float]]:
        """Training metrics since the last log, by name."""
        return self._metrics["train"]

    @property
    def prompt_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, also if the processing class is a processor."""
        return self._tokenizer

    @property
    def micro_step(self) -> int:
        """Number of forward and backward passes in this process so far."""
        return self._step

    def token_log_probs(self, model: Module, ids: Tensor, mask: Tensor, t: int, batch_size: int) -> Tensor:
        """(b, t) log-probabilities of the last t tokens."""
        return self._get_per_token_logps_and_entropies(model, ids, mask, t, batch_size=batch_size)[0]

    # -- the private names

    def _tokenize_prompts(self, prompts: list[Any]):
        return self.prompt_tokens(prompts), None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any):
        generate = super()._generate_single_turn
        ids, log_probs = self.sample(prompt_ids, lambda prompts: generate(prompts, *args, **kwargs))
        return (ids, log_probs) if self.gives_log_probs else ids

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        return self.rollout(inputs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        return self.reward(inputs, prompts, completions, completion_ids_list)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        return self.micro_batch(generation_batch)

    def _compute_loss(self, model: Module, inputs: dict[str, Any]) -> Tensor:
        return self.policy_loss(model, inputs)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return self.prompt_order(dataset)


class PreparedRows:
    """Mixin for DPOTrainer and KTOTrainer with tokenized rows; must precede them in the bases."""

    def prepared(self, dataset: Dataset) -> Dataset:
        """The rows in the format of the trainer's collator."""
        return dataset

    def with_reference(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """The rows with the reference's log-probabilities."""
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def reference_engine(self, make: Callable[[], Any]) -> Any:
        """The DeepSpeed engine for the reference's log-probabilities; `make` creates it on first use."""
        self._precompute_engine = self._precompute_engine or make()
        return self._precompute_engine

    @property
    def eval_figures(self) -> dict[str, list[float]]:
        """Held-out metrics since the last log, by name."""
        return self._metrics["eval"]

    def whole_loss(self, model: Callable[..., Any], inputs: dict[str, Tensor]) -> float:
        """TRL's held-out loss of inputs that hold the reference's log-probabilities. Adds its metrics to the held-out
        ones, without a mixture of experts' balance, which is a figure of batches."""
        precomputed, training = self.precompute_ref_logps, self.model.training
        self.precompute_ref_logps = True
        self.model.eval()
        loss = float(self._compute_loss(model, inputs, False))
        self.model.train(training)
        self.precompute_ref_logps = precomputed
        self._metrics["eval"].pop("aux_loss", None)
        return loss

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return self.prepared(dataset)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return self.with_reference(dataset, name, batch_size)


class OwnOrder:
    """Mixin for KTOTrainer; must precede it in the bases."""

    def row_order(self) -> Sampler:
        """The order of the training rows."""
        return super()._get_train_sampler()

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return self.row_order()


class CountsTokens(Protocol):
    """A trainer that counts the tokens it has trained on, as TRL's do."""

    _total_train_tokens: int


def trained_tokens(trainer: CountsTokens) -> int:
    """Number of tokens trained on so far."""
    return trainer._total_train_tokens


def set_trained_tokens(trainer: CountsTokens, count: int) -> None:
    """Set the result of `trained_tokens`, for trainers that count tokens themselves."""
    trainer._total_train_tokens = count


def replace_fused_head(function: type) -> None:
    """Make `function` the autograd function of TRL's fused head in this process, for positions with a label only.

    Without Triton, TRL would compute every position, to keep shapes static for compilation.
    """
    utils._ChunkedLogProbFunction = function
    utils._use_triton = lambda device: True
