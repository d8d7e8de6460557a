"""align grpo: group-relative policy optimization, A_i = (R_i - mean of the K) / their standard deviation.

    align grpo recipe=demo.yaml

arXiv 2402.03300, eq. 3, on TRL's trainer, with the rewards, sampling, guards and checkpoints of `align ppo`. The KL to
the reference is a term of the loss (k3), not of the reward. Rewards are reward models, or checks of an answer against a
column of the data (`reward: { verify: { kind: numeric, column: answer } }`).
"""

from __future__ import annotations

from trl import GRPOConfig

from align_cli.recipe.rl import GrpoRecipe
from align_cli.rl.grpo import GrpoTrainer
from align_cli.rl.run import run_group
from align_cli.training.job import Job, Outcome


def run(job: Job[GrpoRecipe]) -> Outcome:
    """Alternate sampling, scoring and training; save the policy. Returns the metrics and the row counts."""
    method = job.recipe.method
    return run_group(
        job,
        GrpoTrainer,
        GRPOConfig,
        epsilon_high=method.clip_high,
        loss_type=method.loss.replace("-", "_"),
        scale_rewards=method.scale_rewards,
    )
