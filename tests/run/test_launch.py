"""How ranks are started, and how a process finds out that it is one."""

import json
import os
import socket
import subprocess
from pathlib import Path

import machines
import pytest

from align_cli import driver
from align_cli.errors import LaunchError
from align_cli.recipe.sections import Launch
from align_cli.run import environment as environment_of
from align_cli.run import hosts, launch
from align_cli.run.directory import RunDirectory
from align_cli.run.environment import of_ranks, quiet


def words(here, **settings):
    return launch.command("dpo", here, Launch(**settings))


def value(line, option):
    return line[line.index(option) + 1]


def test_local_ranks_get_a_free_port(here):
    line = words(here, num_gpus=8)
    assert value(line, "--num_gpus") == "8" and value(line, "--master_addr") == "127.0.0.1"
    assert 1024 < int(value(line, "--master_port")) < 65536
    assert "--hostfile" not in line and "--no_ssh" not in line


def test_some_hosts_of_several(here):
    line = words(here, hostfile="hosts", num_nodes=2, node_rank=0, master_addr="a", master_port=5)
    assert value(line, "--hostfile") == "hosts" and value(line, "--num_nodes") == "2"
    assert value(line, "--master_addr") == "a" and value(line, "--master_port") == "5"
    line = words(here, hostfile="hosts", node_rank=0, master_addr="a")
    assert value(line, "--master_port") == "29500" and "--num_nodes" not in line and "--include" not in line


def test_fewer_ranks_than_slots_on_each_host(here):
    (here / "hosts").write_text("a slots=4\nb slots=2\nc slots=8\n")
    line = words(here, hostfile="hosts", num_nodes=2, num_gpus=3)
    assert value(line, "--include") == "a:0,1,2@b:0,1"
    assert not {"--num_gpus", "--num_nodes"} & set(line), "the launcher takes them only without --include"
    assert value(words(here, hostfile="hosts", num_gpus=1), "--include") == "a:0@b:0@c:0"


@pytest.mark.parametrize("rank", [0, 1])
def test_one_host_of_several(here, rank):
    line = words(here, hostfile="hosts", node_rank=rank, master_addr="a")
    assert "--no_ssh" in line and value(line, "--node_rank") == str(rank)


def test_the_ranks_read_the_prepared_run(here):
    assert words(here, num_gpus=2)[-5:] == ["--no_local_rank", "--module", "align_cli.run.worker", "dpo", str(here)]


@pytest.fixture
def environment(here, monkeypatch):
    kept = dict(os.environ)
    monkeypatch.setattr(os, "environ", kept)
    return kept


def test_alone_unless_told(environment):
    assert not launch.called_by_launcher()
    environment["WORLD_SIZE"] = "4"
    assert not launch.called_by_launcher(), "a world size that somebody exported makes no rank"
    environment |= {"RANK": "3", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert launch.called_by_launcher()
    assert environment["LOCAL_RANK"] == "0", "libraries take a process without LOCAL_RANK for the only one"
    environment |= {"WORLD_SIZE": "1", "RANK": "0"}
    assert not launch.called_by_launcher()
    environment |= {"WORLD_SIZE": "", "SLURM_STEP_NUM_TASKS": "", "SLURM_PROCID": ""}
    assert not launch.called_by_launcher()


SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1234567"}


def test_the_first_task_of_slurm_is_where_all_meet(environment):
    environment.update(SLURM | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9"})
    launch.adopt_slurm()
    assert os.environ["MASTER_ADDR"] == "10.0.0.9"


def test_what_is_set_stays(environment):
    environment.update(SLURM | {"MASTER_ADDR": "node7", "MASTER_PORT": "1234"})
    assert launch.called_by_launcher()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node7", "1234")


def test_every_task_of_a_job_reckons_the_same_port(environment):
    environment.update(SLURM)
    launch.adopt_slurm()
    assert os.environ["MASTER_PORT"] == str(20000 + 1234567 % 20000)
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("2", "4", "0")


def test_a_batch_script_is_no_rank(environment):
    environment.update(SLURM | {"SLURM_STEP_NUM_TASKS": "1"})
    assert not launch.called_by_launcher() and "RANK" not in os.environ
    del environment["SLURM_STEP_NUM_TASKS"]
    assert not launch.called_by_launcher()


def test_ranks_that_torchrun_made_under_slurm_are_torchruns(environment):
    environment.update(SLURM | {"RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1", "WORLD_SIZE": "8"})
    assert launch.called_by_launcher()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "8")


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"])
def test_what_slurm_counts_is_a_number(environment, name):
    environment.update(SLURM | {name: "4(x2)"})
    with pytest.raises(LaunchError, match=rf"^{name}: is '4\(x2\)', not a number"):
        launch.adopt_slurm()
    environment[name] = ""
    launch.adopt_slurm()
    assert ("RANK" in environment) == (name in ("SLURM_LOCALID", "SLURM_JOB_ID"))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[3-6]", "node3"),
        ("node[03-06,9],gpu1", "node03"),
        ("gpu7,node[1-2]", "gpu7"),
        ("rack[1-2]n[4,7-9]", "rack1n4"),
        ("node5", "node5"),
        ("", "127.0.0.1"),
    ],
)
def test_slurms_short_list_of_nodes_is_no_address(environment, nodes, first):
    environment.update(SLURM | {"SLURM_STEP_NODELIST": nodes})
    launch.adopt_slurm()
    assert os.environ["MASTER_ADDR"] == first


def test_libraries_are_told_to_be_quiet_but_not_overruled(environment):
    environment["TRANSFORMERS_VERBOSITY"] = "info"
    environment.pop("HF_HUB_DISABLE_TELEMETRY", None)
    quiet()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info" and os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize("exported", [{"WORLD_SIZE": "4"}, {"RANK": "3"}, {"LOCAL_RANK": "1"}, {"WORLD_SIZE": ""}])
def test_what_does_not_make_a_rank_is_not_left_for_libraries(environment, exported):
    environment.update(exported)
    quiet()
    assert not set(exported) & set(os.environ)
    environment.update({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"})
    quiet()
    assert (os.environ["WORLD_SIZE"], os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("4", "3", "3")


def test_a_single_rank_that_nobody_launched_is_a_process_like_any_other(environment):
    environment.update({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"})
    environment.pop("MASTER_ADDR", None)
    quiet()
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & set(os.environ)


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_ranks_without_a_place_to_meet_are_one_line(environment, name):
    environment.update({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"})
    assert launch.called_by_launcher()
    environment[name] = ""
    with pytest.raises(LaunchError, match=f"^{name}: is not set, but WORLD_SIZE is 2; start all ranks by one launcher"):
        launch.called_by_launcher()


# --- GPUs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def four(environment, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        environment.pop(name, None)
    gpus = tuple(driver.Gpu(at, "NVIDIA H100", 80 << 30, f"GPU-{at}", (9, 0)) for at in range(4))
    monkeypatch.setattr(driver, "present", lambda: gpus)
    return environment


@pytest.mark.parametrize(
    ("visible", "count", "slots"),
    [(None, 2, "0,1"), ("2,3", 2, "2,3"), ("3,1", 1, "3"), ("GPU-3,GPU-0", 2, "3,0"), ("1,2,3", 3, "1,2,3")],
)
def test_ranks_get_the_gpus_that_are_visible_here(four, here, visible, count, slots):
    if visible is not None:
        four["CUDA_VISIBLE_DEVICES"] = visible
    line = words(here, num_gpus=count)
    assert value(line, "--include") == f"localhost:{slots}" and "--num_gpus" not in line
    # the launcher says that it ignores this variable, and counts the GPUs that it sees
    assert "CUDA_VISIBLE_DEVICES" not in of_ranks(Launch(num_gpus=count))


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_ranks_on_the_cpu_beside_hidden_gpus(four, here, hidden):
    four["CUDA_VISIBLE_DEVICES"] = hidden
    quiet()
    assert value(words(here, num_gpus=2), "--num_gpus") == "2"
    assert four["DS_ACCELERATOR"] == "cpu"
    # what a rank gets from the launcher, and makes of it
    four["CUDA_VISIBLE_DEVICES"] = "0,1"
    quiet()
    assert (four["CUDA_VISIBLE_DEVICES"], four["HIP_VISIBLE_DEVICES"]) == ("", "-1")


def test_rocm_counts_from_the_first_visible_gpu(four, here, monkeypatch):
    gpus = tuple(driver.Gpu(at, "AMD gfx942", 192 << 30, f"GPU-{at}", gfx=90402) for at in range(4))
    monkeypatch.setattr(driver, "present", lambda: gpus)
    four["CUDA_VISIBLE_DEVICES"] = "1,3"
    assert value(words(here, num_gpus=2), "--include") == "localhost:0,1"
    variables = of_ranks(Launch(num_gpus=2))
    # the launcher sets CUDA_VISIBLE_DEVICES=0,1 for ranks, and HIP's own variable counts before it
    assert variables["HIP_VISIBLE_DEVICES"] == "1,3" and "CUDA_VISIBLE_DEVICES" not in variables


RANK = """
import json, os, pathlib, sys
sys.path.insert(0, "machine")
from align_cli import driver
from align_cli.run import environment
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
given = {name: os.environ.get(name) for name in names}
assert len(driver.present()) == 4
environment.quiet()
kept = {name: os.environ.get(name) for name in names}
pathlib.Path(f"rank{given['RANK']}.json").write_text(json.dumps([given, kept, sys.argv[1:]]))
"""


@pytest.mark.parametrize("accelerators", ["4", None])
def test_what_the_launcher_gives_to_ranks(four, here, monkeypatch, accelerators):
    """DeepSpeed's launcher itself, which on this machine counts CPUs as accelerators."""
    (here / "rank.py").write_text(RANK)
    machines.torch_of(machines.nvidia(here / "machine", [machines.gpu(at) for at in range(4)]), "cuda")
    four["CUDA_VISIBLE_DEVICES"] = "2,3" if accelerators else ""
    quiet()
    line = ["rank" if word == "align_cli.run.worker" else word for word in words(here, num_gpus=2)]
    variables = of_ranks(Launch(num_gpus=2)) | {"DS_ACCELERATOR": "cpu"}
    variables |= {"LOCAL_SIZE": accelerators} if accelerators else {}
    variables["PYTHONPATH"] = f"{here}:{Path(driver.__file__).parents[1]}"
    done = subprocess.run(line, env=variables, cwd=here, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "ignoring" not in done.stdout, done.stdout + done.stderr
    ranks = [json.loads((here / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [given["LOCAL_RANK"] for given, *_ in ranks] == ["0", "1"]
    assert {given["WORLD_SIZE"] for given, *_ in ranks} == {"2"}
    shown = "2,3" if accelerators else "0,1"
    assert [given["CUDA_VISIBLE_DEVICES"] for given, *_ in ranks] == [shown] * 2, "it sets this for CPU ranks, too"
    assert {(kept["CUDA_VISIBLE_DEVICES"], kept["HIP_VISIBLE_DEVICES"]) for _, kept, _ in ranks} == {("", "-1")}
    assert [argv for *_, argv in ranks] == [["dpo", str(here)]] * 2


def test_hosts_get_what_ranks_need(environment):
    environment.update(HF_HOME="/cache", HF_TOKEN="secret", JUDGE_KEY="key", EDITOR="vi", CUDA_VISIBLE_DEVICES="3")
    exported = environment_of.exported(["JUDGE_KEY", "ABSENT"])
    assert exported.items() >= {"HF_HOME": "/cache", "HF_TOKEN": "secret", "JUDGE_KEY": "key"}.items()
    assert not exported.keys() & {"EDITOR", "CUDA_VISIBLE_DEVICES", "ABSENT", environment_of.PARENT}


def test_a_port_that_is_taken_is_one_line(here):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"launch.master_port: {port} cannot be used"):
            launch.ranks("sft", RunDirectory(here), Launch(num_gpus=2, master_port=port))
    environment_of.check_port(port)


def test_hosts_of_this_machine_need_no_ssh():
    assert all(map(hosts.is_this_machine, ("localhost", "127.0.0.1", "127.0.0.2", socket.gethostname())))
    assert not any(map(hosts.is_this_machine, ("192.0.2.1", "host.invalid")))


def test_other_hosts_cannot_reach_a_loopback_address(here):
    (here / "hosts").write_text("localhost slots=1\n192.0.2.1 slots=1\n")
    with pytest.raises(LaunchError, match="other hosts cannot reach the first one as localhost"):
        hosts.run("sft", here, Launch(hostfile="hosts"), [])
