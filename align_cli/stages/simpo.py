"""align simpo: simple preference optimization, -log σ(β(l̄p_w - l̄p_l) - γ), without a reference.

    align simpo recipe=demo.yaml

arXiv 2405.14734, eq. 6; l̄p is the mean log-probability per token. Recipes set γ/β, as the paper's table does. Other
losses can be added under `method.also`.
"""

from __future__ import annotations

from align_cli.preferences import run as preferences
from align_cli.recipe.preferences import SimpoRecipe
from align_cli.training.job import Job, Outcome


def run(job: Job[SimpoRecipe]) -> Outcome:
    """Train, answer the samples before and after, save. Returns the metrics and the row counts."""
    return preferences.train(job)
