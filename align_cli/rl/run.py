"""Shared by the stages that sample during training: arguments, rewards, sampler, and the run from loop to save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from align_cli.data import chat
from align_cli.data.groups import Count
from align_cli.generation.sampling import Sampler
from align_cli.model import load
from align_cli.model.lora import peft_config
from align_cli.recipe.rl import OnlineRecipe
from align_cli.rewards import prompts
from align_cli.rewards.build import build, build_all
from align_cli.rewards.reward import Scorer
from align_cli.rl.ema import WeightAverage
from align_cli.rl.guards import GuardCallback, Guards
from align_cli.rl.rollouts import BetweenRollouts, GroupRollouts, Rollouts
from align_cli.training import placement
from align_cli.training.arguments import Arguments
from align_cli.training.arguments import arguments as training_arguments
from align_cli.training.checkpoints import finish
from align_cli.training.job import Job, Outcome
from align_cli.training.loop import loop
from align_cli.training.samples import Samples


def arguments(job: Job[OnlineRecipe], cls: type[Arguments], **own: Any) -> Arguments:
    """Training arguments of TRL's online trainers."""
    recipe = job.recipe
    method, generation = recipe.method, recipe.generation
    return training_arguments(
        cls,
        job,
        num_iterations=method.epochs,
        epsilon=method.clip,
        steps_per_generation=job.accumulation * method.minibatches,
        max_completion_length=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        use_vllm=generation.engine == "vllm",
        use_transformers_continuous_batching=generation.engine == "batched",
        shuffle_dataset=True,
        remove_unused_columns=False,
        # with dropout, the first policy ratio would not be 1
        disable_dropout=True,
        # "The N implementation details of RLHF with PPO": Adam's ε as in the original code
        adam_epsilon=recipe.trainer.get("adam_epsilon", 1e-5),
        **own,
    )


def total(**kwargs: Any) -> None:
    """Placeholder for TRL's required reward function: `Rollouts.reward` computes the recipe's rewards instead."""


def prepare(trainer: Rollouts, job: Job[OnlineRecipe], backbone: Scorer | None = None) -> None:
    """Give a trainer the recipe's rewards and sampler; `backbone` as in `build_all`."""
    recipe, place = job.recipe, placement.placing(trainer)
    method = recipe.method
    trainer.prepare_rollouts(
        rewards=build_all(job, place, backbone),
        sampler=Sampler.of(recipe.generation),
        missing_eos=method.missing_eos,
        length_penalty=method.length_penalty,
        gold=build(job, recipe.gold, "gold", place) if recipe.gold else None,
    )


def run_group(
    job: Job[OnlineRecipe], trainer_class: type[GroupRollouts], config_class: type[TrainingArguments], **own: Any
) -> Outcome:
    """Run RLOO or GRPO: alternate sampling K responses per prompt, scoring and training; save the policy. `own` are
    further fields of the trainer's config. Returns the metrics and the row counts."""
    recipe = job.recipe
    tokenizer = load.tokenizer(recipe.model, job.base)
    # with a β, TRL would load a reference of its own
    args = arguments(job, config_class, num_generations=recipe.method.k, beta=0.0, **own)
    rows, counts = prompts.dataset(job, tokenizer)
    policy = placement.policy(job, tokenizer)
    load.set_ends(policy, chat.generation_ends(tokenizer))
    trainer = trainer_class(
        model=policy,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=[total],
        peft_config=peft_config(recipe.lora, load.new_tokens(tokenizer)),
    )
    prepare(trainer, job)
    trainer.beta = recipe.method.beta
    if recipe.needs_reference():
        trainer.ref_model = placement.scoring_reference(job, tokenizer, trainer, args.temperature)
    return run_to_end(trainer, tokenizer, job, counts, lambda: finish(trainer, tokenizer, job))


def run_to_end(
    trainer: Rollouts,
    tokenizer: PreTrainedTokenizerBase,
    job: Job[OnlineRecipe],
    counts: list[Count],
    save: Callable[[], None],
) -> Outcome:
    """Answer the samples, train with guards, answer them again, and save."""
    samples = Samples(job, tokenizer)
    samples.answer(trainer, "before")
    guards = GuardCallback(Guards(job.recipe.guards, job.say), trainer)
    trainer.add_callback(guards)
    average = WeightAverage(job.recipe.method.ema, trainer) if job.recipe.method.ema else None
    if average:
        trainer.add_callback(average)
    between = BetweenRollouts(lambda: trainer.updates_per_rollout)
    metrics, stopped_by = loop(trainer, job, last=between)
    if stopped_by is None:
        rolled_back = guards.roll_back()
        if average and not rolled_back:
            average.put_in_place()
        samples.answer(trainer, "after")
        save()
    reason = guards.guards.reason
    return Outcome(metrics, counts, stopped_by, extra={"stopped_by_guard": reason} if reason else {})
