"""align ppo: maximise E[r(x, y)] - β·KL(π‖π_ref) with a value function and a clipped ratio.

    align ppo recipe=demo.yaml

InstructGPT, arXiv 2203.02155, eq. 2. The reward model's score lands on the last token, the KL on every one; the value
function starts from the reward model and is saved beside the policy, in `value/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from trl.trainer.utils import disable_dropout_in_model

from align_cli.data import chat
from align_cli.data.groups import read_groups
from align_cli.methods.ppo import Critic, PPOConfig, PPOTrainer, Settings, SharedCritic, ValueHead
from align_cli.methods.returns import KLController
from align_cli.model import load, reward
from align_cli.model.load import set_ends
from align_cli.model.lora import peft_config
from align_cli.model.shared import POLICY, REWARD, VALUE, SharedBackbone
from align_cli.recipe.schema import PpoRecipe
from align_cli.recipe.sections import Model
from align_cli.stages import online, training
from align_cli.stages.job import Job, Outcome, fold_in


def run(job: Job) -> Outcome:
    """Sample, score, train, in turn; save policy and value function. Returns the metrics and the row counts."""
    recipe, method = job.recipe, job.recipe.method
    tokenizer = load.tokenizer(recipe.model, job.base)
    args = online.arguments(job, PPOConfig, num_generations=1, beta=0.0, loss_type="dapo")
    rows, counts = online.prompts(job, tokenizer)
    policy = load.policy(recipe.model, tokenizer, dtype=job.dtype, path=job.base)
    set_ends(policy, chat.generation_ends(tokenizer))
    disable_dropout_in_model(policy)
    backbone = _backbone(job, policy, args, load.new_tokens(tokenizer)) if recipe.lora else None
    critic = SharedCritic(backbone) if backbone else Critic(policy, _value_model(job, tokenizer))
    trainer = PPOTrainer(
        model=backbone.model if backbone else policy,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=[online.total],
    )
    online.prepare(trainer, job, _shared_scorer(job, backbone) if backbone else None)
    trainer.prepare_ppo(
        critic=critic,
        reference=None if backbone else online.reference(job, tokenizer, trainer, args.temperature),
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
        ptx=_ptx(job, tokenizer, trainer) if method.ptx else None,
    )
    if backbone:
        trainer.add_callback(ValueHead(backbone))
    return online.run_to_end(trainer, tokenizer, job, counts, lambda: _save(trainer, tokenizer, job))


def _backbone(job: Job, base: Any, args: PPOConfig, new_tokens: list[str]) -> SharedBackbone:
    """Policy, reference, value function and reward model as adapters of one frozen model."""
    recipe = job.recipe
    adapter = peft_config(recipe.lora, new_tokens)
    backbone = SharedBackbone(base, adapter, reward=_rewarding(recipe), value=_valuing(recipe))
    if args.gradient_checkpointing:
        backbone.model.enable_input_require_grads()
    return backbone


def _rewarding(recipe: PpoRecipe) -> str | None:
    """The first reward model's run; None where rewards are functions."""
    return next((source.path for source in recipe.reward if source.path is not None), None)


def _valuing(recipe: PpoRecipe) -> str | None:
    """The run whose weights the value function starts from; None for the policy's own and a head of zeros."""
    return recipe.value.path if recipe.value else _rewarding(recipe)


def _shared_scorer(job: Job, backbone: SharedBackbone) -> Any:
    """Scores of the reward adapter at the responses' ends, or None where rewards are functions."""
    source = next((source for source in job.recipe.reward if source.path is not None), None)
    if source is None:
        return None
    tokenizer = load.tokenizer(Model(path=source.path, chat_template=source.chat_template))

    def at_ends(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with backbone.role(REWARD):
            scores = backbone.scores(REWARD, inputs["input_ids"], inputs["attention_mask"])
        return scores.gather(1, inputs["ends"].unsqueeze(2).expand(-1, -1, scores.shape[2]))

    return online.text_scorer(job, tokenizer, at_ends)


def _value_model(job: Job, tokenizer: Any) -> Any:
    """The value function, as the reward model it starts from, whose tokenizer must be the policy's; or as the policy
    with a head of zeros."""
    path = _valuing(job.recipe)
    if path is not None:
        return reward.load_run(path, tokenizer, job.dtype).train()
    model = reward.from_policy(job.recipe.model, tokenizer, dtype=job.dtype, seeds=[0], path=job.base)
    with reward.whole(model.score.weight):
        model.score.weight.data.zero_()
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train()


def _ptx(job: Job, tokenizer: Any, trainer: PPOTrainer) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of demonstrations, chosen by the update's number, so that a resumed run sees the same."""
    data = job.recipe.data
    read = read_groups(replace(data, train=[job.recipe.method.ptx], eval=None), "demonstrations", 0)
    tally = chat.Tally()
    rows = list(chat.sft_rows(tokenizer, read.train, max_length=data.max_length, last_turn_only=False, tally=tally))
    for line in fold_in(read.counts, tally, data.max_dropped):
        job.say(line)
    draw = torch.Generator()
    while True:
        draw.manual_seed(job.recipe.seed * 1_000_003 + trainer.state.global_step * 4099 + trainer._step % 4099)
        picked = torch.randint(len(rows), (job.per_device * job.ranks,), generator=draw).tolist()
        mine = [rows[at] for at in picked[job.rank * job.per_device : (job.rank + 1) * job.per_device]]
        t = max(len(row["input_ids"]) for row in mine)
        ids = torch.tensor([row["input_ids"] + [tokenizer.pad_token_id] * (t - len(row["input_ids"])) for row in mine])
        labels = torch.tensor([row["labels"] + [chat.IGNORED] * (t - len(row["labels"])) for row in mine])
        seen = torch.tensor([[1] * len(row["input_ids"]) + [0] * (t - len(row["input_ids"])) for row in mine])
        device = trainer.accelerator.device
        yield {"input_ids": ids.to(device), "attention_mask": seen.to(device), "labels": labels.to(device)}


def _save(trainer: PPOTrainer, tokenizer: Any, job: Job) -> None:
    """The policy at the run's root, the value function in `value/`."""
    critic = trainer.critic
    if isinstance(critic, SharedCritic):
        backbone, own = critic.backbone, {}
        head = backbone.model.get_submodule(f"{VALUE}_head")
        with reward.whole(*backbone.trained, *head.parameters()):
            if job.main:
                backbone.save_value(job.run.path / "value", job.base)
                tokenizer.save_pretrained(job.run.path / "value")
                own = {
                    name: tensor.detach().cpu().clone()
                    for name, tensor in backbone.model.named_parameters()
                    if f".{POLICY}." in name
                }
        backbone.policy_only()
        training.finish(trainer, tokenizer, job, state_dict=own)
        return
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    prefix = f"{Critic.PART}."
    if job.main:
        value = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        critic.value_model.save_pretrained(job.run.path / "value", state_dict=value)
        tokenizer.save_pretrained(job.run.path / "value")
    own = {key: tensor for key, tensor in (state or {}).items() if not key.startswith(prefix)}
    delattr(policy, Critic.PART)
    training.finish(trainer, tokenizer, job, state_dict=own)
