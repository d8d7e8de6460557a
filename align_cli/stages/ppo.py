"""align ppo: maximise E[r(x, y)] - β·KL(π‖π_ref) with a value function and a clipped ratio.

    align ppo recipe=demo.yaml

InstructGPT, arXiv 2203.02155, eq. 2. The reward model's score is added to the last token, the KL penalty to every
token. The value function starts from the reward model and is saved next to the policy, in `value/`.
"""

from __future__ import annotations

from trl.trainer.utils import disable_dropout_in_model

from align_cli.data import chat
from align_cli.model import load
from align_cli.recipe.rl import PpoRecipe
from align_cli.rewards import prompts
from align_cli.rl import ptx, value
from align_cli.rl import run as online
from align_cli.rl.ppo import Critic, PPOConfig, PPOTrainer, Settings, SharedCritic, ValueHead
from align_cli.rl.returns import KLController
from align_cli.training import placement
from align_cli.training.job import Job, Outcome


def run(job: Job[PpoRecipe]) -> Outcome:
    """Alternate sampling, scoring and training; save policy and value function. Returns metrics and row counts."""
    recipe, method = job.recipe, job.recipe.method
    tokenizer = load.tokenizer(recipe.model, job.base)
    args = online.arguments(job, PPOConfig, num_generations=1, beta=0.0, loss_type="dapo")
    rows, counts = prompts.dataset(job, tokenizer)
    policy = placement.policy(job, tokenizer)
    load.set_ends(policy, chat.generation_ends(tokenizer))
    disable_dropout_in_model(policy)
    backbone = value.backbone(job, policy, args, load.new_tokens(tokenizer)) if recipe.lora else None
    critic = SharedCritic(backbone) if backbone else Critic(policy, value.model(job, tokenizer))
    trainer = PPOTrainer(
        model=backbone.model if backbone else policy,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=[online.total],
    )
    online.prepare(trainer, job, value.backbone_scorer(job, backbone) if backbone else None)
    trainer.prepare_ppo(
        critic=critic,
        reference=placement.scoring_reference(job, tokenizer, trainer, args.temperature),
        controller=KLController(method.beta, method.target_kl, method.horizon),
        settings=Settings(
            gamma=method.gamma,
            lam=method.lam,
            vf_coef=method.vf_coef,
            value_clip=method.value_clip,
            estimator=method.kl,
            whiten=method.whiten,
            ptx_coef=method.ptx_coef,
        ),
        ptx=ptx.batches(job, tokenizer, trainer) if method.ptx else None,
    )
    if backbone:
        trainer.add_callback(ValueHead(backbone))
    return online.run_to_end(trainer, tokenizer, job, counts, lambda: value.save(trainer, tokenizer, job))
