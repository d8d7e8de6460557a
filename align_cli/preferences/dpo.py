"""DPO on TRL's trainer with tokenized pairs; the rounds of DPO and SPIN also use it.

Differences from TRL's DPOTrainer: rows are not tokenized, truncated or dropped again; the reference's log-probabilities
are cached under a key of model, data and settings, so that later runs reuse them; cDPO is supported.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.models import prepare_deepspeed

from align_cli import distributed
from align_cli.compat.trl_private import PreparedRows
from align_cli.model import kind, load
from align_cli.model.lora import peft_config
from align_cli.recipe.preferences import DpoMethod, DpoRecipe, SpinRecipe
from align_cli.training.arguments import arguments as training_arguments
from align_cli.training.held_out import HeldOut, Outputs, Replay, of_tokens
from align_cli.training.job import Job
from align_cli.training.placement import policy, separate_reference

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
BATCH = 1000
"""Rows that are hashed at a time."""


def arguments(job: Job[DpoRecipe | SpinRecipe], **own: Any) -> DPOConfig:
    """Training arguments; `own` are further fields. Must be built before any model is loaded, or ZeRO-3 does not shard
    while loading."""
    precompute = job.recipe.method.precompute_reference
    return training_arguments(DPOConfig, job, precompute_ref_log_probs=precompute, **own)


def losses(method: DpoMethod) -> dict[str, Any]:
    """The fields of TRL's config for a recipe's mixture of losses."""
    names, smoothing = trl_loss(method.loss, method.label_smoothing)
    return {
        "loss_type": names,
        "loss_weights": method.loss_weights,
        "beta": method.beta,
        "label_smoothing": smoothing,
    }


def trainer(
    job: Job[DpoRecipe | SpinRecipe],
    tokenizer: PreTrainedTokenizerBase,
    args: DPOConfig,
    train: Dataset | IterableDataset,
    held_out: Dataset | None,
) -> DpoTrainer:
    """A trainer for the job's policy and reference on rows of `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    recipe, other = job.recipe, job.reference
    return DpoTrainer(
        model=policy(job, tokenizer),
        # the policy before training is the reference of precomputed log-probabilities
        ref_model=separate_reference(job, tokenizer) if other or not args.precompute_ref_log_probs else None,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config(recipe.lora, load.new_tokens(tokenizer)),
        reference_key=f"{kind.fingerprint(other or job.base) or other or job.base} {job.dtype} bf16={args.bf16}",
        reference_cache=job.cache / "reference",
    )


def trl_loss(losses: list[str], label_smoothing: float) -> tuple[list[str], float]:
    """TRL's loss types and label smoothing for a recipe's losses.

    TRL dropped conservative DPO, (1-ε)·[-log σ(x)] + ε·[-log σ(-x)], when its sigmoid loss lost label smoothing. Its
    `robust` loss, ((1-ε')·[-log σ(x)] - ε'·[-log σ(-x)]) / (1-2ε'), is the same function at ε' = -ε/(1-2ε).
    """
    if losses == ["cdpo"]:
        return ["robust"], -label_smoothing / (1 - 2 * label_smoothing)
    return losses, label_smoothing


class DpoTrainer(HeldOut, PreparedRows, DPOTrainer):
    """DPOTrainer for `prompt_ids`, `chosen_ids`, `rejected_ids` that caches reference log-probabilities across runs.

    Its held-out figures are TRL's, computed over all pairs at once.
    """

    def __init__(self, *args: Any, reference_key: str = "", reference_cache: Path | None = None, **kwargs: Any):
        self.reference_key, self.reference_cache = reference_key, reference_cache
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            super().__init__(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """TRL's loss and figures over all held-out pairs."""
        pairs = self.measured(self.eval_dataset if eval_dataset is None else eval_dataset, self._pairs)
        device = self.accelerator.device
        outputs = Outputs([pair[side] for side in (0, 1) for pair in pairs], device)
        reference = torch.tensor([pair[2] for pair in pairs], device=device)
        inputs = outputs.inputs() | {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
        return self.report({"loss": self.whole_loss(Replay(outputs), inputs)}, metric_key_prefix)

    def _pairs(self, model: Module, batch: dict[str, Tensor]) -> list[tuple[dict, dict, tuple[float, float]]]:
        """For every pair what the policy gives for the tokens of both responses, and the reference's sums."""
        inputs = {key: value for key, value in batch.items() if key not in ("completion_mask", *COLUMNS)}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        outputs = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        sequences = of_tokens(outputs, batch["completion_mask"][:, 1:].bool())
        if self.precompute_ref_logps:
            reference = [batch[column] for column in COLUMNS]
        else:
            reference = self.compute_ref_log_probs(self.ref_model or model, batch)
        sums = zip(*(side.tolist() for side in reference), strict=True)
        half = len(sequences) // 2
        return list(zip(sequences[:half], sequences[half:], sums, strict=True))

    def with_reference(self, dataset: Dataset | IterableDataset, name: str, batch_size: int) -> Dataset:
        """The rows with the reference's log-probabilities, read from the cache or computed and cached."""
        if isinstance(dataset, IterableDataset):
            return super().with_reference(dataset, name, batch_size)
        file, columns = distributed.from_rank_0(lambda: self._cached(dataset))
        if columns is None:
            columns = self._reference_log_probs(dataset, batch_size)
            if self.accelerator.is_main_process:
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_suffix(".part")
                save_file(columns, part)
                part.replace(file)
            self.accelerator.wait_for_everyone()
        for column in COLUMNS:
            dataset = dataset.add_column(column, columns[column].numpy())
        return dataset

    def _cached(self, dataset: Dataset) -> tuple[Path, dict[str, torch.Tensor] | None]:
        """The cache file of these rows and its contents, or None if there is none."""
        file = self.reference_cache / f"{self._key(dataset)}.safetensors"
        return file, load_file(file) if file.is_file() else None

    def _key(self, dataset: Dataset) -> str:
        """The cache file's name: a hash of reference model, token ids (hence data and template) and `ld_alpha`."""
        digest = hashlib.sha256(json.dumps([self.reference_key, self.args.ld_alpha]).encode())
        for table in dataset.with_format("arrow").iter(BATCH):
            for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
                ids = table[name].combine_chunks()
                for numbers in (ids.value_lengths(), ids.flatten()):
                    digest.update(numbers.to_numpy().astype("int64"))
        return digest.hexdigest()[:32]

    def _reference_log_probs(self, dataset: Dataset, batch_size: int) -> dict[str, torch.Tensor]:
        """(rows,) summed log-probabilities of chosen and rejected responses under the reference."""
        loader = self.accelerator.prepare(
            DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator, shuffle=False)
        )
        if self.ref_model is None and self.is_deepspeed_enabled:
            model = self.reference_engine(lambda: prepare_deepspeed(self.model, self.accelerator))
        else:
            model = self.ref_model or self.model
        sums: dict[str, list[torch.Tensor]] = {column: [] for column in COLUMNS}
        # without a reference model, the policy before training is the reference; its dropout must be off
        training = self.model.training
        self.model.eval()
        for batch in loader:
            pair = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(model, batch))
            for column, values in zip(COLUMNS, pair, strict=True):
                sums[column].append(values.float().cpu())
        self.model.train(training)
        return {column: torch.cat(values) for column, values in sums.items()}
