"""The table of stages: the constants of each stage, importable without pydantic or torch.

It is read by the command line, the schema, the `trainer:` block, preflight, the plan and the batch arithmetic. What
depends on a recipe's settings is a method of its settings class (`sections.Recipe` lists them). To add a stage, add a
settings class, a line to STAGES and `stages/<name>.py`; CONTRIBUTING.md has an example.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from align_cli.recipe.sections import Recipe

RowKind = Literal["demonstrations", "preferences", "labels", "prompts"]
"""Content of a row: prompt and response, ranked responses, responses labelled good or bad, or a prompt only."""
Unit = Literal["rows", "prompts", "pairs", "episodes"]

Owned = Mapping[str, str | None]
"""Field of a TRL config -> the recipe key that sets it, or None if the run sets it."""


@dataclass(frozen=True)
class TrlConfig:
    """A TRL config class and the file that defines it; None for transformers' own TrainingArguments."""

    name: str
    file: str | None


@dataclass(frozen=True)
class Role:
    """A model that a stage loads."""

    name: Literal["policy", "reference", "reward", "value", "gold"]
    trained: bool = False
    precision: Literal["model", "scorer"] = "model"
    """model: `model.dtype`; scorer: bfloat16 on a GPU that multiplies it, else float32."""


POLICY = Role("policy", trained=True)
REFERENCE = Role("reference")
VALUE = Role("value", trained=True)
REWARD = Role("reward", precision="scorer")
GOLD = Role("gold", precision="scorer")


@dataclass(frozen=True)
class StageSpec:
    """The constants of a stage."""

    name: str
    help: str
    """One line for `align --help`."""
    settings: str
    """`module:class` of its recipe, under align_cli.recipe; imported on first use."""
    rows: RowKind
    """Default kind of the rows of data.train (`Recipe.row_kind` may differ)."""
    config: TrlConfig
    """The config whose fields `trainer:` may set."""
    models: tuple[Role, ...]
    """Models it may load; `Recipe.copies` gives the number of each."""
    unit: Unit
    """Unit of data.batch_size."""
    owned: Owned = field(default_factory=dict)
    """Fields of `config` that are set by other keys, in addition to OWNED."""

    @property
    def recipe(self) -> type[Recipe]:
        """The settings class."""
        module, _, name = self.settings.partition(":")
        return getattr(importlib.import_module(f"align_cli.recipe.{module}"), name)


OWNED: Owned = {
    "output_dir": "run_dir",
    "seed": "seed",
    "data_seed": "seed",
    "max_length": "data.max_length",
    "deepspeed": "zero",
    "fsdp": "zero",
    "model_init_kwargs": "model",
    "trust_remote_code": "model.trust_remote_code",
    "do_eval": "data.eval",
    "do_train": None,
    "do_predict": None,
    "resume_from_checkpoint": None,
    "load_best_model_at_end": None,
    "remove_unused_columns": None,
    "push_to_hub": None,
    "padding_free": None,
}
"""Fields shared by the configs of all stages that are set by other keys."""

# to resume exactly, a moving reference would have to be saved in every checkpoint
_FIXED_REFERENCE: Owned = {"sync_ref_model": None, "ref_model_mixup_alpha": None, "ref_model_sync_steps": None}

_SFT: Owned = {
    "chat_template_path": "model.chat_template",
    "dataset_kwargs": None,
    "eval_packing": None,
    "shuffle_dataset": None,
}
_SAMPLING: Owned = {
    **_FIXED_REFERENCE,
    "num_iterations": "method.epochs",
    "beta": "method.beta",
    "epsilon": "method.clip",
    "generation_batch_size": "data.batch_size",
    "steps_per_generation": "method.minibatches",
    "max_completion_length": "generation.max_new_tokens",
    "temperature": "generation.temperature",
    "top_p": "generation.top_p",
    "top_k": "generation.top_k",
    "use_vllm": "generation.engine",
    "use_transformers_continuous_batching": "generation.engine",
    "use_transformers_paged": "generation.engine",
    "reward_weights": "reward",
    "shuffle_dataset": None,
    "disable_dropout": None,
    "num_generations_eval": None,
    "log_completions": None,
}
_PAIR_LOSSES: Owned = {
    # micro-batches are limited by tokens, not by rows
    "per_device_eval_batch_size": "method.batch_tokens",
    "auto_find_batch_size": "method.batch_tokens",
    "label_smoothing_factor": "method.label_smoothing",
}
_DPO: Owned = {
    **_FIXED_REFERENCE,
    "beta": "method.beta",
    "precompute_ref_log_probs": "method.precompute_reference",
    "truncation_mode": None,
}

_SFT_CONFIG = TrlConfig("SFTConfig", "trainer/sft_config.py")
_DPO_CONFIG = TrlConfig("DPOConfig", "trainer/dpo_config.py")
_GRPO_CONFIG = TrlConfig("GRPOConfig", "trainer/grpo_config.py")
_TRAINING_ARGUMENTS = TrlConfig("TrainingArguments", None)

_SPECS = (
    StageSpec(
        name="sft",
        help="Supervised fine-tuning on conversations.",
        settings="supervised:SftRecipe",
        rows="demonstrations",
        config=_SFT_CONFIG,
        models=(POLICY,),
        unit="rows",
        owned=_SFT
        | {
            "packing": "method.packing",
            "completion_only_loss": "method.train_on",
            "assistant_only_loss": "method.train_on",
            "dataset_text_field": "data.train",
        },
    ),
    StageSpec(
        name="rm",
        help="Train a reward model on rankings.",
        settings="reward_model:RmRecipe",
        rows="preferences",
        config=TrlConfig("RewardConfig", "trainer/reward_config.py"),
        models=(POLICY,),
        unit="prompts",
        owned={
            "center_rewards_coefficient": "method.center",
            "chat_template_path": "model.chat_template",
            "per_device_eval_batch_size": "method.batch_tokens",
            "auto_find_batch_size": "method.batch_tokens",
            "activation_offloading": None,
            "dataset_num_proc": None,
            "eos_token": None,
            "pad_token": None,
            "pad_to_multiple_of": None,
        },
    ),
    StageSpec(
        name="ppo",
        help="Reinforcement learning from a reward model, with a value function and a KL penalty to the reference.",
        settings="rl:PpoRecipe",
        rows="prompts",
        config=_GRPO_CONFIG,
        models=(POLICY, VALUE, REFERENCE, REWARD, GOLD),
        unit="episodes",
        owned=_SAMPLING
        | {
            "num_generations": None,
            "loss_type": None,
            "scale_rewards": None,
            "multi_objective_aggregation": None,
            "importance_sampling_level": None,
        },
    ),
    StageSpec(
        name="rloo",
        help="Reinforcement learning from a reward model, with the prompt's other samples as baseline.",
        settings="rl:RlooRecipe",
        rows="prompts",
        config=TrlConfig("RLOOConfig", "trainer/rloo_config.py"),
        models=(POLICY, REFERENCE, REWARD, GOLD),
        unit="episodes",
        owned=_SAMPLING
        | {
            "num_generations": "method.k",
            "normalize_advantages": "method.normalize_advantages",
            "reward_clip_range": "reward",
        },
    ),
    StageSpec(
        name="grpo",
        help="Reinforcement learning from reward models or verifiable rewards, normalised over a prompt's samples.",
        settings="rl:GrpoRecipe",
        rows="prompts",
        config=_GRPO_CONFIG,
        models=(POLICY, REFERENCE, REWARD, GOLD),
        unit="episodes",
        owned=_SAMPLING
        | {
            "num_generations": "method.k",
            "epsilon_high": "method.clip_high",
            "loss_type": "method.loss",
            "scale_rewards": "method.scale_rewards",
            "multi_objective_aggregation": None,
        },
    ),
    StageSpec(
        name="dpo",
        help="Direct preference optimization on pairs or rankings, or in rounds on the policy's own answers.",
        settings="preferences:DpoRecipe",
        rows="preferences",
        config=_DPO_CONFIG,
        models=(POLICY, REFERENCE),
        unit="pairs",
        owned=_DPO
        | {
            "loss_type": "method.loss",
            "loss_weights": "method.loss_weights",
            "label_smoothing": "method.label_smoothing",
        },
    ),
    StageSpec(
        name="spin",
        help="Self-play fine-tuning: iterated DPO that prefers human replies to the model's own.",
        settings="preferences:SpinRecipe",
        rows="demonstrations",
        config=_DPO_CONFIG,
        models=(POLICY, REFERENCE),
        unit="pairs",
        owned=_DPO | {"loss_type": None, "loss_weights": None, "label_smoothing": None},
    ),
    StageSpec(
        name="orpo",
        help="Odds ratio preference optimization: no reference model and no prior SFT stage.",
        settings="preferences:OrpoRecipe",
        rows="preferences",
        config=_TRAINING_ARGUMENTS,
        models=(POLICY, REFERENCE),
        unit="pairs",
        owned=_PAIR_LOSSES | {"label_smoothing_factor": None},
    ),
    StageSpec(
        name="simpo",
        help="Simple preference optimization: length-normalised, no reference model; supports mixtures of losses.",
        settings="preferences:SimpoRecipe",
        rows="preferences",
        config=_TRAINING_ARGUMENTS,
        models=(POLICY, REFERENCE),
        unit="pairs",
        owned=_PAIR_LOSSES,
    ),
    StageSpec(
        name="kto",
        help="Kahneman-Tversky optimization on responses labelled good or bad.",
        settings="preferences:KtoRecipe",
        rows="labels",
        config=TrlConfig("KTOConfig", "trainer/kto_config.py"),
        models=(POLICY, REFERENCE),
        unit="rows",
        owned={
            **_FIXED_REFERENCE,
            "loss_type": "method.loss",
            "beta": "method.beta",
            "desirable_weight": "method.desirable_weight",
            "undesirable_weight": "method.undesirable_weight",
            "train_sampling_strategy": None,
            # TRL caches them in a separate file per rank
            "precompute_ref_log_probs": None,
            "precompute_ref_batch_size": None,
        },
    ),
    StageSpec(
        name="cai",
        help="Constitutional AI: critiques and revisions, training on them, and preference labels from AI feedback.",
        settings="constitutional:CaiRecipe",
        rows="prompts",
        config=_SFT_CONFIG,
        models=(POLICY,),
        unit="rows",
        owned=_SFT
        | {"packing": None, "completion_only_loss": None, "assistant_only_loss": None, "dataset_text_field": None},
    ),
)

STAGES: dict[str, StageSpec] = {spec.name: spec for spec in _SPECS}
"""Name -> stage, in the order of `align --help`."""
