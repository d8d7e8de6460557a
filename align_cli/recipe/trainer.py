"""The `trainer:` block against the fields of the stage's TRL config, read from its source without importing it.

Importing a TRL config takes five seconds and torch with it; its dataclass fields are plain text in three files. The
answer is for the installed version by construction.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from align_cli.errors import did_you_mean

CONFIGS = {
    "sft": ("trainer/sft_config.py", "SFTConfig"),
    "rm": ("trainer/reward_config.py", "RewardConfig"),
    "ppo": ("trainer/grpo_config.py", "GRPOConfig"),
    "rloo": ("trainer/rloo_config.py", "RLOOConfig"),
    "grpo": ("trainer/grpo_config.py", "GRPOConfig"),
    "dpo": ("trainer/dpo_config.py", "DPOConfig"),
    "orpo": (None, "TrainingArguments"),
    "simpo": (None, "TrainingArguments"),
    "kto": ("trainer/kto_config.py", "KTOConfig"),
    "cai": ("trainer/sft_config.py", "SFTConfig"),
    "spin": ("trainer/dpo_config.py", "DPOConfig"),
}
"""Stage -> the config whose fields `trainer:` may set: TRL's file and class, or transformers' own."""

OWNED: dict[str, str | None] = {
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
"""Fields that another key of the recipe stands for (its name), or that a run does by itself (None)."""

ONLINE: dict[str, str | None] = {
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
    # a moving reference would have to be part of every checkpoint to resume exactly
    "sync_ref_model": None,
    "ref_model_mixup_alpha": None,
    "ref_model_sync_steps": None,
}
"""Fields of TRL's online trainers that our sections stand for."""

PAIRS: dict[str, str | None] = {
    "per_device_eval_batch_size": "method.batch_tokens",
    "auto_find_batch_size": "method.batch_tokens",
    "label_smoothing_factor": "method.label_smoothing",
}
"""The same, for stages whose steps are cut by tokens."""

DPO: dict[str, str | None] = {
    "beta": "method.beta",
    "precompute_ref_log_probs": "method.precompute_reference",
    "truncation_mode": None,
    # the moving reference would have to be part of every checkpoint to resume exactly
    "sync_ref_model": None,
    "ref_model_mixup_alpha": None,
    "ref_model_sync_steps": None,
}
"""The same, of TRL's DPO trainer."""

STAGE_OWNED: dict[str, dict[str, str | None]] = {
    "sft": {
        "packing": "method.packing",
        "chat_template_path": "model.chat_template",
        "completion_only_loss": "method.train_on",
        "assistant_only_loss": "method.train_on",
        "dataset_text_field": "data.train",
        "dataset_kwargs": None,
        "eval_packing": None,
        "shuffle_dataset": None,
    },
    "rm": {
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
    "ppo": ONLINE
    | {
        "num_generations": None,
        "loss_type": None,
        "scale_rewards": None,
        "multi_objective_aggregation": None,
        "importance_sampling_level": None,
    },
    "rloo": ONLINE
    | {
        "num_generations": "method.k",
        "normalize_advantages": "method.normalize_advantages",
        "reward_clip_range": "reward",
    },
    "dpo": DPO
    | {
        "loss_type": "method.loss",
        "loss_weights": "method.loss_weights",
        "label_smoothing": "method.label_smoothing",
    },
    "orpo": PAIRS | {"label_smoothing_factor": None},
    "simpo": PAIRS,
    "kto": {
        "loss_type": "method.loss",
        "beta": "method.beta",
        "desirable_weight": "method.desirable_weight",
        "undesirable_weight": "method.undesirable_weight",
        "train_sampling_strategy": None,
        # TRL keeps them in a file of its own for every rank
        "precompute_ref_log_probs": None,
        "precompute_ref_batch_size": None,
        "sync_ref_model": None,
        "ref_model_mixup_alpha": None,
        "ref_model_sync_steps": None,
    },
    "grpo": ONLINE
    | {
        "num_generations": "method.k",
        "epsilon_high": "method.clip_high",
        "loss_type": "method.loss",
        "scale_rewards": "method.scale_rewards",
        "multi_objective_aggregation": None,
    },
    "cai": {
        "packing": None,
        "chat_template_path": "model.chat_template",
        "completion_only_loss": None,
        "assistant_only_loss": None,
        "dataset_text_field": None,
        "dataset_kwargs": None,
        "eval_packing": None,
        "shuffle_dataset": None,
    },
    "spin": DPO | {"loss_type": None, "loss_weights": None, "label_smoothing": None},
}
"""The same, for the fields of one stage's config."""


@dataclass(frozen=True)
class TrainerField:
    """A field of a TRL config."""

    annotation: str
    default: Any
    """Its literal default, or None where the source computes one."""
    help: str


@cache
def _module(package: str, relative: str) -> ast.Module:
    # find_spec of a top-level name locates the package without running it
    spec = find_spec(package)
    return ast.parse((Path(spec.origin).parent / relative).read_text(encoding="utf-8"))


def _class(module: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name)


def _literal(node: ast.expr | None) -> Any:
    """The value of a literal, or of a `field(default=…)` / `default_factory=lambda: …` holding one; else None."""
    if isinstance(node, ast.Call):
        given = {word.arg: word.value for word in node.keywords}
        inner = given.get("default", given.get("default_factory"))
        return _literal(inner.body if isinstance(inner, ast.Lambda) else inner)
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def _help(node: ast.expr | None) -> str:
    for word in getattr(node, "keywords", []):
        if word.arg == "metadata":
            return str((_literal(word.value) or {}).get("help", "")).replace("%%", "%")
    return ""


@cache
def fields(stage: str) -> dict[str, TrainerField]:
    """Name -> field of the stage's TRL config, inherited ones included."""
    relative, name = CONFIGS[stage]
    found: dict[str, TrainerField] = {}
    sources = [("transformers", "training_args.py", "TrainingArguments")]
    if relative is not None:
        sources += [("trl", "trainer/base_config.py", "_BaseConfig"), ("trl", relative, name)]
    for package, file, cls in sources:
        for node in _class(_module(package, file), cls).body:
            if isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_"):
                found[node.target.id] = TrainerField(
                    ast.unparse(node.annotation), _literal(node.value), _help(node.value)
                )
    return found


@cache
def choices(enum: str) -> tuple[str, ...]:
    """The values of a transformers enum such as SchedulerType, or none if there is no such enum."""
    for file in ("trainer_utils.py", "training_args.py"):
        for node in _module("transformers", file).body:
            if isinstance(node, ast.ClassDef) and node.name == enum:
                values = [_literal(entry.value) for entry in node.body if isinstance(entry, ast.Assign)]
                return tuple(value for value in values if isinstance(value, str))
    return ()


ENUMS = {
    "lr_scheduler_type": "SchedulerType",
    "optim": "OptimizerNames",
    "eval_strategy": "IntervalStrategy",
    "save_strategy": "SaveStrategy",
    "logging_strategy": "IntervalStrategy",
}


def owner(stage: str, key: str) -> tuple[bool, str | None]:
    """Whether another key stands for this field, and which."""
    table = OWNED | STAGE_OWNED[stage]
    return key in table, table.get(key)


def problems(stage: str, block: dict[str, Any]) -> list[tuple[str, str]]:
    """(dotted key, what is wrong and how to mend it) for every entry of `trainer:` that the config would not take."""
    known, found = fields(stage), []
    for key, value in block.items():
        place, (owned, better) = f"trainer.{key}", owner(stage, key)
        if owned and key in known:
            found.append(
                (place, f"is set by {better}; write {better}=…" if better else "is done by the run itself; remove it")
            )
        elif key not in known:
            moved = {
                "warmup_ratio": "; write warmup_steps=0.1 for a share of the steps",
                "evaluation_strategy": "; write eval_strategy",
            }
            near = moved.get(key) or did_you_mean(key, [name for name in known if not owner(stage, name)[0]])
            found.append((place, f"unknown key{near or f'; {CONFIGS[stage][1]} has no such field'}"))
        elif wrong := _wrong_type(key, value, known[key].annotation):
            found.append((place, wrong))
    return found


def _wrong_type(key: str, value: Any, annotation: str) -> str:
    """What a value of the wrong type or name is told, else the empty string."""
    if key in ENUMS and isinstance(value, str):
        allowed = choices(ENUMS[key])
        if allowed and value not in allowed:
            return f"'{value}' is none of {', '.join(allowed)}{did_you_mean(value, list(allowed))}"
        return ""
    kinds = {part.strip() for part in annotation.replace("Optional[", "None |").replace("]", "").split("|")}
    simple = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,), "None": (type(None),)}
    if not kinds <= set(simple):
        return ""
    # bool is an int in Python, but `true` for a count is a mistake
    fits = any(isinstance(value, simple[kind]) and (kind == "bool" or not isinstance(value, bool)) for kind in kinds)
    if fits:
        return ""
    wanted = " or ".join(sorted("null" if kind == "None" else kind for kind in kinds))
    return f"expected {wanted}, found {type(value).__name__} {value!r}"
