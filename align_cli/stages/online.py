"""What stages that sample share: prompts, reward models, the sampler, and the end of a run."""

from __future__ import annotations

import json
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.models import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

from align_cli.data import chat
from align_cli.data.groups import Count, Group, read_groups
from align_cli.data.template import packed
from align_cli.errors import DataError, UpstreamError, raise_all
from align_cli.methods import layout, verify
from align_cli.methods.average import Average
from align_cli.methods.guards import Guards
from align_cli.methods.rollouts import BetweenRollouts, Reward
from align_cli.methods.sampling import Sampler
from align_cli.model import function, kind, load, reward
from align_cli.model.lora import peft_config
from align_cli.recipe.rewards import RewardSource, reward_keys
from align_cli.recipe.schema import OnlineRecipe
from align_cli.recipe.sections import Data, Model
from align_cli.stages import training
from align_cli.stages.job import Job, Outcome, fold_in
from align_cli.stages.judging import Judging
from align_cli.stages.samples import Samples

SCORED_TOKENS = 8192
"""Tokens that go through a reward model at a time."""


def arguments(job: Job, cls: type, **own: Any) -> Any:
    """Training arguments of TRL's online trainers."""
    recipe: OnlineRecipe = job.recipe
    method, generation = recipe.method, recipe.generation
    return training.arguments(
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
        # dropout would make the first ratio differ from 1
        disable_dropout=True,
        # "The N implementation details of RLHF with PPO": Adam's ε as in the original code
        adam_epsilon=recipe.trainer.get("adam_epsilon", 1e-5),
        **own,
    )


def prompts(job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, list[Count]]:
    """Rows of `prompt` messages that leave room for a response, with the cells that rewards compare with, and the row
    counts, which are printed too. Raises DataError for a cell that nothing can be compared with."""
    groups, counts = prompt_groups(job, tokenizer, job.recipe.data)
    rows = [{"prompt": packed(group.prompt, group.tools)} | cells(job, group) for group in groups]
    return Dataset.from_list(rows), counts


def prompt_groups(job: Job, tokenizer: PreTrainedTokenizerBase, data: Data) -> tuple[list[Group], list[Count]]:
    """As `prompts`, for any data section and before they are a dataset."""
    checks = [source.verify for source in getattr(job.recipe, "reward", ()) if source.verify]
    columns = list(dict.fromkeys(check.column for check in checks))
    groups, tally = read_groups(data, "prompts", job.recipe.seed, columns), chat.Tally()
    found = [
        (group.place, check, verify.problem(check.kind, group.cells[check.column]))
        for check in checks
        for group in groups.train
    ]
    raise_all(
        DataError, [f"{place}: '{check.column}' {said}; mend the row" for place, check, said in found if said][:20]
    )
    kept = leaving_room(job, tokenizer, groups.train, tally)
    for line in fold_in(groups.counts, tally, data.max_dropped):
        job.say(line)
    return kept, groups.counts


def cells(job: Job, group: Group) -> dict[str, str]:
    """What rewards compare a prompt's responses with, as text, since a column of a dataset has one type."""
    columns = dict.fromkeys(source.verify.column for source in getattr(job.recipe, "reward", ()) if source.verify)
    return {cell(name): json.dumps(group.cells[name]) for name in columns}


def leaving_room(job: Job, tokenizer: PreTrainedTokenizerBase, groups: list[Group], tally: chat.Tally) -> list[Group]:
    """The groups whose prompt leaves room for a response; the others are counted into `tally`."""
    data, kept = job.recipe.data, []
    limit = data.max_prompt_length or data.max_length - job.recipe.generation.max_new_tokens
    for group in groups:
        try:
            length = len(chat.prompt_ids(tokenizer, group.prompt, group.tools))
        except chat.Unrenderable as error:
            tally.drop(group, str(error))
            continue
        if length > limit:
            tally.drop(group, f"prompt over {limit} tokens")
            continue
        kept.append(group)
    return kept


def rewards(job: Job, prepare: Any, shared: Any = None) -> tuple[list[Reward], Reward | None]:
    """The recipe's rewards, and its gold reward if it names one. `prepare(model)` shards or places a frozen model;
    `shared` is the scorer of a backbone that plays the reward model itself."""
    recipe: OnlineRecipe = job.recipe
    keyed = zip(recipe.reward, reward_keys(len(recipe.reward)), strict=True)
    found = [_reward(job, source, prepare, shared, key) for source, key in keyed]
    return found, _reward(job, recipe.gold, prepare) if recipe.gold else None


def _reward(job: Job, source: RewardSource, prepare: Any, shared: Any = None, key: str = "") -> Reward:
    settings = {"weight": source.weight, "aggregate": source.aggregate, "k": source.k, "clip": source.clip}
    if source.verify:
        check = verify.verifier(source.verify.kind, source.verify.extract)
        return Reward(_checked(check), cell=cell(source.verify.column), **settings)
    if source.judge:
        return Reward(Judging(job, source, key), **settings)
    if source.python:
        return Reward(function_scorer(source.python), **settings)
    scale = kind.manifest(source.path).get("reward", {}) if source.normalize else {}
    return Reward(
        shared or scorer(job, Model(path=source.path, chat_template=source.chat_template), prepare),
        mean=torch.tensor([0.0] if scale.get("shift_in_weights") else scale.get("mean", [0.0])),
        std=torch.tensor(scale.get("std", [1.0])).clamp(min=1e-6),
        **settings,
    )


def function_scorer(entry: str) -> Any:
    """(prompts, texts) -> (b, 1) scores of a Python function. Raises UpstreamError if it gives anything else."""
    call = function.load(entry)

    def score(asked: list[Any], texts: list[str]) -> torch.Tensor:
        try:
            given = torch.as_tensor(call(asked, texts), dtype=torch.float32).cpu()
        except Exception as error:  # whatever a stranger's function raises is the user's to mend
            raise UpstreamError(f"{entry}: raised {type(error).__name__}: {error}") from error
        if given.shape != (len(texts),) or not given.isfinite().all():
            found = f"shape {tuple(given.shape)}" if given.shape != (len(texts),) else "numbers that are not finite"
            raise UpstreamError(f"{entry}: gave {found} for {len(texts)} responses; give one finite number each")
        return given.unsqueeze(1)

    return score


def cell(column: str) -> str:
    """What a column of the data is called in a trainer's rows, whose own names it must not take."""
    return f"cell_{column}"


def _checked(check: Any) -> Any:
    """(wanted cells, texts) -> (b, 1) rewards."""
    return lambda wanted, texts: torch.tensor(check(wanted, texts)).unsqueeze(1)


def scorer(job: Job, named: Model, prepare: Any) -> Any:
    """(prompts, texts) -> (b, h) scores of the named reward model, through its own tokenizer and template."""
    tokenizer = load.tokenizer(named)
    model = prepare(reward.load_run(named.path, tokenizer, "bfloat16" if torch.cuda.is_available() else "float32"))

    def at_ends(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**inputs)

    return text_scorer(job, tokenizer, at_ends)


def text_scorer(job: Job, tokenizer: Any, at_ends: Any) -> Any:
    """(prompts, texts) -> (b, h) scores; `at_ends` gives the (n, 1, h) scores of a packed micro-batch."""
    max_length = job.recipe.data.max_length

    @torch.no_grad()
    def score(asked: list[Any], texts: list[str]) -> torch.Tensor:
        rows = []
        for prompt, text in zip(asked, texts, strict=True):
            # a response that says nothing still ends its turn
            group = Group(prompt, [[{"role": "assistant", "content": text or " "}]])
            try:
                ids, (answer,) = chat.responses(tokenizer, group)
            except chat.Unrenderable as error:
                raise UpstreamError(f"reward: {tokenizer.name_or_path}: {error}; set its chat_template") from None
            rows.append({"prompt_ids": ids, "responses": [answer[: max(max_length - len(ids), 1)]]})
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = layout.scored(
            rows,
            at_ends,
            tokenizer.pad_token_id,
            tokens=SCORED_TOKENS,
            device=device,
            even=lambda parts: _even(parts, job.ranks, device),
        )
        return torch.cat(found)

    return score


def _even(parts: list[list[int]], ranks: int, device: str) -> list[list[int]]:
    """As many micro-batches on every rank, since each forward pass of ZeRO-3 is a collective."""
    if ranks == 1:
        return parts
    most = torch.tensor([len(parts)], device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return parts + [parts[-1]] * (int(most) - len(parts))


def total(**kwargs: Any) -> None:
    """TRL's reward function in name only: `Rollouts._calculate_rewards` puts the recipe's rewards in its place."""


def prepare(trainer: Any, job: Job, shared: Any = None) -> None:
    """Give a trainer the recipe's rewards and sampler; `shared` as in `rewards`."""
    found, gold = rewards(job, placing(trainer), shared)
    asked, method = job.recipe.generation, job.recipe.method
    trainer.prepare_rollouts(
        rewards=found,
        sampler=Sampler(asked.max_new_tokens, asked.temperature, asked.top_p, asked.top_k, asked.batch),
        missing_eos=method.missing_eos,
        length_penalty=method.length_penalty,
        gold=gold,
    )


def frozen(model: Any) -> Any:
    """The model without gradients or dropout."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def placing(trainer: Any) -> Any:
    """A function that places a frozen model as the trainer places its own: sharded under ZeRO-3."""

    def placed(model: Any) -> Any:
        if trainer.is_deepspeed_enabled:
            return prepare_deepspeed(model, trainer.accelerator)
        return trainer.accelerator.prepare_model(model, evaluation_mode=True)

    return placed


def reference(job: Job, tokenizer: PreTrainedTokenizerBase, trainer: Any, temperature: float) -> Any:
    """The frozen reference, ready to give log-probabilities of sampled tokens."""
    model = load.policy(job.recipe.model, tokenizer, dtype=job.dtype, path=job.reference or job.base)
    add_fused_lm_head(model, temperature=temperature)
    return placing(trainer)(frozen(model))


def run_group(job: Job, trainer_class: type, config_class: type, **own: Any) -> Outcome:
    """RLOO and GRPO: sample K responses a prompt, score, train, in turn; save the policy. `own` are further fields of
    the trainer's config. Returns the metrics and the row counts."""
    recipe = job.recipe
    tokenizer = load.tokenizer(recipe.model, job.base)
    args = arguments(job, config_class, num_generations=recipe.method.k, beta=recipe.method.beta, **own)
    rows, counts = prompts(job, tokenizer)
    policy = load.policy(recipe.model, tokenizer, dtype=job.dtype, path=job.base)
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
    if job.reference is not None:
        trainer.ref_model = reference(job, tokenizer, trainer, args.temperature)
    return run_to_end(trainer, tokenizer, job, counts, lambda: training.finish(trainer, tokenizer, job))


def run_to_end(trainer: Any, tokenizer: PreTrainedTokenizerBase, job: Job, counts: list[Count], finish: Any) -> Outcome:
    """Samples before, the loop under guards, samples after, the save."""
    samples = Samples(job, tokenizer)
    samples.answer(trainer, "before")
    guards = Guards(job.recipe.guards, trainer, job.say)
    trainer.add_callback(guards)
    average = Average(job.recipe.method.ema, trainer) if job.recipe.method.ema else None
    if average:
        trainer.add_callback(average)
    between = BetweenRollouts(lambda: trainer.updates_per_rollout)
    metrics, stopped_by = training.loop(trainer, job, last=between)
    if stopped_by is None:
        rolled_back = guards.roll_back()
        if average and not rolled_back:
            average.put_in_place()
        samples.answer(trainer, "after")
        finish()
    reason = {"stopped_by_guard": guards.reason} if guards.reason else {}
    return Outcome(metrics, counts, stopped_by, extra=reason)
