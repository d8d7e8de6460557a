"""align kto as whole runs: what is learned from pairs and from labels, and that ranks change nothing."""

import project
import pytest
import torch

RECIPE = """name: t
model: { path: models/tiny }
data: { train: dpo.jsonl, eval: 0.25, max_length: 128, batch_size: 8 }
trainer: { learning_rate: 3.0e-3, max_steps: 40, per_device_train_batch_size: 4, lr_scheduler_type: constant }
"""
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = project.build(tmp_path_factory.mktemp("kto"), rows=48)
    project.recipe(folder, "kto", text=RECIPE)
    project.ok("kto", "recipe=t.yaml", cwd=folder)
    return folder


def logged(run, name):
    return [row[name] for row in project.metrics(run) if name in row]


def test_it_learns_which_responses_are_good(folder):
    run = folder / "runs/t/kto"
    losses, final = project.losses(run), project.manifest(run)["metrics"]
    # before any step every response is exactly as good as the reference's
    assert losses[0] == pytest.approx(0.5, abs=1e-4)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert final["eval_rewards/accuracies"] > 0.9 and final["eval_rewards/margins"] > 0
    assert project.manifest(run)["data"][0]["rows_used"] == 48


@pytest.mark.parametrize("zero", ["zero3", pytest.param("zero2", marks=SLOW), pytest.param("none", marks=SLOW)])
def test_two_ranks_are_one_process(folder, zero):
    # an epoch has 9 steps
    words = ["launch.num_gpus=2", f"zero={zero}", "trainer.max_steps=11", "trainer.per_device_train_batch_size=2"]
    project.ok("kto", "recipe=t.yaml", f"name={zero}", *words, cwd=folder)
    two, one = folder / f"runs/{zero}/kto", folder / "runs/t/kto"
    for name in ("loss", "kl", "rewards/chosen", "logps/rejected"):
        assert logged(two, name) == pytest.approx(logged(one, name)[:11], rel=1e-3, abs=1e-4), name


def test_each_epoch_has_other_steps(folder):
    project.ok("kto", "recipe=t.yaml", "name=still", "trainer.learning_rate=0", "trainer.max_steps=18", cwd=folder)
    scores = logged(folder / "runs/still/kto", "logps/rejected")
    # the model does not change, so the same rows would give the same figures
    assert len(scores) == 18 and not set(scores[:9]) & set(scores[9:])


@pytest.mark.slow
def test_labelled_rows_and_adapters_serve_too(folder):
    import json

    pairs = [json.loads(line) for line in (folder / "dpo.jsonl").read_text().splitlines()]
    rows = [
        {"prompt": row["prompt"], "completion": row[which], "label": which == "chosen"}
        for at, row in enumerate(pairs)
        for which in (("chosen", "rejected") if at % 3 else ("chosen",))
    ]
    project.write_rows(folder / "labels.jsonl", rows)
    words = ["data.train=labels.jsonl", "lora.r=4", "model.dtype=float32", "trainer.max_steps=8"]
    said = project.ok("kto", "recipe=t.yaml", "name=labels", *words, cwd=folder)
    assert "method.desirable_weight=" in said
    weights = project.weights(folder / "runs/labels/kto")
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert torch.isfinite(torch.tensor(project.losses(folder / "runs/labels/kto"))).all()


@pytest.mark.slow
def test_killed_and_run_again_it_ends_with_the_same_weights(folder):
    run, words = folder / "runs/killed/kto", ["recipe=t.yaml", "name=killed", "trainer.save_steps=10"]
    project.kill_after_a_checkpoint("kto", *words, run=run, cwd=folder)
    assert "resuming from step" in project.ok("kto", *words, cwd=folder)
    calm = project.weights(folder / "runs/t/kto")
    assert all(torch.equal(tensor, calm[name]) for name, tensor in project.weights(run).items())


def test_rows_are_shown_as_good_and_bad(folder):
    said = project.ok("show", "kto", "recipe=t.yaml", "-n", "2", cwd=folder)
    assert said.count("a good response") == said.count("a bad response") == 2


def test_what_cannot_run_is_refused_a_line_a_problem(folder):
    words = ["data.train=sft.jsonl", "trainer.per_device_train_batch_size=1", "trainer.beta=1"]
    done = project.align("kto", "recipe=t.yaml", "name=bad", *words, cwd=folder)
    for finding in ("labels need prompt, completion and label", "must give each device two rows", "write method.beta"):
        assert finding in done.stderr, done.stderr
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (folder / "runs/bad").exists()
    done = project.align("kto", "recipe=t.yaml", "name=bad", "data.batch_size=2", "launch.num_gpus=2", cwd=folder)
    assert done.returncode == 2 and ("two or more" in done.stderr or "does not divide" in done.stderr), done.stderr
