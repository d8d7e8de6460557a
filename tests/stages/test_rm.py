"""align rm as whole runs: what is learned, what is saved, and that cutting, ranks and kills change nothing."""

import json
import random
import subprocess
from pathlib import Path

import project
import pytest
import torch
from project import COLD, WARM

BUFFERS = "deepspeed_allreduce_buffer_*"
BEFORE = set(Path("/dev/shm").glob(BUFFERS))
RECIPE = """name: t
model: {{ path: models/tiny }}
data: {{ train: rm.jsonl, eval: 0.25, max_length: 128, batch_size: 8 }}
method: {{ {method} }}
trainer: {{ learning_rate: 3.0e-3, max_steps: {steps}, per_device_train_batch_size: {per_device} }}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rankings of 2 to 5 responses; the more warm words one has among eight, the better it is."""
    folder = project.build(tmp_path_factory.mktemp("rm"))
    draw = random.Random(1)
    rows = []
    for number in range(64):
        counts = sorted(draw.sample(range(9), draw.randint(2, 5)), reverse=True)
        said = []
        for warm in counts:
            words = draw.choices(WARM, k=warm) + draw.choices(COLD, k=8 - warm)
            draw.shuffle(words)
            said.append(" ".join(words))
        rows.append({"prompt": f"name colours {number}", "responses": said})
    project.write_rows(folder / "rm.jsonl", rows)
    recipe(folder, "t")
    return folder


def recipe(folder: Path, name: str, method: str = "loss: ranking", steps: int = 6, per_device: int = 8) -> None:
    project.recipe(folder, "rm", name, RECIPE.format(method=method, steps=steps, per_device=per_device))


@pytest.fixture(scope="module")
def trained(folder):
    """A run that has learned, with demonstrations to center on."""
    recipe(folder, "long", "loss: ranking, center_on: sft.jsonl", steps=60)
    said = project.ok("rm", "recipe=long.yaml", "name=long", cwd=folder)
    return folder / "runs/long/rm", said


def test_it_learns_what_people_preferred(trained):
    run, said = trained
    figures = project.manifest(run)["metrics"]
    assert figures["eval_accuracy"] > 0.75 > figures["eval_longer_wins"]
    assert figures["eval_pairs"] >= 20
    assert f"accuracy {figures['eval_accuracy']:.3f} ±" in said and "the longer one wins" in said


def test_metrics_carry_the_held_out_figures(trained):
    last = [row for row in project.metrics(trained[0]) if "eval_accuracy" in row][-1]
    assert {"eval_loss", "eval_calibration_error", "eval_spearman_length", "eval_accuracy_quarter_4"} <= set(last)


def test_plain_transformers_gives_the_scores_that_align_gives(trained, folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run, _ = trained
    said = project.ok("score", str(run.relative_to(folder)), "data=rm.jsonl", "out=scores.jsonl", cwd=folder)
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert "64 prompts" in said and len(rows) == 64
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
    shift = project.manifest(run)["reward"]["shift"][0]
    for row in rows[:6]:
        for response, score in zip(row["responses"], row["scores"], strict=True):
            chat = [*row["prompt"], *response]
            text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
            with torch.no_grad():
                raw = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item()
            assert score == pytest.approx(raw + shift, abs=2e-4)


def test_demonstrations_score_zero_on_average(trained, folder):
    run, _ = trained
    reward = project.manifest(run)["reward"]
    assert reward["on"] == "sft.jsonl" and reward["std"][0] > 0
    assert reward["shift"][0] == pytest.approx(-reward["mean"][0])
    project.ok("score", str(run.relative_to(folder)), "data=sft.jsonl", "out=zero.jsonl", cwd=folder)
    scores = [json.loads(line)["scores"][0] for line in (folder / "zero.jsonl").read_text().splitlines()]
    assert sum(scores) / len(scores) == pytest.approx(0.0, abs=1e-4)


def test_the_two_layouts_train_the_same_model(folder):
    for layout in ("shared", "rows"):
        project.ok("rm", "recipe=t.yaml", f"name={layout}", f"method.layout={layout}", cwd=folder)
    shared, rows = (project.losses(folder / f"runs/{layout}/rm") for layout in ("shared", "rows"))
    assert shared == pytest.approx(rows, rel=1e-4)
    assert [project.manifest(folder / f"runs/{layout}/rm")["layout"] for layout in ("shared", "rows")] == [
        "shared",
        "rows",
    ]


def test_how_a_step_is_cut_does_not_change_it(folder):
    project.ok("rm", "recipe=t.yaml", "name=whole", "method.batch_tokens=100000", cwd=folder)
    project.ok("rm", "recipe=t.yaml", "name=cut", "method.batch_tokens=64", cwd=folder)
    project.ok("rm", "recipe=t.yaml", "name=two", "trainer.per_device_train_batch_size=2", cwd=folder)
    whole, cut, two = (project.losses(folder / f"runs/{name}/rm") for name in ("whole", "cut", "two"))
    assert cut == pytest.approx(whole, rel=1e-4)
    assert two == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("zero", [pytest.param("none", marks=pytest.mark.slow), "zero2", "zero3"])
def test_two_ranks_are_one_process(folder, zero):
    if not (folder / "runs/one/rm/manifest.json").is_file():
        project.ok("rm", "recipe=t.yaml", "name=one", "method.batch_tokens=256", cwd=folder)
    project.ok(
        *("rm", "recipe=t.yaml", f"name={zero}", "method.batch_tokens=256", "launch.num_gpus=2", f"zero={zero}"),
        "trainer.per_device_train_batch_size=4",
        cwd=folder,
    )
    one, two = folder / "runs/one/rm", folder / f"runs/{zero}/rm"
    assert project.losses(two) == pytest.approx(project.losses(one), rel=1e-3)
    figures, expected = project.manifest(two)["metrics"], project.manifest(one)["metrics"]
    assert figures["eval_accuracy"] == pytest.approx(expected["eval_accuracy"])
    assert figures["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3)
    for name, tensor in project.weights(one).items():
        assert torch.allclose(tensor, project.weights(two)[name], atol=2e-4), name


def test_killed_and_run_again_it_ends_with_the_same_weights(folder):
    settings = ["trainer.save_steps=4", "trainer.max_steps=24"]
    project.ok("rm", "recipe=t.yaml", "name=calm", *settings, cwd=folder)
    run = folder / "runs/killed/rm"
    project.kill_after_a_checkpoint("rm", "recipe=t.yaml", "name=killed", *settings, run=run, cwd=folder)
    assert "resuming from step" in project.ok("rm", "recipe=t.yaml", "name=killed", *settings, cwd=folder)
    calm = project.weights(folder / "runs/calm/rm")
    assert all(torch.equal(tensor, calm[name]) for name, tensor in project.weights(run).items())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "loss", [pytest.param("pairwise", marks=SLOW), "plackett-luce", pytest.param("best-of-k", marks=SLOW)]
)
def test_every_loss_learns(folder, loss):
    recipe(folder, loss, f"loss: {loss}", steps=40)
    project.ok("rm", f"recipe={loss}.yaml", f"name={loss}", cwd=folder)
    assert project.manifest(folder / f"runs/{loss}/rm")["metrics"]["eval_accuracy"] > 0.65


def test_an_ensemble_scores_with_mean_minimum_and_spread(folder):
    recipe(folder, "three", "loss: ranking, seeds: [1, 2, 3]", steps=30)
    project.ok("rm", "recipe=three.yaml", "name=three", cwd=folder)
    run = folder / "runs/three/rm"
    assert project.weights(run)["score.weight"].shape[0] == 3
    assert project.manifest(run)["metrics"]["eval_spread"] > 0
    project.ok("score", "runs/three/rm", "data=rm.jsonl", "out=three.jsonl", cwd=folder)
    row = json.loads((folder / "three.jsonl").read_text().splitlines()[0])
    for at, score in enumerate(row["scores"]):
        heads = row["heads"][at]
        assert len(heads) == 3 and len(set(heads)) == 3
        assert score == pytest.approx(sum(heads) / 3, abs=1e-4)
        assert row["minimum"][at] == pytest.approx(min(heads), abs=1e-4)
        assert row["spread"][at] == pytest.approx(torch.tensor(heads).std().item(), abs=1e-4)


def test_lora_trains_and_saves_the_head(folder):
    lora = ["lora.r=4", "lora.alpha=8", "trainer.learning_rate=1e-2"]
    recipe(folder, "adapter", "loss: ranking", steps=40)
    project.ok("rm", "recipe=adapter.yaml", "name=adapter", *lora, "model.dtype=bfloat16", cwd=folder)
    run = folder / "runs/adapter/rm"
    saved = project.weights(run)
    assert [tensor.dtype for name, tensor in saved.items() if name.endswith("score.weight")] == [torch.float32]
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)
    project.ok("rm", "recipe=adapter.yaml", "name=twice", *lora, "model.dtype=bfloat16", cwd=folder)
    again = project.weights(folder / "runs/twice/rm")
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved.items()), "adapters are drawn by the seed"
    project.ok("score", "runs/adapter/rm", "data=rm.jsonl", "out=a.jsonl", cwd=folder)
    project.ok("merge", "runs/adapter/rm", "--to", "merged", cwd=folder)
    project.ok("score", "merged", "data=rm.jsonl", "out=b.jsonl", cwd=folder)
    a, b = ([json.loads(line)["scores"] for line in (folder / f"{name}.jsonl").open()] for name in "ab")
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
    assert plain.config.num_labels == 1


def test_a_soft_label_pulls_to_its_probability(folder):
    rows = [
        {"prompt": f"name colours {n}", "chosen": "red gold", "rejected": "blue teal", "probability": 0.7}
        for n in range(16)
    ]
    project.write_rows(folder / "soft.jsonl", rows)
    recipe(folder, "soft", "loss: ranking", steps=80)
    project.ok("rm", "recipe=soft.yaml", "name=soft", "data.train=soft.jsonl", cwd=folder)
    # the least loss is the label's own entropy, 0.6109, where σ(Δr) = 0.7
    assert project.losses(folder / "runs/soft/rm")[-1] == pytest.approx(0.6109, abs=0.01)
    assert project.metrics(folder / "runs/soft/rm")[-1]["eval_margin"] == pytest.approx(0.847, abs=0.25)


def test_ties_are_counted_and_left_out(folder):
    rows = [
        {"prompt": f"name colours {n}", "responses": ["red", "gold", "blue"], "scores": [2, 2, 1]} for n in range(12)
    ]
    project.write_rows(folder / "tied.jsonl", rows)
    said = project.ok("rm", "recipe=t.yaml", "name=tied", "data.train=tied.jsonl", cwd=folder)
    assert "pairs of responses are tied" in said
    run = project.manifest(folder / "runs/tied/rm")
    assert run["metrics"]["ties"] == 12
    assert run["metrics"]["eval_pairs"] == 2 * run["metrics"]["eval_groups"]


def test_a_model_that_judges_by_length_is_called_that(folder):
    rows = [{"prompt": f"say {n}", "chosen": "red " * (n % 5 + 2), "rejected": "red"} for n in range(32)]
    project.write_rows(folder / "length.jsonl", rows)
    said = project.ok("rm", "recipe=t.yaml", "name=length", "data.train=length.jsonl", cwd=folder)
    assert "no better than judging by length" in said


def test_a_reward_model_is_no_parent(trained, folder):
    done = project.align("rm", "recipe=t.yaml", "name=again", "model.path=runs/long/rm", cwd=folder)
    assert done.returncode == 2 and "is a reward model" in done.stderr
    assert not (folder / "runs/again").exists()


@pytest.mark.parametrize(
    ("rows", "finding"),
    [
        ([{"prompt": "a", "responses": ["b"]}] * 4, "a single response"),
        ([{"prompt": "a", "responses": ["b", "b"]}] * 4, "fewer than two distinct responses"),
        ([{"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]}] * 4, "all scores are equal"),
        ([{"prompt": "a", "responses": ["b", "c"], "scores": [1, float("nan")]}] * 4, "NaN"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "probability": 1.5}] * 4, "probability"),
    ],
)
def test_bad_rankings_are_refused_in_one_line(folder, rows, finding):
    project.write_rows(folder / "bad.jsonl", rows)
    done = project.align("rm", "recipe=t.yaml", "name=bad", "data.train=bad.jsonl", cwd=folder)
    assert done.returncode == 2 and finding in done.stderr
    assert "Traceback" not in done.stderr and not (folder / "runs/bad").exists()


def test_score_refuses_what_is_no_reward_model(folder):
    done = project.align("score", "models/tiny", "data=rm.jsonl", cwd=folder)
    assert done.returncode == 2
    assert "models/tiny" in done.stderr and "reward model" in done.stderr and len(done.stderr.splitlines()) == 1


def test_nothing_is_left_running_or_in_shared_memory():
    assert set(Path("/dev/shm").glob(BUFFERS)) <= BEFORE
    assert "align_cli.run.worker" not in subprocess.run(["ps", "ax"], capture_output=True, text=True).stdout
