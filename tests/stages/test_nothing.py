"""A run that trains nothing, or leaves only NaN, ends with an error."""

import re

import project
import pytest
import tiny
import torch
from project import align, manifest, ok

ONLINE = """name: t
model: {{ path: models/tiny }}
reward: {reward}
data: {{ train: prompts.jsonl, max_length: 96, batch_size: 8 }}
generation: {{ max_new_tokens: 8 }}
method: {method}
trainer: {{ learning_rate: 1.0e-3, max_steps: 2, per_device_train_batch_size: 4 }}
"""
METHODS = {"ppo": "{ epochs: 1, minibatches: 1 }", "rloo": "{ k: 2 }", "grpo": "{ k: 2 }"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = project.build(tmp_path_factory.mktemp("nothing"))
    project.write_rows(folder / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(16)])
    project.write_rows(folder / "three.jsonl", [{"prompt": f"name colours {n}"} for n in range(3)])
    for stage, method in METHODS.items():
        project.recipe(folder, stage, text=ONLINE.format(reward="{ path: models/reward }", method=method))
    reward_model(folder / "models" / "reward")
    return folder


def reward_model(path, value=None):
    """A random reward model, whose head holds `value` if one is given."""
    from transformers import AutoModelForSequenceClassification

    tiny.model(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    if value is not None:
        model.score.weight.data.fill_(value)
    model.save_pretrained(path)


@pytest.mark.parametrize("stage", METHODS)
def test_fewer_prompts_than_a_rollout_are_refused(home, stage):
    for words in ((), ("trainer.max_steps=-1",)):
        done = align("check", stage, "recipe=t", "data.train=three.jsonl", *words, cwd=home)
        assert done.returncode == 2 and done.stderr.startswith("data.train: 3 rows do not make one step"), done.stderr
        done = align(stage, "recipe=t", "data.train=three.jsonl", *words, cwd=home)
        assert done.returncode == 2 and "Traceback" not in done.stderr and not (home / "runs" / "t" / stage).exists()


def test_a_dropped_last_batch_that_is_the_only_one_is_refused(home):
    few = home / "few.jsonl"
    few.write_text("".join((home / "sft.jsonl").read_text().splitlines(keepends=True)[:3]))
    words = ("data.train=few.jsonl", "data.batch_size=4", "trainer.per_device_train_batch_size=4")
    for command in (("check", "sft"), ("sft",)):
        done = align(*command, "recipe=t", *words, "trainer.dataloader_drop_last=true", cwd=home)
        assert done.returncode == 2 and "3 rows do not make one step" in done.stderr, done.stderr
    assert ok("sft", "recipe=t", *words, "trainer.max_steps=-1", "run_dir=runs/few", cwd=home)
    assert manifest(home / "runs/few")["metrics"]["steps"] >= 1


def test_the_plan_counts_steps_without_the_last_batch_as_the_run_does(home):
    words = ("data.batch_size=6", "trainer.per_device_train_batch_size=3", "trainer.max_steps=-1")
    words += ("trainer.num_train_epochs=1", "trainer.dataloader_drop_last=true", "run_dir=runs/dropped")
    # of 32 rows, 10 batches of 3 are whole
    assert re.search(r"steps\s+5\b", ok("check", "sft", "recipe=t", *words, cwd=home))
    ok("sft", "recipe=t", *words, cwd=home)
    assert manifest(home / "runs/dropped")["metrics"]["steps"] == 5


def test_rows_that_are_too_long_for_a_rollout_end_the_run(home):
    """`check` cannot know it: whether prompts leave room for a response is seen when they are tokenized."""
    long = [{"prompt": f"name colours {n}" + " and more" * 20 * (n > 2)} for n in range(16)]
    project.write_rows(home / "long.jsonl", long)
    done = align("rloo", "recipe=t", "data.train=long.jsonl", "data.max_dropped=1", cwd=home)
    assert done.returncode == 2 and "3 rows do not make one step" in done.stderr, done.stdout + done.stderr
    assert not (home / "runs/t/rloo/manifest.json").exists()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_rate_that_destroys_the_weights_ends_the_run(home, stage):
    words = ("trainer.learning_rate=1e30", "trainer.max_grad_norm=0", f"run_dir=runs/hot-{stage}")
    done = align(stage, "recipe=t", *words, cwd=home)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"runs/hot-{stage}: step " in done.stderr and "learning_rate" in done.stderr
    run = home / f"runs/hot-{stage}"
    assert not (run / "manifest.json").exists() and not list(run.glob("*.safetensors"))


def test_no_checkpoint_holds_weights_that_are_not_finite(home):
    words = ("trainer.learning_rate=1e30", "trainer.max_grad_norm=0", "trainer.save_steps=1", "run_dir=runs/saved")
    done = align("sft", "recipe=t", *words, cwd=home)
    assert done.returncode == 2
    from safetensors.torch import load_file

    for file in (home / "runs/saved/checkpoints").glob("checkpoint-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file


@pytest.mark.parametrize("stage", METHODS)
def test_a_reward_model_of_nan_ends_the_run(home, stage):
    if not (home / "models/broken").exists():
        reward_model(home / "models/broken", value=torch.nan)
    words = ("reward={path: models/broken}", f"run_dir=runs/nan-{stage}")
    done = align(stage, "recipe=t", *words, cwd=home)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "scores that are not finite for" in done.stderr
    assert not (home / f"runs/nan-{stage}/manifest.json").exists()


def test_a_policy_that_falls_apart_ends_the_run_with_or_without_a_guard(home):
    """Its weights are huge but finite, its logits are not: the next rollout cannot be sampled."""
    words = ("trainer.learning_rate=1e30", "trainer.max_grad_norm=0", "trainer.max_steps=6")
    for name, guard in (("alone", ()), ("guarded", ("guards=[{metric: 'nan', act: stop}]",))):
        done = align("rloo", "recipe=t", *words, *guard, f"run_dir=runs/{name}", cwd=home)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
        assert "NaN" in done.stderr or "is not finite" in done.stderr
        assert not (home / f"runs/{name}/manifest.json").exists()
