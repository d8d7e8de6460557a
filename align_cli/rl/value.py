"""The value function of PPO: initialisation, as a separate model or as an adapter on the shared backbone, and saving.

Shapes: b rows, t tokens, h heads.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align_cli import distributed
from align_cli.model import load, reward_head
from align_cli.model.lora import peft_config, trainable_whole
from align_cli.model.zero import gathered
from align_cli.recipe.rewards import RewardSource
from align_cli.recipe.rl import PpoRecipe
from align_cli.recipe.sections import Model
from align_cli.rewards.build import text_scorer
from align_cli.rewards.reward import Scorer
from align_cli.rl.backbone import POLICY, REWARD, VALUE, SharedBackbone
from align_cli.rl.ppo import Critic, PPOConfig, PPOTrainer, SharedCritic
from align_cli.training.checkpoints import finish
from align_cli.training.job import Job


def start(recipe: PpoRecipe) -> str | None:
    """The run whose weights initialise the value function; None for the policy's weights and a zero head."""
    reward = _reward_model(recipe)
    return recipe.value.path if recipe.value else reward and reward.path


def _reward_model(recipe: PpoRecipe) -> RewardSource | None:
    """The first reward that is a model; None if all rewards are functions."""
    return next((source for source in recipe.reward if source.path is not None), None)


def model(job: Job[PpoRecipe], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The value function as a separate model, initialised from a reward model, whose tokenizer must be the policy's, or
    from the policy with a zero head."""
    path = start(job.recipe)
    if path is not None:
        made = reward_head.load_run(path, tokenizer, job.dtype, trainable=True)
        return (trainable_whole(made) if isinstance(made, PeftModel) else made).train()
    made = reward_head.from_policy(job.recipe.model, tokenizer, dtype=job.dtype, seeds=[0], path=job.base)
    with gathered([made.score.weight], writing=True):
        made.score.weight.data.zero_()
    return made.to(distributed.device()).train()


def backbone(job: Job[PpoRecipe], base: PreTrainedModel, args: PPOConfig, new_tokens: list[str]) -> SharedBackbone:
    """Policy, reference, value function and reward model as adapters of one frozen model."""
    recipe, reward = job.recipe, _reward_model(job.recipe)
    adapter = peft_config(recipe.lora, new_tokens)
    return SharedBackbone(
        base,
        adapter,
        reward=reward and reward.path,
        value=start(recipe),
        checkpointing=args.gradient_checkpointing,
    )


def backbone_scorer(job: Job[PpoRecipe], backbone: SharedBackbone) -> Scorer | None:
    """A scorer that reads the reward adapter at the responses' ends; None if all rewards are functions."""
    source = _reward_model(job.recipe)
    if source is None:
        return None
    tokenizer = load.tokenizer(Model(path=source.path, chat_template=source.chat_template))

    def at_ends(inputs: dict[str, Tensor]) -> Tensor:
        with backbone.role(REWARD):
            scores = backbone.scores(REWARD, inputs["input_ids"], inputs["attention_mask"])
        return scores.gather(1, inputs["ends"].unsqueeze(2).expand(-1, -1, scores.shape[2]))

    return text_scorer(job, tokenizer, at_ends)


def save(trainer: PPOTrainer, tokenizer: PreTrainedTokenizerBase, job: Job[PpoRecipe]) -> None:
    """Save the policy into the run directory and the value function into `value/`."""
    critic = trainer.critic
    if isinstance(critic, SharedCritic):
        _save_adapters(trainer, critic.backbone, tokenizer, job)
        return
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    prefix = f"{Critic.PART}."
    if job.main:
        weights = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        critic.value_model.save_pretrained(job.run.path / "value", state_dict=weights)
        tokenizer.save_pretrained(job.run.path / "value")
    own = {key: tensor for key, tensor in (state or {}).items() if not key.startswith(prefix)}
    delattr(policy, Critic.PART)
    finish(trainer, tokenizer, job, state_dict=own)


def _save_adapters(
    trainer: PPOTrainer, backbone: SharedBackbone, tokenizer: PreTrainedTokenizerBase, job: Job[PpoRecipe]
) -> None:
    head, own = backbone.model.get_submodule(f"{VALUE}_head"), {}
    with gathered([*backbone.trained, *head.parameters()]), torch.no_grad():
        if job.main:
            backbone.save_value(job.run.path / "value", job.base)
            tokenizer.save_pretrained(job.run.path / "value")
            own = {
                name: tensor.detach().cpu().clone()
                for name, tensor in backbone.model.named_parameters()
                if f".{POLICY}." in name
            }
    backbone.policy_only()
    finish(trainer, tokenizer, job, state_dict=own)
