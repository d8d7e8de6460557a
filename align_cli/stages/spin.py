"""align spin: self-play fine-tuning, -log σ(β·[(log π/π_t)(human) - (log π/π_t)(own reply)]), π_t the previous iterate.

    align spin recipe=demo.yaml

arXiv 2401.01335, eq. 4.7. Iteration t generates replies to the demonstrations' prompts with the current model and
trains it to prefer the human replies over its own of iterations t and t-1: `preferences/spin.py`.
"""

from __future__ import annotations

from align_cli.preferences import spin
from align_cli.recipe.preferences import SpinRecipe
from align_cli.training.job import Job, Outcome


def run(job: Job[SpinRecipe]) -> Outcome:
    """Run all iterations. Returns the last one's metrics and the row counts."""
    return spin.run(job)
