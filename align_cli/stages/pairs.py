"""What DPO, its rounds and SPIN share: training arguments, and TRL's trainer over pairs of token ids."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig

from align_cli.methods.dpo import PairTrainer
from align_cli.model import kind, load
from align_cli.model.lora import peft_config
from align_cli.stages import training
from align_cli.stages.job import Job


def arguments(job: Job, **own: Any) -> DPOConfig:
    """Training arguments. Must be built before any model, or ZeRO-3 does not shard while loading."""
    return training.arguments(DPOConfig, job, precompute_ref_log_probs=job.recipe.method.precompute_reference, **own)


def trainer(
    job: Job, tokenizer: PreTrainedTokenizerBase, args: DPOConfig, train: Dataset, held_out: Dataset | None
) -> PairTrainer:
    """A trainer of the job's policy against its reference, over `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    recipe, other = job.recipe, job.reference
    return PairTrainer(
        model=load.policy(recipe.model, tokenizer, dtype=job.dtype, path=job.base),
        ref_model=load.policy(recipe.model, tokenizer, dtype=job.dtype, path=other) if other else None,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config(recipe.lora, load.new_tokens(tokenizer)),
        reference_key=f"{kind.fingerprint(other or job.base) or other or job.base} {job.dtype} bf16={args.bf16}",
        reference_cache=job.cache / "reference",
    )
