"""A resumed run goes on with what it began with, or names what has changed."""

import shutil

import project
import pytest
import torch
from project import align, losses, manifest, ok, weights

TEXT = """name: t
model: { path: models/tiny }
data: { train: sft.jsonl, max_length: 128 }
trainer:
  { learning_rate: 1.0e-3, num_train_epochs: 3, per_device_train_batch_size: 4, save_steps: 4, logging_steps: 1,
    max_grad_norm: 1.0 }
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = project.build(tmp_path_factory.mktemp("resume"))
    project.recipe(folder, "sft", text=TEXT)
    return folder


@pytest.fixture
def stopped(home):
    """An unfinished run with a checkpoint at step 4 of 24, and how it was called."""

    def make(name, *more):
        words = ["sft", "recipe=t", f"run_dir=runs/{name}", *more]
        project.kill_after_a_checkpoint(*words, run=home / "runs" / name, cwd=home)
        return words, home / "runs" / name

    return make


def test_on_two_ranks_the_batch_and_the_schedule_stay(home, stopped):
    """Without data.batch_size, two ranks would take twice the rows a step and half the steps."""
    ok("sft", "recipe=t", "run_dir=runs/whole", cwd=home)
    words, run = stopped("split")
    ok(*words, "launch.num_gpus=2", cwd=home)
    one, two = manifest(home / "runs/whole"), manifest(run)
    assert two["world_size"] == 2 and two["metrics"]["steps"] == one["metrics"]["steps"] == 24
    assert losses(run) == pytest.approx(losses(home / "runs/whole"), rel=1e-4)
    for name, tensor in weights(home / "runs/whole").items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=1e-3, atol=1e-5)


def test_ranks_that_cannot_share_the_batch_are_one_line(home, stopped):
    words, _ = stopped("odd")
    done = align(*words, "launch.num_gpus=3", cwd=home)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert "began with 4 rows a step" in line and "3 ranks" in line


def test_checkpoints_of_weights_alone_are_not_resumed(home, stopped):
    words, run = stopped("light", "trainer.save_only_model=true")
    assert "cannot resume" in " ".join(ok("check", *words, cwd=home).split())
    done = align(*words, cwd=home)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "holds only weights (trainer.save_only_model)" in done.stderr and "force=true" in done.stderr
    ok(*words, "force=true", cwd=home)


def test_changed_data_are_named(home, stopped):
    data = home / "mine.jsonl"
    shutil.copy(home / "sft.jsonl", data)
    words, run = stopped("data", "data.train=mine.jsonl")
    before = data.read_text()
    data.write_text(before.replace("name colours 3", "name colours 99"))
    done = align(*words, cwd=home)
    assert done.returncode == 2 and "data mine.jsonl has changed since" in done.stderr
    data.write_text(before)
    ok(*words, cwd=home)
    assert not list(run.glob(".data.json"))


def test_a_parent_that_was_made_anew_is_named(home, stopped):
    shutil.copytree(home / "models/tiny", home / "models/parent", dirs_exist_ok=True)
    words, _ = stopped("parent", "model.path=models/parent")
    import tiny

    tiny.model(home / "models/parent", seed=9)
    done = align(*words, cwd=home)
    assert done.returncode == 2 and "policy models/parent has changed since" in done.stderr
