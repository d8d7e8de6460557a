"""Supervised fine-tuning on the recipe's `data`, shared by stages: mean -log p over response tokens."""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import Module
from trl import SFTConfig, SFTTrainer, pack_dataset

from align_cli.data import chat
from align_cli.model import load
from align_cli.model.lora import peft_config
from align_cli.training.arguments import arguments
from align_cli.training.datasets import datasets
from align_cli.training.held_out import HeldOut
from align_cli.training.job import Job, Outcome
from align_cli.training.loop import run_to_end
from align_cli.training.placement import policy


class SupervisedTrainer(HeldOut, SFTTrainer):
    """SFTTrainer whose held-out loss and figures are means over all held-out tokens."""

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, entropy (nats) and the share of tokens that are the model's first choice."""
        rows = self.measured(self.eval_dataset if eval_dataset is None else eval_dataset, self._rows)
        tokens, *sums = torch.tensor(rows, dtype=torch.float64).sum(0).tolist()
        names = ("loss", "entropy", "mean_token_accuracy")
        return self.report(
            {name: total / max(tokens, 1) for name, total in zip(names, sums, strict=True)}, metric_key_prefix
        )

    def _rows(self, model: Module, batch: dict[str, Tensor]) -> list[list[float]]:
        """For every row its trained tokens, and the sums of loss, entropy and first choices over them."""
        outputs = model(**batch, use_cache=False, fused_lm_head=True)
        mask = outputs.label_mask
        loss = -outputs.log_probs
        if self.args.loss_type == "dft":
            loss = loss * outputs.log_probs.exp()
        if self.label_smoother is not None and self.args.loss_type == "nll":
            loss = self._smoothed(model, batch)
        tables = (mask, loss, outputs.entropy, outputs.is_top1)
        return torch.stack([(table * mask).double().sum(1).cpu() for table in tables], 1).tolist()

    def _smoothed(self, model: Module, batch: dict[str, Tensor]) -> Tensor:
        """(b, t) losses with label smoothing (transformers' LabelSmoother), which needs all logits."""
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        log_p = logits[:, :-1].float().log_softmax(-1)
        labels, share = batch["labels"][:, 1:].clamp(min=0), self.label_smoother.epsilon
        chosen = log_p.gather(2, labels.unsqueeze(2)).squeeze(2)
        return -(1 - share) * chosen - share * log_p.mean(2)


def run(job: Job, *, packing: bool = False, last_turn_only: bool = False) -> Outcome:
    """Train, answer the samples before and after, save. Returns the metrics and the row counts."""
    recipe = job.recipe
    tokenizer = load.tokenizer(recipe.model, job.base)
    # TRL would truncate and filter the rows again, into a copy; a stream is left to it
    ready = {} if recipe.data.streaming else {"dataset_kwargs": {"skip_prepare_dataset": True}}
    args = arguments(SFTConfig, job, packing=packing, shuffle_dataset=False, **ready)
    packs = {"train": packing, "eval": packing if args.eval_packing is None else args.eval_packing}

    def tokenized(groups, tally):
        return chat.sft_rows(
            tokenizer, groups, max_length=recipe.data.max_length, last_turn_only=last_turn_only, tally=tally
        )

    def arranged(name: str, rows: Dataset) -> Dataset:
        if not packs[name]:
            return rows
        return pack_dataset(rows, args.max_length, args.packing_strategy, {"num_proc": args.dataset_num_proc})

    settings = {"last_turn_only": last_turn_only, "packs": packs, "packing": args.packing_strategy}
    rows = datasets(job, "demonstrations", tokenizer, settings, tokenized, arranged if any(packs.values()) else None)
    trainer = SupervisedTrainer(
        model=policy(job, tokenizer),
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.eval,
        processing_class=tokenizer,
        peft_config=peft_config(recipe.lora, load.new_tokens(tokenizer)),
    )
    return run_to_end(trainer, tokenizer, job, rows.counts)
