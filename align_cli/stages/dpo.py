"""align dpo: direct preference optimization, -log σ(β·[(log π/π_ref)(chosen) - (log π/π_ref)(rejected)]).

    align dpo recipe=demo.yaml
    align dpo recipe=online-demo.yaml

arXiv 2305.18290, eq. 7, and every other loss of TRL's trainer. The reference is the policy as it starts unless the
recipe names another one; under LoRA it is the base with the adapter off, and no second model is held. With
`method.rounds` the pairs are the policy's own answers, scored: `stages/iterative.py`.
"""

from __future__ import annotations

from align_cli.data import chat
from align_cli.methods.dpo import trl_loss
from align_cli.model import load
from align_cli.stages import iterative, pairs, training
from align_cli.stages.job import Job, Outcome


def run(job: Job) -> Outcome:
    """Train, answer the samples before and after, save. Returns the metrics and the row counts."""
    recipe, data, method = job.recipe, job.recipe.data, job.recipe.method
    if method.rounds is not None:
        return iterative.run(job)
    tokenizer = load.tokenizer(recipe.model, job.base)
    losses, smoothing = trl_loss(method.loss, method.label_smoothing)
    args = pairs.arguments(
        job, loss_type=losses, loss_weights=method.loss_weights, beta=method.beta, label_smoothing=smoothing
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
    return training.run_to_end(pairs.trainer(job, tokenizer, args, train, held_out), tokenizer, job, counts)
