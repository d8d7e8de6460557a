"""An adapter belongs to the weights that it was trained on."""

import json
import os
import shutil

import project
import pytest
import tiny
from project import align, manifest, ok

LORA = ("lora.r=4", "trainer.learning_rate=1e-2", "model.dtype=float32")
SCORED = [{"prompt": "name colours 1", "responses": ["red orange amber", "blue green", "gold"]}]
RM = """name: t
model: {{ path: {path} }}
data: {{ train: dpo.jsonl, max_length: 128, batch_size: 8 }}
method: {{ center_on: sft.jsonl{more} }}
trainer: {{ learning_rate: 1.0e-3, max_steps: 4, per_device_train_batch_size: 2 }}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = project.build(tmp_path_factory.mktemp("adapters"))
    project.write_rows(
        folder / "scored.jsonl",
        [{"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][1]} for row in SCORED],
    )
    project.recipe(folder, "rm", text=RM.format(path="models/tiny", more=""))
    project.recipe(folder, "rm", "ensemble", RM.format(path="models/tiny", more=", seeds: [1, 2, 3]"))
    ok("sft", "recipe=t", *LORA, cwd=folder)
    ok("rm", "recipe=t", *LORA, cwd=folder)
    ok("rm", "recipe=ensemble", "name=ensemble", *LORA, cwd=folder)
    return folder


def scores(folder, run, cwd=None):
    out = folder / "scores.jsonl"
    ok("score", str(run), f"data={folder / 'scored.jsonl'}", f"out={out}", cwd=cwd or folder)
    return json.loads(out.read_text().splitlines()[0])


def test_a_run_with_an_adapter_works_from_another_directory(home, tmp_path):
    here = scores(home, "runs/t/rm")["scores"]
    assert scores(home, home / "runs/t/rm", cwd=tmp_path)["scores"] == here
    ok("merge", str(home / "runs/t/sft"), "--to", str(tmp_path / "merged"), cwd=tmp_path)
    ok(
        "sft",
        f"recipe={home / 'recipes/sft/t.yaml'}",
        f"model.path={home / 'runs/t/sft'}",
        f"data.train={home / 'sft.jsonl'}",
        "trainer.max_steps=1",
        cwd=tmp_path,
    )


def test_a_project_that_was_moved_works(home, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(home, moved)
    os.rename(moved / "models", moved / "models2")
    done = align("score", "runs/t/rm", "data=scored.jsonl", "out=x.jsonl", cwd=moved)
    assert done.returncode == 2 and "models/tiny" in done.stderr and "Traceback" not in done.stderr
    os.rename(moved / "models2", moved / "models")
    assert scores(moved, "runs/t/rm")["scores"] == scores(home, "runs/t/rm")["scores"]


@pytest.mark.parametrize("kind", ["t", "ensemble"])
def test_a_merged_reward_model_scores_as_before_and_keeps_its_lineage(home, kind):
    run = f"runs/{kind}/rm"
    merged = f"{run}-merged"
    ok("merge", run, cwd=home)
    before, after = scores(home, run), scores(home, merged)
    for key in ("scores", "minimum", "heads"):
        if key in before:
            flat = [value for row in before[key] for value in (row if isinstance(row, list) else [row])]
            also = [value for row in after[key] for value in (row if isinstance(row, list) else [row])]
            assert also == pytest.approx(flat, abs=1e-4), key
    made = manifest(home / merged)
    assert made["reward"] == manifest(home / run)["reward"] and made["status"] == "complete"
    said = ok("lineage", merged, cwd=home)
    assert f"adapter   {run}" in said and "policy    models/tiny" in said and "stale" not in said


def test_a_base_that_was_made_anew_is_refused_wherever_the_adapter_is_read(home, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(home, folder)
    tiny.model(folder / "models/tiny", seed=7)
    project.write_rows(folder / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(8)])
    text = (
        "name: t\nmodel: { path: models/tiny }\nreward: { path: runs/t/rm }\n"
        "data: { train: prompts.jsonl, max_length: 96, batch_size: 4 }\ngeneration: { max_new_tokens: 8 }\n"
        "method: { k: 2 }\ntrainer: { max_steps: 1, per_device_train_batch_size: 4 }\n"
    )
    project.recipe(folder, "rloo", text=text)
    for words in (
        ("score", "runs/t/rm", "data=scored.jsonl", "out=x.jsonl"),
        ("merge", "runs/t/rm"),
        ("merge", "runs/t/sft"),
        ("check", "dpo", "recipe=t", "model.path=runs/t/sft"),
        ("dpo", "recipe=t", "model.path=runs/t/sft"),
        ("check", "rloo", "recipe=t"),
        ("rloo", "recipe=t"),
    ):
        done = align(*words, cwd=folder)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (words, done.stdout, done.stderr)
        assert "whose base models/tiny has changed since it was trained" in done.stderr, (words, done.stderr)


def test_an_adapter_on_a_run_finds_it_after_that_was_run_again(home, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(home, folder)
    ok("sft", "recipe=t", "name=full", cwd=folder)
    ok("rm", "recipe=t", "name=full", "model.path=runs/full/sft", *LORA, cwd=folder)
    before = scores(folder, "runs/full/rm")["scores"]
    ok("sft", "recipe=t", "name=full", "trainer.max_steps=2", cwd=folder)
    assert (folder / "runs/full/sft.old-1").is_dir()
    assert scores(folder, "runs/full/rm")["scores"] == before


@pytest.mark.parametrize(
    ("targets", "finding"),
    [
        ("[q_porj]", "models/tiny has no module 'q_porj'. Did you mean 'q_proj'?"),
        ("[q_proj,nothing]", "has no module 'nothing'; it has "),
        ("'.*nothing'", "has no module '.*nothing'; it has "),
        ("'('", "is not a pattern"),
    ],
)
def test_targets_that_match_nothing_are_named(home, targets, finding):
    for command in (("check", "sft"), ("sft",)):
        done = align(*command, "recipe=t", "lora.r=4", f"lora.targets={targets}", "run_dir=runs/x", cwd=home)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.startswith("lora.targets: ") and finding in done.stderr, done.stderr


def test_targets_that_match_are_trained(home):
    ok(
        "sft",
        "recipe=t",
        *LORA,
        "lora.targets=[q_proj,self_attn.v_proj]",
        "run_dir=runs/some",
        "trainer.max_steps=1",
        cwd=home,
    )
    names = project.weights(home / "runs/some")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "v_proj"}
