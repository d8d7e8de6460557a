"""align ppo and align rloo as whole runs, with a reward model that counts warm words."""

import json
import random
import signal
import time

import project
import pytest
import torch
from project import COLD, WARM

RECIPE = """name: t
model: {{ path: models/tiny }}
reward: {{ path: runs/t/rm }}
data: {{ train: prompts.jsonl, max_length: 96, batch_size: 16 }}
generation: {{ max_new_tokens: 12 }}
method: {{ {method} }}
trainer: {{ learning_rate: 1.0e-3, max_steps: {steps}, per_device_train_batch_size: 8, logging_steps: 1 }}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = project.build(tmp_path_factory.mktemp("ppo"))
    draw = random.Random(1)
    rows = [
        {
            "prompt": f"name colours {n}",
            "chosen": " ".join(draw.choices(WARM, k=4)),
            "rejected": " ".join(draw.choices(COLD, k=4)),
        }
        for n in range(48)
    ]
    project.write_rows(folder / "rm.jsonl", rows)
    project.write_rows(folder / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(64)])
    project.recipe(
        folder,
        "rm",
        "t",
        """name: t
model: { path: models/tiny }
data: { train: rm.jsonl, max_length: 96, batch_size: 8 }
method: { center_on: sft.jsonl }
trainer: { learning_rate: 3.0e-3, max_steps: 12 }
""",
    )
    project.ok("rm", "recipe=t.yaml", cwd=folder)
    for stage, method in (("ppo", "epochs: 2, minibatches: 2"), ("rloo", "k: 4")):
        project.recipe(folder, stage, "t", RECIPE.format(method=method, steps=8))
    return folder


@pytest.fixture(scope="module", params=["ppo", "rloo"])
def run(request, folder):
    stage = request.param
    said = project.ok(stage, "recipe=t.yaml", cwd=folder)
    return stage, folder / f"runs/t/{stage}", said


def test_figures_of_every_rollout_are_kept(run):
    stage, path, _ = run
    rows = [row for row in project.metrics(path) if "loss" in row]
    assert len(rows) == 8
    for name in ("reward", "kl", "entropy", "response_length", "eos_rate", "distinct_2", "seconds_rollout", "beta"):
        assert name in rows[0], name
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    if stage == "ppo":
        assert {"value_loss", "explained_variance", "kl_k3"} <= set(rows[0])
        # the first minibatch is scored by the very policy that sampled it
        assert rows[0]["clip_ratio/region_mean"] == 0


def test_what_is_saved_loads_with_plain_transformers(run):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    stage, path, _ = run
    names = project.weights(path)
    assert not any(name.startswith("value_model") for name in names)
    AutoModelForCausalLM.from_pretrained(path)
    if stage == "ppo":
        value = AutoModelForSequenceClassification.from_pretrained(path / "value")
        start = project.weights(path.parent / "rm")
        moved = [name for name, tensor in value.state_dict().items() if not torch.equal(tensor, start[name])]
        assert "score.weight" in moved and len(moved) > 5


def test_the_manifest_names_its_parents(run):
    stage, path, _ = run
    roles = {entry["role"]: entry["path"] for entry in project.manifest(path)["parents"]}
    assert roles == {"policy": "models/tiny", "reward": "runs/t/rm"}


@pytest.mark.parametrize("stage", ["ppo", "rloo"])
@pytest.mark.parametrize("zero", ["none", "zero2", "zero3"])
def test_two_ranks_are_one_process(folder, stage, zero):
    one = folder / f"runs/one/{stage}"
    if not (one / "manifest.json").is_file():
        project.ok(stage, "recipe=t.yaml", "name=one", "trainer.max_steps=4", cwd=folder)
    project.ok(
        *(stage, "recipe=t.yaml", f"name={zero}", "launch.num_gpus=2", f"zero={zero}", "trainer.max_steps=4"),
        "trainer.per_device_train_batch_size=4",
        cwd=folder,
    )
    two = folder / f"runs/{zero}/{stage}"
    for name in ("reward", "kl", "response_length", "loss", "entropy"):
        expected, found = ([row[name] for row in project.metrics(run) if name in row] for run in (one, two))
        assert expected
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-4), name
    for name, tensor in project.weights(one).items():
        assert torch.allclose(tensor, project.weights(two)[name], atol=5e-4), name


@pytest.mark.parametrize("stage", ["ppo", "rloo"])
def test_killed_and_run_again_it_ends_with_the_same_weights(folder, stage):
    settings = ["trainer.save_steps=4", "trainer.max_steps=24"]
    project.ok(stage, "recipe=t.yaml", "name=calm", *settings, cwd=folder)
    process = project.start(stage, "recipe=t.yaml", "name=killed", *settings, cwd=folder)
    run = folder / f"runs/killed/{stage}"
    until = time.monotonic() + 180
    while not list(run.glob("checkpoints/checkpoint-*/complete")) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "manifest.json").exists()
    assert "resuming from step" in project.ok(stage, "recipe=t.yaml", "name=killed", *settings, cwd=folder)
    for place in ("", "value") if stage == "ppo" else ("",):
        calm = project.weights(folder / f"runs/calm/{stage}" / place)
        assert all(torch.equal(tensor, calm[name]) for name, tensor in project.weights(run / place).items()), place


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (["reward.path=models/tiny"], "without a trained scalar head"),
        (["reward.path=runs/none/rm"], "runs/none/rm is not there"),
        (["generation.max_new_tokens=96"], "leaves no room for a prompt"),
        (["data.max_prompt_length=90"], "set data.max_prompt_length=84"),
        (["data.batch_size=15"], "do not divide by"),
        (["model.path=runs/t/rm"], "is a reward model"),
        (["guards=[{metric: kl}]"], "has no threshold"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(folder, words, finding):
    done = project.align("ppo", "recipe=t.yaml", "name=bad", *words, cwd=folder)
    assert done.returncode == 2 and finding in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (folder / "runs/bad").exists()


def test_rloo_wants_two_samples(folder):
    done = project.align("rloo", "recipe=t.yaml", "name=bad", "method.k=1", cwd=folder)
    assert done.returncode == 2 and "method.k" in done.stderr


def test_a_guard_ends_the_run_and_the_manifest_says_why(folder):
    said = project.ok(
        *("ppo", "recipe=t.yaml", "name=guarded", "trainer.max_steps=400", "trainer.learning_rate=1e-2"),
        *("method.beta=0", "guards=[{metric: kl, above: 0.5, act: stop, patience: 1}]"),
        cwd=folder,
    )
    made = project.manifest(folder / "runs/guarded/ppo")
    assert "guard: step" in said and "above 0.5" in made["stopped_by_guard"]
    assert made["metrics"]["steps"] < 400


def test_ptx_rows_are_trained_beside(folder):
    project.ok("ppo", "recipe=t.yaml", "name=ptx", "method.ptx=sft.jsonl", "method.ptx_coef=5", cwd=folder)
    found = [row["ptx_loss"] for row in project.metrics(folder / "runs/ptx/ppo") if "ptx_loss" in row]
    assert found[-1] < found[0]


def test_samples_and_rows_are_counted(folder):
    project.write_rows(folder / "long.jsonl", [{"prompt": "x" * 300}, *({"prompt": f"name {n}"} for n in range(31))])
    said = project.ok(
        *("ppo", "recipe=t.yaml", "name=long", "data.train=long.jsonl", "trainer.max_steps=4", "samples=[name 1]"),
        cwd=folder,
    )
    assert "1 prompt over 84 tokens" in said
    (row,) = [json.loads(line) for line in (folder / "runs/long/ppo/samples.jsonl").read_text().splitlines()]
    assert {"prompt", "before", "after"} <= set(row)
