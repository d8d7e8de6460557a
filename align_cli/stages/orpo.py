"""align orpo: odds ratio preference optimization, NLL(chosen) - α·log σ(log-odds), without a reference.

    align orpo recipe=demo.yaml

arXiv 2403.07691, eq. 6, 7. log-odds = (l̄p_w - l̄p_l) - (log(1 - e^l̄p_w) - log(1 - e^l̄p_l)), in float32. The NLL is over
the chosen response's tokens, as in the paper; TRL's trainer includes the prompt's tokens.
"""

from __future__ import annotations

from align_cli.preferences import run as preferences
from align_cli.recipe.preferences import OrpoRecipe
from align_cli.training.job import Job, Outcome


def run(job: Job[OrpoRecipe]) -> Outcome:
    """Train, answer the samples before and after, save. Returns the metrics and the row counts."""
    return preferences.train(job)
