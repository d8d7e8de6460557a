"""align grpo: group-relative policy optimization, A_i = (R_i - mean of the K) / their standard deviation.

    align grpo recipe=demo.yaml

arXiv 2402.03300, eq. 3, on TRL's trainer, with the rewards, sampling, guards and checkpoints of `align ppo`. The KL to
the reference stands in the loss (k3), not in the reward. Rewards are reward models, or checks of an answer against a
column of the data (`reward: { verify: { kind: numeric, column: answer } }`).
"""

from __future__ import annotations

from trl import GRPOConfig

from align_cli.data import chat
from align_cli.methods.grpo import RelativeTrainer
from align_cli.model import load
from align_cli.model.load import set_ends
from align_cli.model.lora import peft_config
from align_cli.stages import online, training
from align_cli.stages.job import Job, Outcome


def run(job: Job) -> Outcome:
    """Sample, score, train, in turn; save the policy. Returns the metrics and the row counts."""
    recipe, method = job.recipe, job.recipe.method
    tokenizer = load.tokenizer(recipe.model, job.base)
    args = online.arguments(
        job,
        GRPOConfig,
        num_generations=method.k,
        beta=method.beta,
        epsilon_high=method.clip_high,
        loss_type=method.loss.replace("-", "_"),
        scale_rewards=method.scale_rewards,
    )
    rows, counts = online.prompts(job, tokenizer)
    policy = load.policy(recipe.model, tokenizer, dtype=job.dtype, path=job.base)
    set_ends(policy, chat.generation_ends(tokenizer))
    trainer = RelativeTrainer(
        model=policy,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=[online.total],
        peft_config=peft_config(recipe.lora),
    )
    online.prepare(trainer, job)
    if job.reference is not None:
        trainer.ref_model = online.reference(job, tokenizer, trainer, args.temperature)
    return online.run_to_end(trainer, tokenizer, job, counts, lambda: training.finish(trainer, tokenizer, job))
