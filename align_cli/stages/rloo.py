"""align rloo: REINFORCE with the other samples of a prompt as baseline, A_i = R_i - mean of the other K-1.

    align rloo recipe=demo.yaml

arXiv 2402.14740, on TRL's trainer, with the rewards, sampling, guards and checkpoints of `align ppo`. It has no
value function; the KL to the reference is subtracted from the score of the whole response.
"""

from __future__ import annotations

from trl import RLOOConfig

from align_cli.recipe.rl import RlooRecipe
from align_cli.rl.rloo import RlooTrainer
from align_cli.rl.run import run_group
from align_cli.training.job import Job, Outcome


def run(job: Job[RlooRecipe]) -> Outcome:
    """Alternate sampling, scoring and training; save the policy. Returns the metrics and the row counts."""
    method = job.recipe.method
    return run_group(
        job,
        RlooTrainer,
        RLOOConfig,
        normalize_advantages=method.normalize_advantages,
    )
