"""align sft: supervised fine-tuning, mean -log p over response tokens (InstructGPT, arXiv 2203.02155).

    align sft recipe=demo.yaml

Differs from TRL's defaults: conversations are trained on the assistant's turns only, not on every token, and
truncated and dropped rows are counted. `align cai` trains on its revisions in the same way.
"""

from __future__ import annotations

from align_cli.recipe.supervised import SftRecipe
from align_cli.training import supervised
from align_cli.training.job import Job, Outcome


def run(job: Job[SftRecipe]) -> Outcome:
    """Train, answer the samples before and after, save. Returns the metrics and the row counts."""
    method = job.recipe.method
    return supervised.run(job, packing=method.packing, last_turn_only=method.train_on == "last-turn")
