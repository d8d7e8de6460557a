"""Whole runs through the command line: what they leave, that they can be killed, and that ranks change nothing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import project
import pytest
import tiny
import torch
from project import align, losses, manifest, metrics, ok, start, weights


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return project.build(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module", params=["sft", "dpo"])
def one(request, home):
    """A stage run by one process: the yardstick."""
    ok(request.param, "recipe=t", cwd=home)
    return request.param, home / "runs" / "t" / request.param


def logits(run, ids=((5, 9, 33, 70, 2),)):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(run)(torch.tensor(ids)).logits


def test_a_finished_run_says_what_it_was_made_from(one, home):
    stage, run = one
    made = manifest(run)
    assert made["stage"] == stage and made["status"] == "complete" and made["world_size"] == 1
    (parent,) = made["parents"]
    assert parent["role"] == "policy" and parent["path"] == "models/tiny"
    (data,) = made["data"]
    assert (data["source"], data["rows_read"], data["rows_used"]) == (f"{stage}.jsonl", 32, 32)
    assert made["recipe_sha256"] == made["files"]["recipe.yaml"]["sha256"]
    assert {"model.safetensors", "metrics.jsonl", "tokenizer.json", "chat_template.jinja"} <= set(made["files"])
    first = metrics(run)[0]
    assert {"step", "epoch", "loss", "tokens_per_second"} <= set(first) and first["step"] == 1


def test_dpo_starts_at_ln_2_with_margin_0_and_learns(home, one):
    stage, run = one
    if stage == "dpo":
        rows = metrics(run)
        assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert rows[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
        assert rows[-1]["rewards/accuracies"] == 1.0
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_ranks_give_the_losses_and_weights_of_one_process(one, home, zero):
    stage, run = one
    ok(stage, "recipe=t", f"run_dir=runs/{zero}/{stage}", f"zero={zero}", "launch.num_gpus=2", cwd=home)
    sharded = home / "runs" / zero / stage
    assert losses(sharded) == pytest.approx(losses(run), rel=1e-3)
    assert manifest(sharded)["world_size"] == 2 and manifest(sharded)["zero_stage"] == int(zero[-1])
    torch.testing.assert_close(logits(sharded), logits(run), rtol=1e-3, atol=1e-3)


def test_a_second_run_does_nothing_and_a_changed_recipe_keeps_the_first(one, home):
    stage, run = one
    before = (run / "manifest.json").read_bytes()
    assert "finished and unchanged" in ok(stage, "recipe=t", cwd=home)
    assert (run / "manifest.json").read_bytes() == before
    again = home / "runs" / "again" / stage
    ok(stage, f"recipe=runs/t/{stage}/recipe.yaml", f"run_dir=runs/again/{stage}", cwd=home)
    repeated = weights(again)
    assert all(torch.equal(tensor, repeated[name]) for name, tensor in weights(run).items())
    before = (again / "manifest.json").read_bytes()
    said = ok(stage, "recipe=t", f"run_dir=runs/again/{stage}", "seed=7", cwd=home)
    assert "seed 42 → 7" in said and f"runs/again/{stage}.old-1" in said
    assert (again.with_name(f"{stage}.old-1") / "manifest.json").read_bytes() == before


LONG = ("trainer.max_steps=40", "trainer.save_steps=8", "trainer.save_total_limit=2")


def wait_for_step(run, step, process):
    limit = time.monotonic() + 900
    while time.monotonic() < limit:
        file = run / "metrics.jsonl"
        if file.is_file() and file.read_text().count("\n") >= step:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    raise AssertionError("no progress")


def test_a_parent_that_is_made_anew_while_a_run_trains_is_recorded_as_it_was_read(home):
    from align_cli.run.manifest import parent

    shutil.copytree(home / "models/tiny", home / "models/anew")
    words = ("sft", "recipe=t", "run_dir=runs/anew/sft", "model.path=models/anew", *LONG, "trainer.max_steps=24")
    run, read = home / "runs/anew/sft", parent("policy", str(home / "models/anew"))["fingerprint"]
    process = start(*words, cwd=home)
    wait_for_step(run, 2, process)
    tiny.model(home / "models/anew", seed=1)
    assert process.wait(timeout=900) == 0
    (entry,) = manifest(run)["parents"]
    assert entry["fingerprint"] == read != parent("policy", str(home / "models/anew"))["fingerprint"]
    said = ok(*words, cwd=home)
    assert "running again (policy models/anew has changed since)" in said

    # and while it lies there half-finished
    shutil.rmtree(run)
    project.kill_after_a_checkpoint(*words, run=run, cwd=home)
    tiny.model(home / "models/anew", seed=2)
    done = align(*words, cwd=home)
    assert done.returncode == 2 and "is unfinished, and its policy models/anew has changed since" in done.stderr
    tiny.model(home / "models/anew", seed=1)
    assert "resuming from step" in ok(*words, cwd=home)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_kill_9_and_the_same_command_end_with_the_weights_of_an_undisturbed_run(home, stage):
    ok(stage, "recipe=t", f"run_dir=runs/whole/{stage}", *LONG, cwd=home)
    killed = home / "runs" / "killed" / stage
    words = (stage, "recipe=t", f"run_dir=runs/killed/{stage}", *LONG)
    process = start(*words, cwd=home)
    wait_for_step(killed, 19, process)
    process.kill()
    process.wait()
    assert not (killed / "manifest.json").exists()
    assert "resuming from step 16" in ok(*words, cwd=home)
    whole = weights(home / "runs" / "whole" / stage)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(killed).items())
    steps = [row["step"] for row in metrics(killed)]
    assert steps == list(range(1, 41))


def test_a_half_written_checkpoint_is_never_picked_up(home):
    words = ("sft", "recipe=t", "run_dir=runs/torn/sft", *LONG)
    process = start(*words, cwd=home)
    run = home / "runs" / "torn" / "sft"
    wait_for_step(run, 18, process)
    process.kill()
    process.wait()
    torn = run / "checkpoints" / "checkpoint-16"
    (torn / "complete").unlink()
    (torn / "model.safetensors").write_bytes(b"torn")
    assert "resuming from step 8" in ok(*words, cwd=home)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_two_ranks_with_a_checkpoint_that_resumes(home, sent, code):
    name = sent.name.lower()
    words = ("sft", "recipe=t", f"run_dir=runs/{name}/sft", "launch.num_gpus=2", "zero=zero2", "trainer.max_steps=60")
    process = start(*words, cwd=home)
    run = home / "runs" / name / "sft"
    wait_for_step(run, 5, process)
    process.send_signal(sent)
    said = process.communicate(timeout=900)[0]
    assert process.returncode == code, said
    assert "resumes with the same command" in said and "Traceback" not in said
    (checkpoint,) = (run / "checkpoints").glob("checkpoint-*/complete")
    step = int(checkpoint.parent.name.split("-")[1])
    assert 5 <= step < 60
    if sent == signal.SIGTERM:
        refused = align(*words[:3], "launch.num_gpus=1", *words[4:], cwd=home)
        assert refused.returncode == 2 and "launch.num_gpus=2" in refused.stderr
        assert f"resuming from step {step}" in ok(*words, cwd=home)


def test_another_recipe_does_not_continue_an_unfinished_run(home):
    words = ("sft", "recipe=t", "run_dir=runs/half/sft", "trainer.max_steps=60")
    process = start(*words, cwd=home)
    wait_for_step(home / "runs" / "half" / "sft", 2, process)
    again = align(*words, cwd=home)
    assert again.returncode == 2 and "another align" in again.stderr
    process.kill()
    process.wait()
    other = align(*words, "trainer.learning_rate=5e-4", cwd=home)
    assert other.returncode == 2
    assert "trainer.learning_rate 0.001 → 0.0005" in other.stderr and "force=true" in other.stderr


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_hosts_of_a_hostfile(one, home):
    stage, run = one
    (home / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    words = [stage, "recipe=t", f"run_dir=runs/hosts/{stage}", "zero=zero2", "launch.hostfile=hosts"]
    words += ["launch.master_addr=127.0.0.1", f"launch.master_port={free_port()}"]
    nodes = [start(*words, f"launch.node_rank={rank}", cwd=home) for rank in (0, 1)]
    said = [node.communicate(timeout=900)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert manifest(home / "runs" / "hosts" / stage)["world_size"] == 2
    assert losses(home / "runs" / "hosts" / stage) == pytest.approx(losses(run), rel=1e-3)
    assert "nothing to do" in ok(*words, "launch.node_rank=1", cwd=home)


def test_the_launcher_may_be_called_by_hand(one, home):
    stage, run = one
    line = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port()]
    line += ["--module", "align_cli", stage, "recipe=t"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*line, f"run_dir=runs/hand/{stage}"], cwd=home, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(home / "runs" / "hand" / stage) == pytest.approx(losses(run), rel=1e-3)
    wrong = subprocess.run(
        [*line, "method.bta=1"], cwd=home, env=environment, capture_output=True, text=True, timeout=900
    )
    assert wrong.returncode == 2
    assert wrong.stderr.count("method.bta: unknown key") == 1 and "Traceback" not in wrong.stderr


def test_what_fails_before_the_first_step_leaves_nothing(home):
    (home / "models" / "torn").mkdir()
    for file in (home / "models" / "tiny").iterdir():
        (home / "models" / "torn" / file.name).write_bytes(file.read_bytes())
    (home / "models" / "torn" / "tokenizer.json").write_text("{}")
    done = align("sft", "recipe=t", "model.path=models/torn", "run_dir=runs/nothing/sft", cwd=home)
    assert done.returncode == 2 and "models/torn" in done.stderr and "Traceback" not in done.stderr
    assert not (home / "runs" / "nothing").exists()


def test_samples_are_answered_before_and_after(home):
    prompts = ["name colours 1", "name colours 2"]
    ok("sft", "recipe=t", "run_dir=runs/said/sft", f"samples={json.dumps(prompts)}", "zero=zero3", cwd=home)
    rows = [json.loads(line) for line in (home / "runs/said/sft/samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert all(isinstance(row["before"], str) and isinstance(row["after"], str) for row in rows)


def greedy(run, prompt, tokens):
    """The oracle: what transformers answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tok, model = AutoTokenizer.from_pretrained(run), AutoModelForCausalLM.from_pretrained(run)
    ids = tok.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tok.decode(made, skip_special_tokens=True).strip()


def test_answers_before_training_are_those_of_the_parent_where_it_was_asked_the_same(home):
    prompts = ["name colours 1", "colours?", "name colours number 3"]
    asked = f"samples={{prompts: {json.dumps(prompts)}, max_new_tokens: 12}}"
    assert "answering 3 sample prompts, before" in ok("sft", "recipe=t", "run_dir=runs/asked/sft", asked, cwd=home)
    answers = [json.loads(line) for line in (home / "runs/asked/sft/samples.jsonl").read_text().splitlines()]
    words = ("dpo", "recipe=t", "model.path=runs/asked/sft", "trainer.max_steps=1")
    said = ok(*words, "run_dir=runs/asked/dpo", asked, cwd=home)
    assert "prompts, before" not in said and "answering 3 sample prompts, after" in said
    rows = [json.loads(line) for line in (home / "runs/asked/dpo/samples.jsonl").read_text().splitlines()]
    assert [row["before"] for row in rows] == [answer["after"] for answer in answers]
    for row in rows:
        assert row["before"] == greedy(home / "runs/asked/sft", row["prompt"], 12)
        assert row["after"] == greedy(home / "runs/asked/dpo", row["prompt"], 12)
    # other prompts, or as many tokens as the parent was not asked for, are answered anew
    for number, other in enumerate((asked.replace("12", "9"), asked.replace("colours?", "colors?"))):
        assert "prompts, before" in ok(*words, f"run_dir=runs/asked/other{number}", other, cwd=home)


@pytest.mark.slow
def test_a_lock_that_a_killed_build_left_holds_nobody_up(home, tmp_path):
    """torch waits for its lock file for ever; DeepSpeed's operator for CPU ranks is built under it."""
    folder = tmp_path / "extensions" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    words = ("sft", "recipe=t", "run_dir=runs/locked/sft", "zero=zero2", "trainer.max_steps=1")
    done = align(*words, cwd=home, env=os.environ | {"TORCH_EXTENSIONS_DIR": str(folder.parent)})
    assert done.returncode == 0, done.stderr
    assert (folder / "deepspeed_shm_comm.so").is_file()
