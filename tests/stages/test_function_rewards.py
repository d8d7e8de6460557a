"""Rewards that are Python functions, and the average of weights that a run may leave."""

import json

import project
import pytest
import torch
from safetensors.torch import load_file

RECIPE = """name: t
model: {{ path: models/tiny }}
reward: {{ python: "mine:brevity" }}
gold: {{ python: "mine:vowels" }}
data: {{ train: prompts.jsonl, max_length: 64, batch_size: 8 }}
generation: {{ max_new_tokens: 8 }}
method: {{ {method} }}
trainer: {{ learning_rate: 1.0e-3, max_steps: 4, per_device_train_batch_size: 4, logging_steps: 1 }}
"""
MINE = """
def brevity(prompts, responses):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [-float(len(response)) for response in responses]


def vowels(prompts, responses):
    return [sum(letter in "aeiou" for letter in response) for response in responses]


def broken(prompts, responses):
    raise KeyError("answer")


def too_few(prompts, responses):
    return [1.0]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = project.build(tmp_path_factory.mktemp("functions"), rows=4)
    project.write_rows(folder / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(32)])
    (folder / "mine.py").write_text(MINE)
    project.recipe(folder, "ppo", "t", RECIPE.format(method="epochs: 1, minibatches: 2"))
    project.recipe(folder, "rloo", "t", RECIPE.format(method="k: 4, ema: 0.5"))
    return folder


def test_code_runs_only_where_it_was_allowed(folder):
    for command in (["ppo"], ["check", "ppo"]):
        done = project.align(*command, "recipe=t.yaml", "name=no", cwd=folder)
        assert done.returncode == 2
        assert done.stderr.splitlines() == [
            f"{key}.python: mine:{name} is Python code, which runs with your rights; add --allow-code if you trust it"
            for key, name in (("reward", "brevity"), ("gold", "vowels"))
        ]
    assert not (folder / "runs/no").exists()


@pytest.mark.parametrize(
    ("entry", "finding"),
    [
        ("mine.brevity", "does not name a function; write module:function"),
        ("nowhere:brevity", "no module nowhere in the working directory or among installed packages"),
        ("mine:brevty", "does not define brevty; correct the name after the colon"),
    ],
)
def test_what_is_no_function_is_refused(folder, entry, finding):
    done = project.align("check", "ppo", "recipe=t.yaml", f"reward.python='{entry}'", "--allow-code", cwd=folder)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("reward.python: ") and finding in done.stderr


def test_a_run_and_a_function_at_once_are_one_too_many(folder):
    done = project.align("check", "ppo", "recipe=t.yaml", "reward.path=runs/t/rm", "--allow-code", cwd=folder)
    assert done.returncode == 2 and "reward.path: is set together with python" in done.stderr


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("broken", "mine:broken: raised KeyError: 'answer'"),
        ("too_few", "mine:too_few: gave shape (1,) for "),
    ],
)
def test_what_a_function_does_wrong_is_said_in_one_line(folder, name, finding):
    done = project.align(
        "ppo", "recipe=t.yaml", f"name={name}", f"reward.python=mine:{name}", "--allow-code", cwd=folder
    )
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith(finding)
    assert "Traceback" not in done.stderr + done.stdout


@pytest.fixture(scope="module")
def run(folder):
    project.ok("ppo", "recipe=t.yaml", "--allow-code", cwd=folder)
    return folder / "runs/t/ppo"


def test_a_function_is_the_reward_and_the_value_function_starts_from_the_policy(run):
    from transformers import AutoModelForSequenceClassification

    rows = [row for row in project.metrics(run) if "reward" in row]
    assert all(row["score"] < -1 and row["gold_reward"] >= 0 for row in rows)
    # a response that does not end is worth -1 in place of its score
    assert all(
        row["reward"] == pytest.approx(-1.0) if row["eos_rate"] == 0 else row["reward"] != row["score"] for row in rows
    )
    # a head of zeros explains nothing of the first rollout's returns
    assert rows[0]["explained_variance"] == pytest.approx(0.0, abs=1e-5)
    assert AutoModelForSequenceClassification.from_pretrained(run / "value").score.weight.abs().max() > 0


def test_the_manifest_keeps_the_code_by_its_hash(run, folder):
    entries = {entry["entry"]: entry["sha256"] for entry in project.manifest(run)["code"]}
    assert set(entries) == {"mine:brevity", "mine:vowels"} and all(len(found) == 64 for found in entries.values())
    assert "nothing to do" in project.ok("ppo", "recipe=t.yaml", "--allow-code", cwd=folder)
    file = folder / "mine.py"
    file.write_text(MINE + "\n# another day\n")
    try:
        assert "mine:brevity has changed since" in project.ok("ppo", "recipe=t.yaml", "--allow-code", cwd=folder)
    finally:
        file.write_text(MINE)


def test_on_one_backbone_the_value_adapter_starts_like_the_policys(folder, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    monkeypatch.chdir(folder)  # the adapter names its base from there
    words = ["name=lora", "lora={r: 4}", "model.dtype=float32", "trainer.max_steps=2", "--allow-code"]
    project.ok("ppo", "recipe=t.yaml", *words, cwd=folder)
    value = project.weights(folder / "runs/lora/ppo/value")
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in value.items())
    AutoModelForSequenceClassification.from_pretrained(folder / "runs/lora/ppo/value", num_labels=1)


@pytest.fixture(scope="module")
def averaged(folder):
    project.ok(
        "rloo", "recipe=t.yaml", "trainer.save_steps=1", "trainer.save_total_limit=9", "--allow-code", cwd=folder
    )
    return folder / "runs/t/rloo"


def test_a_run_leaves_the_average_of_its_weights(averaged, folder):
    expected = {name: tensor.clone() for name, tensor in project.weights(folder / "models/tiny").items()}
    for step in range(1, 5):
        for name, tensor in load_file(averaged / f"checkpoints/checkpoint-{step}/model.safetensors").items():
            expected[name] = 0.5 * expected[name] + 0.5 * tensor
    found = project.weights(averaged)
    assert all(torch.allclose(tensor, found[name], atol=1e-6) for name, tensor in expected.items())
    last = load_file(averaged / "checkpoints/checkpoint-4/model.safetensors")
    assert any(not torch.allclose(tensor, last[name], atol=1e-5) for name, tensor in found.items())


@pytest.mark.parametrize("zero", ["zero3", pytest.param("zero2", marks=pytest.mark.slow)])
def test_ranks_average_their_parts(averaged, folder, zero):
    words = ["launch.num_gpus=2", f"zero={zero}", f"name={zero}"]
    project.ok("rloo", "recipe=t.yaml", *words, "--allow-code", cwd=folder)
    found = project.weights(folder / f"runs/{zero}/rloo")
    assert all(torch.allclose(tensor, found[name], atol=5e-4) for name, tensor in project.weights(averaged).items())


@pytest.mark.slow
def test_an_average_is_resumed(averaged, folder):
    words = ["name=killed", "trainer.save_steps=1", "trainer.save_total_limit=9", "--allow-code"]
    run = folder / "runs/killed/rloo"
    project.kill_after_a_checkpoint("rloo", "recipe=t.yaml", *words, run=run, cwd=folder)
    assert "resuming from step" in project.ok("rloo", "recipe=t.yaml", *words, cwd=folder)
    found = project.weights(run)
    assert all(torch.equal(tensor, found[name]) for name, tensor in project.weights(averaged).items())


def test_check_prints_both_ways_to_hold_four_models(folder):
    for words, mine, other in (([], "reference", "as one backbone"), (["lora={r: 4}"], "weights", "as four models")):
        said = project.ok("check", "ppo", "recipe=t.yaml", "--allow-code", *words, cwd=folder)
        assert mine in said and other in said
    assert json.loads(project.ok("schema", "ppo", cwd=folder))["$defs"]["RewardSource"]["properties"]["python"]
