"""align dpo: direct preference optimization, -log σ(β·[(log π/π_ref)(chosen) - (log π/π_ref)(rejected)]).

    align dpo recipe=demo.yaml
    align dpo recipe=online-demo.yaml

arXiv 2305.18290, eq. 7, and every other loss of TRL's trainer. The reference is the initial policy unless the recipe
names another one; under LoRA it is the base with the adapter disabled, without a second model in memory. With
`method.rounds` the pairs are scored answers of the policy itself: `preferences/iterative.py`.
"""

from __future__ import annotations

from align_cli.data import chat
from align_cli.model import load
from align_cli.preferences import dpo, iterative
from align_cli.recipe.preferences import DpoRecipe
from align_cli.training.datasets import datasets
from align_cli.training.job import Job, Outcome
from align_cli.training.loop import run_to_end


def run(job: Job[DpoRecipe]) -> Outcome:
    """Train, answer the samples before and after, save. Returns the metrics and the row counts."""
    recipe, data = job.recipe, job.recipe.data
    if recipe.method.rounds is not None:
        return iterative.run(job)
    tokenizer = load.tokenizer(recipe.model, job.base)
    args = dpo.arguments(job, **dpo.losses(recipe.method))

    def tokenized(groups, tally):
        limits = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
        return chat.dpo_rows(tokenizer, groups, how=recipe.method.pairs, **limits, tally=tally)

    rows = datasets(job, "preferences", tokenizer, {"pairs": recipe.method.pairs}, tokenized)
    return run_to_end(dpo.trainer(job, tokenizer, args, rows.train, rows.eval), tokenizer, job, rows.counts)
