"""Settings of `trainer:` that cannot work are found by `align check`, each in one line with its key."""

import re

import project
import pytest
from project import align

from align_cli.recipe import trainer_rules

RANGES = {
    "save_steps": (1.5, "whole number"),
    "logging_steps": (0, "more than 0"),
    "learning_rate": (-1e-5, "0 or more"),
    "warmup_steps": (-3, "0 or more"),
    "adam_beta1": (1.5, "less than 1"),
    "adam_beta2": (1, "less than 1"),
    "max_grad_norm": (-1, "0 or more"),
    "max_steps": (0, "1 or more, or -1"),
    "num_train_epochs": (-1, "more than 0"),
    "save_total_limit": (0, "1 or more"),
    "weight_decay": (-0.1, "0 or more"),
    "gradient_accumulation_steps": (0, "1 or more"),
}
LIBRARIES = {
    "report_to": "wandb",
    "tf32": "true",
    "optim": "adamw_bnb_8bit",
    "lr_scheduler_type": "cosine_with_min_lr",
}
"""What only a library refuses: a tracker and an optimizer that are not installed, what a CPU lacks, a schedule without
its minimum."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return project.build(tmp_path_factory.mktemp("settings"))


def lines(done, key):
    return [line for line in done.stderr.splitlines() if f"trainer.{key}:" in line]


def test_numbers_out_of_range_are_found_together_without_a_library(home):
    given = [f"trainer.{key}={value}" for key, (value, _) in RANGES.items()]
    done = align("check", "sft", "recipe=t", *given, cwd=home)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for key, (value, wanted) in RANGES.items():
        (line,) = lines(done, key)
        assert f"{value:g}" in line and wanted in line


@pytest.mark.parametrize("key", ["num_train_epochs", "logging_steps"])
def test_zero_is_refused_by_the_run_too(home, key):
    done = align("sft", "recipe=t", f"trainer.{key}=0", "run_dir=runs/zero", cwd=home)
    assert done.returncode == 2 and len(lines(done, key)) == 1 and not (home / "runs/zero").exists()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_what_libraries_refuse_is_one_line_each_before_anything_is_loaded(home, stage):
    given = [f"trainer.{key}={value}" for key, value in LIBRARIES.items()]
    done = align("check", stage, "recipe=t", *given, cwd=home)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for key, value in LIBRARIES.items():
        (line,) = lines(done, key)
        assert value.title() in line or value in line, line
    done = align(stage, "recipe=t", *given, cwd=home)
    assert done.returncode == 2 and not (home / "runs").exists()


@pytest.mark.parametrize("key", LIBRARIES)
def test_the_libraries_really_refuse_them(key, tmp_path):
    """The oracle: plain transformers, as a user would write it."""
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.optimization import get_scheduler

    value = {"true": True}.get(LIBRARIES[key], LIBRARIES[key])
    with pytest.raises((ValueError, RuntimeError, ImportError)):
        args = TrainingArguments(**({"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True} | {key: value}))
        model = torch.nn.Linear(2, 2)
        Trainer(model=model, args=args)
        cls, how = Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = cls(model.parameters(), **how)
        get_scheduler(
            args.lr_scheduler_type, optimizer, num_warmup_steps=0, num_training_steps=4,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )  # fmt: skip


def test_a_plateau_needs_evaluations_and_a_minimum_a_key(home):
    plateau = "trainer.lr_scheduler_type=reduce_lr_on_plateau"
    done = align("check", "sft", "recipe=t", plateau, cwd=home)
    assert done.returncode == 2 and "eval" in lines(done, "lr_scheduler_type")[0]
    both = ("data.eval=0.25", "trainer.eval_strategy=epoch")
    assert align("check", "sft", "recipe=t", plateau, *both, cwd=home).returncode == 0
    least = ("trainer.lr_scheduler_type=cosine_with_min_lr", "trainer.lr_scheduler_kwargs={min_lr: 1.0e-6}")
    assert align("check", "sft", "recipe=t", *least, cwd=home).returncode == 0


@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo", "kto", "rm", "orpo", "simpo", "spin", "cai"])
def test_what_works_passes_in_every_stage(stage):
    from align_cli.training import trial

    assert trial.problems(stage, {"optim": "adafactor", "lr_scheduler_type": "polynomial", "adam_beta1": 0.8}) == []


def test_settings_known_whole_start_no_process(monkeypatch, home):
    from align_cli.recipe.check import load
    from align_cli.run import settings

    monkeypatch.chdir(home)
    monkeypatch.setattr(settings.subprocess, "run", None)
    _, recipe = load("sft", ["recipe=t", "trainer.warmup_steps=0.1", "trainer.report_to=none"])
    assert settings.problems(recipe) == []


def test_every_key_of_the_tables_is_a_field_of_transformers():
    from dataclasses import fields

    from transformers import TrainingArguments
    from trl import DPOConfig

    known = {field.name for cls in (TrainingArguments, DPOConfig) for field in fields(cls)}
    assert set(trainer_rules.RANGES) | set(trainer_rules.SURE) <= known


def test_an_error_names_the_setting_that_it_speaks_of():
    block = {"tf32": True, "max_steps": 3}
    assert trainer_rules.blamed("--tf32 requires Ampere or a newer GPU arch", block) == "tf32"
    assert trainer_rules.blamed("tf321 or my_max_steps", block) is None
    line = trainer_rules.refused("tf32", True, ValueError("a\nb"))
    assert re.fullmatch(r"trainer\.tf32: True is refused: a b", line)
