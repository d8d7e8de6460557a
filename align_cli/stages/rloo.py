"""align rloo: REINFORCE with the other samples of a prompt as baseline, A_i = R_i - mean of the other K-1.

    align rloo recipe=demo.yaml

arXiv 2402.14740, on TRL's trainer, with the rewards, sampling, guards and checkpoints of `align ppo`. No value function
is held; the KL to the reference is taken off the score of the whole response.
"""

from __future__ import annotations

from trl import RLOOConfig

from align_cli.data import chat
from align_cli.methods.rloo import GroupTrainer
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
        RLOOConfig,
        num_generations=method.k,
        beta=method.beta,
        normalize_advantages=method.normalize_advantages,
    )
    rows, counts = online.prompts(job, tokenizer)
    policy = load.policy(recipe.model, tokenizer, dtype=job.dtype, path=job.base)
    set_ends(policy, chat.generation_ends(tokenizer))
    trainer = GroupTrainer(
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
