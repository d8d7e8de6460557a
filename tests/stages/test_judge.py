"""A judge as the reward of rounds: behind a real endpoint, and as a model in memory."""

import json
import os

import api
import project
import pytest

RECIPE = """name: {name}
model: {{ path: models/tiny }}
reward: {{ judge: {judge}, principles: [{principles}] }}
data: {{ train: prompts.jsonl, max_length: 96, batch_size: 8 }}
generation: {{ max_new_tokens: 32, batch: 16 }}
method: {{ rounds: 1, prompts: 12, k: 3, missing_eos: null }}
trainer: {{ learning_rate: 1.0e-3, max_steps: 2, per_device_train_batch_size: 8, bf16: false }}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = project.build(tmp_path_factory.mktemp("judge"))
    project.write_rows(folder / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(16)])
    (folder / "law.yaml").write_text(
        "principles:\n"
        + "".join(
            f"  - {{ id: {name}, critique_request: c, revision_request: r, comparison: 'Which has more {name}?' }}\n"
            for name in ("warmth", "light")
        )
    )
    return folder


def recipe(folder, name, judge, principles="warmth, light"):
    text = RECIPE.format(name=name, judge=judge, principles=principles).replace(
        "principles:", "constitution: law.yaml, principles:"
    )
    project.recipe(folder, "dpo", name, text)


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def served(folder):
    server = api.Server()
    recipe(
        folder, "served", f"{{ endpoint: '{server.address}', model: m, key_env: THE_KEY, concurrency: 4, retries: 2 }}"
    )
    yield server, os.environ | {"THE_KEY": api.KEY}
    server.shutdown()


def test_answers_are_compared_each_two_in_both_orders(folder, served):
    server, environment = served
    server.trouble = ["429", "cut"]
    said = project.align("dpo", "recipe=served.yaml", cwd=folder, env=environment)
    assert said.returncode == 0, said.stdout + said.stderr
    run = folder / "runs/served/dpo/round-1"
    answers = rows(run / "responses.jsonl")
    for row in answers:
        assert row["principles"][0] in ("warmth", "light")
        # the judge likes the letter e, with p = σ(1.6), whichever letter the answer has
        count = [text.count("e") for text in row["responses"]]
        for one in range(3):
            for other in range(3):
                if count[one] > count[other] and row["responses"][one].strip() and row["responses"][other].strip():
                    assert row["rewards"][one] > row["rewards"][other], row
    asked = {
        (one, other, json.dumps(row["prompt"]))
        for row in answers
        for one in row["responses"]
        for other in row["responses"]
        if one != other and one.strip() and other.strip()
    }
    assert sum(server.asked.values()) == len(asked), "each question once, none twice"
    made = project.manifest(run)["judge"]
    assert made["usage"]["requests"] == len(asked)
    assert made["usage"]["retries_rate_limit"] == made["usage"]["retries_truncated"] == 1
    assert made["constitution"][0]["path"] == "law.yaml"
    for row in rows(run / "pairs.jsonl"):
        assert row["score_chosen"] > row["score_rejected"]
        assert row["principles"]
    for file in (folder / "runs/served").rglob("*"):
        assert not file.is_file() or api.KEY.encode() not in file.read_bytes(), file


def test_a_killed_round_asks_no_question_twice(folder, served):
    server, environment = served
    server.dies_after = 40
    words = ["dpo", "recipe=served.yaml", "name=again", "generation.batch=3"]
    first = project.align(*words, cwd=folder, env=environment)
    assert first.returncode == 2, first.stdout + first.stderr
    assert "reward.judge.endpoint" in first.stderr
    assert "answered 500" in first.stderr
    assert api.KEY not in first.stdout + first.stderr
    server.dies_after = None
    second = project.align(*words, cwd=folder, env=environment)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "rows exist from an earlier attempt" in second.stdout
    # an answer's chunk is asked about as a whole, so that those of the chunk in flight may be asked again
    repeated = [text for text, times in server.asked.items() if times > 1]
    assert len(repeated) <= 6


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (["reward.judge.endpoint=http://127.0.0.1:1/v1"], "cannot be reached"),
        (["reward.judge.key_env=OTHER"], "OTHER is not set"),
        (["reward.principles=[wramth]"], "Did you mean 'warmth'"),
        (["reward.constitution=lwa"], "no such constitution"),
        (["reward.path=models/tiny"], "set exactly one of path, verify, python, judge"),
        (["reward.judge={path: models/none, endpoint: null, model: null, key_env: null}"], "models/none"),
    ],
)
def test_what_cannot_judge_is_one_line(folder, served, words, finding):
    _, environment = served
    done = project.align("dpo", "recipe=served.yaml", "name=bad", *words, cwd=folder, env=environment)
    assert done.returncode == 2
    assert finding in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((folder / "runs/bad").rglob("responses.jsonl"))


def test_a_wrong_key_is_one_line(folder, served):
    _, environment = served
    done = project.align("dpo", "recipe=served.yaml", "name=bad", cwd=folder, env=environment | {"THE_KEY": "wrong-1"})
    assert done.returncode == 2
    assert "refused the key (401)" in done.stderr
    assert "wrong-1" not in done.stderr


def test_judges_are_for_rounds(folder, served):
    _, environment = served
    text = (folder / "recipes/dpo/served.yaml").read_text().replace("rounds: 1, prompts: 12, k: 3, ", "k: 2, ")
    project.recipe(folder, "rloo", "served", text)
    done = project.align("rloo", "recipe=served.yaml", cwd=folder, env=environment)
    assert done.returncode == 2
    assert "reward.judge: works only in `align dpo` with method.rounds" in done.stderr


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_model_in_memory_judges(folder, ranks):
    recipe(folder, "local", "models/tiny")
    words = [f"name=local{ranks}", f"launch.num_gpus={ranks}", "zero=zero3" if ranks > 1 else "zero=none"]
    words.append(f"trainer.per_device_train_batch_size={8 // ranks}")
    project.ok("dpo", "recipe=local.yaml", *words, cwd=folder)
    run = folder / f"runs/local{ranks}/dpo"
    made = project.manifest(run / "round-1")
    assert {"role": "judge", "path": "models/tiny"}.items() <= made["parents"][-1].items()
    assert made["judge"]["usage"]["prompt_tokens"] > 0
    for row in rows(run / "round-1/responses.jsonl"):
        assert all(0 <= score <= 1 for score in row["rewards"])
        assert sum(row["rewards"]) == pytest.approx(1.5, abs=1e-5), "what one wins another loses"
    assert any(entry["role"] == "judge" for entry in project.manifest(run)["parents"])
