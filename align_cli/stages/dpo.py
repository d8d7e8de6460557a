"""align dpo: direct preference optimization, -log σ(β·[(log π/π_ref)(chosen) - (log π/π_ref)(rejected)]).

    align dpo recipe=demo.yaml

arXiv 2305.18290, eq. 7, and every other loss of TRL's trainer. The reference is the policy as it starts unless the
recipe names another one; under LoRA it is the base with the adapter off, and no second model is held.
"""

from __future__ import annotations

from trl import DPOConfig

from align_cli.data import chat
from align_cli.methods.dpo import PairTrainer, trl_loss
from align_cli.model import kind, load
from align_cli.model.lora import peft_config
from align_cli.stages import training
from align_cli.stages.job import Job, Outcome


def run(job: Job) -> Outcome:
    """Train, answer the samples before and after, save. Returns the metrics and the row counts."""
    recipe, data, method = job.recipe, job.recipe.data, job.recipe.method
    tokenizer = load.tokenizer(recipe.model, job.base)
    losses, smoothing = trl_loss(method.loss, method.label_smoothing)
    args = training.arguments(
        DPOConfig,
        job,
        loss_type=losses,
        loss_weights=method.loss_weights,
        beta=method.beta,
        label_smoothing=smoothing,
        precompute_ref_log_probs=method.precompute_reference,
    )

    def tokenized(groups, tally):
        return chat.dpo_rows(
            tokenizer,
            groups,
            how=method.pairs,
            max_length=data.max_length,
            max_prompt_length=data.max_prompt_length,
            tally=tally,
        )

    train, held_out, counts = training.datasets(job, "preferences", tokenized)
    other = job.reference
    trainer = PairTrainer(
        model=load.policy(recipe.model, tokenizer, dtype=job.dtype, path=job.base),
        ref_model=load.policy(recipe.model, tokenizer, dtype=job.dtype, path=other) if other else None,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config(recipe.lora),
        reference_key=f"{kind.fingerprint(other or job.base) or other or job.base} {job.dtype} bf16={args.bf16}",
        reference_cache=job.cache / "reference",
    )
    return training.run_to_end(trainer, tokenizer, job, counts)
