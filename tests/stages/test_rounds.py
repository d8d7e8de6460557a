"""Iterative DPO and SPIN as whole runs: their rounds, that they can be killed in each phase, and that ranks change
nothing."""

import json
import random
import signal
import time

import project
import pytest
import torch
from project import COLD, WARM

DPO = """name: t
model: { path: models/tiny }
reward: { path: runs/t/rm }
data: { train: prompts.jsonl, eval: dpo.jsonl, max_length: 96, batch_size: 8 }
generation: { max_new_tokens: 12, batch: 32 }
method: { rounds: 2, k: 4, missing_eos: null }
trainer: { learning_rate: 3.0e-3, max_steps: 16, per_device_train_batch_size: 8, logging_steps: 1 }
samples: [name colours 3]
"""
SPIN = """name: t
model: { path: models/tiny }
data: { train: sft.jsonl, eval: 0.25, max_length: 96, batch_size: 8 }
generation: { max_new_tokens: 12, batch: 8 }
method: { iterations: 2, beta: [0.1, 0.2], learning_rate: [1.0e-3, 5.0e-4] }
trainer: { max_steps: 3, per_device_train_batch_size: 8, logging_steps: 1 }
"""
FOLDERS = {"dpo": ["round-1", "round-2"], "spin": ["iteration-0", "iteration-1"]}


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = project.build(tmp_path_factory.mktemp("rounds"), rows=48)
    draw = random.Random(1)
    pairs = [
        {
            "prompt": f"name colours {n}",
            "chosen": " ".join(draw.choices(WARM, k=4)),
            "rejected": " ".join(draw.choices(COLD, k=4)),
        }
        for n in range(48)
    ]
    project.write_rows(folder / "rm.jsonl", pairs)
    project.write_rows(folder / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(64)])
    project.recipe(
        folder,
        "rm",
        text="""name: t
model: { path: models/tiny }
data: { train: rm.jsonl, max_length: 96, batch_size: 8 }
trainer: { learning_rate: 3.0e-3, max_steps: 12 }
""",
    )
    project.recipe(folder, "dpo", text=DPO)
    project.recipe(folder, "spin", text=SPIN)
    project.ok("rm", "recipe=t.yaml", cwd=folder)
    return folder


@pytest.fixture(scope="module", params=["dpo", "spin"])
def run(request, folder):
    """One process, undisturbed: the yardstick."""
    stage = request.param
    said = project.ok(stage, "recipe=t.yaml", cwd=folder)
    return stage, folder / f"runs/t/{stage}", said


# --- what they leave ----------------------------------------------------------------------------------------------


def test_every_round_is_a_run_with_its_pairs(run):
    stage, path, _ = run
    for name in FOLDERS[stage]:
        made, pairs = project.manifest(path / name), rows(path / name / "pairs.jsonl")
        assert made["status"] == "complete" and made["metrics"]["steps"] == (16 if stage == "dpo" else 3)
        assert {"prompt", "chosen", "rejected"} <= set(pairs[0]) and pairs[0]["chosen"] != pairs[0]["rejected"]
        assert project.weights(path / name)
    first, last = (path / name for name in FOLDERS[stage])
    assert project.manifest(last)["parents"][0]["path"] == str(first.relative_to(path.parents[2]))
    final = project.weights(path)
    assert all(torch.equal(tensor, final[name]) for name, tensor in project.weights(last).items())
    assert not all(torch.equal(tensor, final[name]) for name, tensor in project.weights(first).items())


def test_every_round_starts_at_ln_2_with_margin_0(run):
    stage, path, _ = run
    for name in FOLDERS[stage]:
        first = project.metrics(path / name)[0]
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
        assert project.losses(path / name)[-1] < first["loss"]


def test_the_loops_own_directory_is_a_run_like_any_other(run):
    from transformers import AutoModelForCausalLM

    stage, path, said = run
    made = project.manifest(path)
    assert made["model_of"] == FOLDERS[stage][1]
    assert [entry["role"] for entry in made["parents"]][-1] in ("round", "iteration")
    steps = [row["step"] for row in project.metrics(path) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    AutoModelForCausalLM.from_pretrained(path)
    again = project.ok(stage, "recipe=t.yaml", cwd=path.parents[2])
    assert "finished and unchanged" in again


def test_lineage_shows_the_rounds(run):
    stage, path, _ = run
    said = project.ok("lineage", f"runs/t/{stage}", cwd=path.parents[2])
    assert all(f"runs/t/{stage}/{name}" in said for name in FOLDERS[stage])
    assert "models/tiny" in said and "stale" not in said


def test_rounds_of_dpo_answer_fresh_prompts_and_keep_the_scores(run):
    stage, path, _ = run
    if stage == "spin":
        pytest.skip("of dpo")
    answered = [
        [row["prompt"][0]["content"] for row in rows(path / name / "responses.jsonl")] for name in FOLDERS[stage]
    ]
    assert [len(set(asked)) for asked in answered] == [32, 32] and not set(answered[0]) & set(answered[1])
    for name in FOLDERS[stage]:
        said = {  # of the answers that say something
            row["prompt"][0]["content"]: [
                s for s, text in zip(row["scores"], row["responses"], strict=True) if text.strip()
            ]
            for row in rows(path / name / "responses.jsonl")
        }
        scores = {prompt: (max(each), min(each)) for prompt, each in said.items() if each}
        for pair in rows(path / name / "pairs.jsonl"):
            assert (pair["score_chosen"], pair["score_rejected"]) == scores[pair["prompt"][0]["content"]]
    first, second = (project.manifest(path / name)["sampled"] for name in FOLDERS[stage])
    assert first["kl"] == 0 and second["kl"] > 0 and second["reward"] > first["reward"]
    (said,) = rows(path / "samples.jsonl")
    assert {"before", "after"} <= set(said)


def test_the_pairs_of_a_round_are_data_for_any_stage(run):
    stage, path, _ = run
    name = FOLDERS[stage][0]
    words = [f"data.train=runs/t/{stage}/{name}/pairs.jsonl", "method.rounds=null", "reward=null", "data.eval=null"]
    said = project.ok("check", "dpo", "recipe=t.yaml", "name=again", *words, cwd=path.parents[2])
    assert "(preference)" in said and " 0 dropped" in said


def test_spin_trains_on_this_iterations_replies_and_the_last_ones(run):
    stage, path, said = run
    if stage == "dpo":
        pytest.skip("of spin")
    first, second = (project.manifest(path / name) for name in FOLDERS[stage])
    assert (first["sampled"]["pairs"], second["sampled"]["pairs"]) == (36, 72)
    assert second["sampled"]["held_out"] == 12
    # human replies are told from a random model's within three steps
    assert first["metrics"]["eval_rewards/accuracies"] == 1.0 and "accuracy 1.000" in said


# --- kills --------------------------------------------------------------------------------------------------------


def kill_once(words, folder, when):
    process = project.start(*words, cwd=folder)
    until = time.monotonic() + 900
    while not when():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def lines(file):
    return file.read_bytes().count(b"\n") if file.is_file() else 0


@pytest.mark.parametrize("stage", ["dpo", pytest.param("spin", marks=pytest.mark.slow)])
def test_killed_in_each_phase_it_ends_with_the_same_weights_and_pairs(folder, stage):
    long = ["trainer.max_steps=30", "trainer.save_steps=5", "generation.batch=4"]
    project.ok(stage, "recipe=t.yaml", "name=calm", *long, cwd=folder)
    calm, run = folder / f"runs/calm/{stage}", folder / f"runs/killed/{stage}"
    words = (stage, "recipe=t.yaml", "name=killed", *long)
    first, second = (run / name for name in FOLDERS[stage])
    answers = ".responses.part-0.jsonl" if stage == "dpo" else ".pairs.part-0.jsonl"
    kill_once(words, folder, lambda: lines(first / answers) >= 2)  # while it answers
    assert 2 <= lines(first / answers) < 32
    kill_once(words, folder, lambda: lines(first / "metrics.jsonl") > 8)  # while it trains
    assert not (first / "manifest.json").exists()
    kill_once(words, folder, lambda: (first / "manifest.json").exists())  # between rounds
    assert not (second / "manifest.json").exists()
    said = project.ok(*words, cwd=folder)
    assert "is finished" in said
    for name in FOLDERS[stage]:
        assert (run / name / "pairs.jsonl").read_bytes() == (calm / name / "pairs.jsonl").read_bytes()
    for place in ("", *FOLDERS[stage]):
        wanted = project.weights(calm / place)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in project.weights(run / place).items()), place


def test_a_signal_while_it_answers_stops_it_in_order(folder):
    words = ("spin", "recipe=t.yaml", "name=signal", "generation.batch=1")
    process = project.start(*words, cwd=folder)
    file, until = folder / "runs/signal/spin/iteration-0/.pairs.part-0.jsonl", time.monotonic() + 900
    while lines(file) < 2:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 143 and "resumes with the same command" in said, said
    assert 2 <= lines(file) < 36


# --- ranks --------------------------------------------------------------------------------------------------------

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("run", "zero"),
    [
        ("dpo", "zero3"),
        ("spin", "zero2"),
        *(
            pytest.param(*of, marks=SLOW)
            for of in (("dpo", "zero2"), ("dpo", "none"), ("spin", "zero3"), ("spin", "none"))
        ),
    ],
    indirect=["run"],
)
def test_two_ranks_are_one_process(run, folder, zero):
    stage, one, _ = run
    project.ok(
        *(stage, "recipe=t.yaml", f"name={zero}", f"zero={zero}", "launch.num_gpus=2"),
        *("trainer.per_device_train_batch_size=4",),
        cwd=folder,
    )
    two = folder / f"runs/{zero}/{stage}"
    for name in FOLDERS[stage]:
        told = [[(row["chosen"], row["rejected"]) for row in rows(path / name / "pairs.jsonl")] for path in (one, two)]
        assert told[0] == told[1], name
        assert project.losses(two / name) == pytest.approx(project.losses(one / name), rel=2e-3, abs=2e-4)
    wanted = project.weights(one)
    for name, tensor in project.weights(two).items():
        assert torch.allclose(tensor, wanted[name], atol=5e-4), name


# --- ends ---------------------------------------------------------------------------------------------------------


def test_spin_stops_when_replies_cannot_be_told_apart(folder):
    """The human replies are the model's own, drawn with other seeds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from align_cli.data import chat
    from align_cli.generation.sampling import Sampler, respond

    tokenizer = AutoTokenizer.from_pretrained(folder / "models/tiny")
    model = AutoModelForCausalLM.from_pretrained(folder / "models/tiny")
    asks = [[{"role": "user", "content": f"name colours {n}"}] for n in range(160)]
    draw = random.Random(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):  # until it speaks in letters, which text can hold
        words = [" ".join(draw.choices(WARM, k=2)) for _ in range(16)]
        turns = [chat.conversation(tokenizer, draw.choice(asks), [{"role": "assistant", "content": w}]) for w in words]
        t = max(len(turn.ids) for turn in turns)
        ids = torch.tensor([turn.ids + [0] * (t - len(turn.ids)) for turn in turns])
        labels = torch.tensor([turn.labels + [-100] * (t - len(turn.ids)) for turn in turns])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "models/fluent")
    tokenizer.save_pretrained(folder / "models/fluent")
    prompts = [chat.prompt_ids(tokenizer, ask) for ask in asks]
    ends = chat.generation_ends(tokenizer)
    seeds = list(range(1000, 1160))
    drawn = respond(model, prompts, seeds, sampler=Sampler(40), ends=ends, pad=tokenizer.pad_token_id)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
    own = [
        {"messages": [*ask, {"role": "assistant", "content": text}]}
        for ask, text in zip(asks, texts, strict=True)
        if text.strip() and "\ufffd" not in text
    ]
    assert len(own) > 140
    project.write_rows(folder / "own.jsonl", own)
    # replies that are cut off would be told from those that end
    words = ("model.path=models/fluent", "data.train=own.jsonl", "data.eval=0.4", "data.drop_empty=true")
    words += ("generation.max_new_tokens=40",)
    said = project.ok("spin", "recipe=t.yaml", "name=alike", *words, "method.learning_rate=1e-4", cwd=folder)
    made = project.manifest(folder / "runs/alike/spin")
    assert "can no longer be told apart" in said and made["stopped_when_alike"].startswith("iteration 0")
    assert made["iterations"][0]["eval_rewards/accuracies"] < 0.6
    assert not (folder / "runs/alike/spin/iteration-1").exists()


def test_a_guard_ends_the_rounds_and_the_manifest_says_why(folder):
    said = project.ok(
        *("dpo", "recipe=t.yaml", "name=guarded", "trainer.learning_rate=1e-2", "method.rounds=3", "data.eval=null"),
        "guards=[{metric: kl, above: 0.5, act: stop, patience: 1}]",
        cwd=folder,
    )
    made = project.manifest(folder / "runs/guarded/dpo")
    assert "kl" in made["stopped_by_guard"] and made["model_of"] == "round-1" and "before this round trains" in said
    assert not (folder / "runs/guarded/dpo/round-2/manifest.json").exists()


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "words", "finding"),
    [
        ("dpo", ["reward=null"], "method.rounds needs it to score answers"),
        ("dpo", ["method.k=1"], "method.k"),
        ("dpo", ["method.rounds=100"], "too few for 100 rounds"),
        ("dpo", ["method.prompts=40"], "set method.prompts=32 or less"),
        ("dpo", ["method.fresh=sources"], "names 1 sources for 2 rounds"),
        ("dpo", ["data.eval=0.1"], "evaluation needs preferences"),
        ("dpo", ["generation.max_new_tokens=96"], "leaves no room for a prompt"),
        ("dpo", ["generation.engine=vllm"], "support only hf"),
        ("dpo", ["method.rounds=null"], "has no effect in offline DPO"),
        ("dpo", ["guards=[{metric: gold_reward, below: 0}]"], "gold: is missing"),
        ("spin", ["method.beta=[0.1]"], "has 1 entries for 2 iterations"),
        ("spin", ["data.eval=null"], "set data.eval=0.05"),
        ("spin", ["trainer.learning_rate=1e-4"], "keep one of the two"),
        ("spin", ["model.path=runs/none/sft"], "runs/none/sft does not exist"),
        ("spin", ["method.prompts=100"], "data.train holds 48"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(folder, stage, words, finding, monkeypatch):
    from align_cli.errors import AlignError
    from align_cli.run import preflight

    monkeypatch.chdir(folder)
    with pytest.raises(AlignError) as caught:
        preflight.load(stage, ["recipe=t.yaml", "name=bad", *words], starting=True)
    assert any(finding in line for line in caught.value.lines), caught.value.lines


def test_check_prints_every_round(folder):
    said = project.ok("check", "dpo", "recipe=t.yaml", "name=plan", cwd=folder)
    assert "round-1 from models/tiny · 32 prompts × 4 answers" in said and "round-2 from round-1" in said
    said = project.ok("check", "spin", "recipe=t.yaml", "name=plan", cwd=folder)
    assert "β 0.1, learning rate 0.001" in said and "β 0.2, learning rate 0.0005" in said
