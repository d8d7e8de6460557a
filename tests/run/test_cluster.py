"""`align` on two hosts over ssh: it equals one process, and no way to end it leaves a process anywhere."""

import os
import signal
import time
from pathlib import Path

import project
import psutil
import pytest
import torch
from cluster import Cluster

PPO = """name: t
model: { path: models/tiny }
reward: { python: "mine:brevity" }
data: { train: prompts.jsonl, max_length: 64, batch_size: 8 }
generation: { max_new_tokens: 8 }
method: { epochs: 1, minibatches: 2 }
trainer: { learning_rate: 1.0e-3, max_steps: 4, per_device_train_batch_size: 2, logging_steps: 1 }
"""
BREVITY = """
def brevity(prompts, responses):
    return [-float(len(response)) for response in responses]
"""
LONG = ("trainer.max_steps=20000", "trainer.save_steps=5")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()


@pytest.fixture
def home(cluster):
    return project.build(cluster.folder / f"home-{len(list(cluster.folder.iterdir()))}")


def begun(cluster, home: Path, *words: str, **kwargs):
    """A run on both hosts that has a checkpoint."""
    process, until = cluster.start(*words, cwd=home, **kwargs), time.monotonic() + 600
    while not list(home.glob("runs/*/*/checkpoints/checkpoint-*/complete")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.1)
    return process


def ends(cluster, process) -> tuple[str, float]:
    """What a run prints until it ends, and how many seconds that takes; nothing of it may be left on any host."""
    started = time.monotonic()
    said = process.communicate(timeout=900)[0]
    took = time.monotonic() - started
    cluster.nothing_is_left()
    return said, took


def resumes(cluster, home: Path, words: tuple[str, ...]) -> None:
    """The same command with fewer steps resumes."""
    step = max(int(mark.parent.name.split("-")[1]) for mark in home.glob("runs/*/*/checkpoints/*/complete"))
    recipe = home / "runs/t/sft/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: 20000", f"max_steps: {step + 2}"))
    words = [f"trainer.max_steps={step + 2}" if word.startswith("trainer.max_steps") else word for word in words]
    code, said = cluster.align(*words, cwd=home)
    assert code == 0 and f"resuming from step {step}" in said, said
    cluster.nothing_is_left()


def needs_ssh(cluster) -> None:
    if not cluster.real:
        pytest.skip("needs root, iproute2 and openssh-server for network namespaces")


def test_a_host_that_cannot_be_reached_is_one_line(cluster, home):
    needs_ssh(cluster)
    shell = cluster.settings[0].rstrip("'")
    code, said = cluster.align("sft", "recipe=t", f"{shell} -p 2223'", cwd=home)
    assert code == 2, said
    (line,) = said.splitlines()
    assert line.startswith(f"launch.hostfile: {cluster.second}: ") and "Connection refused" in line
    assert not (home / "runs").exists()
    cluster.nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "none"])
def test_sft_on_two_hosts_is_one_process(cluster, home, zero):
    code, said = cluster.align("sft", "recipe=t", "name=two", f"zero={zero}", cwd=home)
    assert code == 0, said
    project.ok("sft", "recipe=t", "name=one", cwd=home)
    assert project.manifest(home / "runs/two/sft")["world_size"] == 2
    for name, tensor in project.weights(home / "runs/one/sft").items():
        assert torch.allclose(tensor, project.weights(home / "runs/two/sft")[name], atol=5e-4), name
    cluster.nothing_is_left()


@pytest.mark.slow
def test_ppo_on_two_hosts_is_one_process(cluster, home):
    """Its reward is Python code, which the hosts are allowed to run with the command."""
    project.write_rows(home / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(32)])
    (home / "mine.py").write_text(BREVITY)
    project.recipe(home, "ppo", "t", PPO)
    code, said = cluster.align("ppo", "recipe=t", "name=two", "zero=zero3", "--allow-code", cwd=home)
    assert code == 0, said
    project.ok("ppo", "recipe=t", "name=one", "--allow-code", cwd=home)
    for name, tensor in project.weights(home / "runs/one/ppo").items():
        assert torch.allclose(tensor, project.weights(home / "runs/two/ppo")[name], atol=5e-4), name
    cluster.nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_no_process(cluster, home, sent, code):
    words = ("sft", "recipe=t", *LONG)
    process = begun(cluster, home, *words)
    process.send_signal(sent)
    said, _ = ends(cluster, process)
    assert process.returncode == code, said
    assert "resumes with the same command" in said and "Traceback" not in said
    resumes(cluster, home, words)


@pytest.mark.slow
def test_a_second_signal_kills(cluster, home):
    process = begun(cluster, home, "sft", "recipe=t", *LONG)
    (rank,) = cluster.ranks(cluster.second)
    # a rank that hangs: no step ends any more
    os.kill(rank, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said, _ = ends(cluster, process)
    assert process.returncode == 130, said


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["second", "first"])
def test_a_host_whose_ranks_are_killed_ends_the_run(cluster, home, killed):
    words = ("sft", "recipe=t", *LONG)
    process = begun(cluster, home, *words)
    host = getattr(cluster, killed)
    for rank in cluster.ranks(host):
        os.kill(rank, signal.SIGKILL)
    said, took = ends(cluster, process)
    assert process.returncode not in (0, None) and took < 60
    assert any(line.startswith(f"{host}: rank") for line in said.splitlines()), said
    assert "Traceback" not in said
    resumes(cluster, home, words)


@pytest.mark.slow
def test_a_host_that_loses_everything_ends_the_run(cluster, home):
    """Ranks, launcher and the session of sshd are killed at once."""
    needs_ssh(cluster)
    process = begun(cluster, home, "sft", "recipe=t", *LONG)
    for pid in sorted(cluster.processes(cluster.second)):
        os.kill(pid, signal.SIGKILL)
    said, took = ends(cluster, process)
    assert process.returncode == 2 and took < 60, said
    assert any(line.startswith(f"{cluster.second}: ") for line in said.splitlines()), said


@pytest.mark.slow
def test_a_cable_that_is_pulled_ends_the_run_on_both_sides(cluster, home):
    """No packet says that the other host is gone; both find out by themselves."""
    needs_ssh(cluster)
    process = begun(cluster, home, "sft", "recipe=t", *LONG)
    cluster.pull_the_cable()
    try:
        said, _ = ends(cluster, process)
    finally:
        cluster.plug_it_in()
    assert process.returncode == 2, said
    assert any(line.startswith(f"{cluster.second}: ") for line in said.splitlines()), said


@pytest.mark.slow
def test_ranks_end_with_the_command(cluster, home):
    process = begun(cluster, home, "sft", "recipe=t", *LONG)
    process.kill()
    ends(cluster, process)


@pytest.mark.slow
def test_secrets_reach_the_ranks_and_no_command_line(cluster, home):
    secret = "hf_0123456789abcdef"
    environment = os.environ | {"HF_TOKEN": secret, "UNRELATED": "value"}
    process = begun(cluster, home, "sft", "recipe=t", *LONG, env=environment)
    for host in cluster.hosts:
        (rank,) = cluster.ranks(host)
        assert psutil.Process(rank).environ()["HF_TOKEN"] == secret
    if cluster.real:
        (rank,) = cluster.ranks(cluster.second)
        assert "UNRELATED" not in psutil.Process(rank).environ()
    lines = [one.info["cmdline"] for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"]]
    assert any("align_cli.run.host" in " ".join(line) for line in lines)
    assert not any(secret in " ".join(line) for line in lines)
    assert not [file for file in home.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]
    process.kill()
    ends(cluster, process)


@pytest.mark.slow
def test_a_second_run_on_the_same_hosts_is_told_that_the_port_is_taken(cluster, home):
    process = begun(cluster, home, "sft", "recipe=t", *LONG)
    code, said = cluster.align("sft", "recipe=t", "name=other", cwd=home)
    assert code == 2, said
    (line,) = said.splitlines()
    assert line.startswith("launch.master_port: 29500 cannot be used")
    process.send_signal(signal.SIGTERM)
    ends(cluster, process)
