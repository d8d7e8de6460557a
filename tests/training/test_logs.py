"""Logs of trackers live in the run's directory and survive its checkpoints."""

import os
import sys
import types

import project
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback, integration_utils

from align_cli.run.directory import RunDirectory
from align_cli.training.arguments import arguments


def test_tensorboard_writes_beside_the_checkpoints_not_among_them(tmp_path, monkeypatch):
    monkeypatch.chdir(project.build(tmp_path / "work"))
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    writer = types.SimpleNamespace(SummaryWriter=object)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    job = project.job("sft")
    args = arguments(TrainingArguments, job)
    # where transformers' own callback will write
    assert TensorBoardCallback(tb_writer=object()).logging_dir == str(job.run.logs) == "runs/t/sft/logs"
    assert os.path.relpath(args.output_dir) == "runs/t/sft/checkpoints"
    del os.environ["TENSORBOARD_LOGGING_DIR"]


def test_the_run_has_the_name_that_the_recipe_gives_it(tmp_path, monkeypatch):
    monkeypatch.chdir(project.build(tmp_path / "work"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    assert arguments(TrainingArguments, project.job("sft")).run_name == "t-sft"
    assert arguments(TrainingArguments, project.job("sft", "trainer.run_name=mine")).run_name == "mine"
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "elsewhere"


def test_only_checkpoints_are_removed_as_half_written(tmp_path):
    run = RunDirectory(tmp_path)
    for name in ("checkpoint-2", "tmp-checkpoint-4", "logs"):
        (run.checkpoints / name).mkdir(parents=True)
    run.drop_half_written()
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["logs"]
