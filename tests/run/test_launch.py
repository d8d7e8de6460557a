"""How ranks are started, and how a process finds out that it is one."""

import os

import pytest

from align_cli.recipe.sections import Launch
from align_cli.run import launch
from align_cli.run.environment import quiet


def words(here, **settings):
    return launch.command("dpo", here, Launch(**settings))


def value(line, option):
    return line[line.index(option) + 1]


def test_local_ranks_get_a_free_port(here):
    line = words(here, num_gpus=8)
    assert value(line, "--num_gpus") == "8" and value(line, "--master_addr") == "127.0.0.1"
    assert 1024 < int(value(line, "--master_port")) < 65536
    assert "--hostfile" not in line and "--no_ssh" not in line


def test_several_hosts_over_ssh(here):
    line = words(here, hostfile="hosts", num_nodes=2, num_gpus=4, master_addr="a", master_port=5)
    assert value(line, "--hostfile") == "hosts" and value(line, "--num_nodes") == "2"
    assert value(line, "--num_gpus") == "4" and value(line, "--master_addr") == "a"
    assert value(line, "--master_port") == "5" and "--no_ssh" not in line
    line = words(here, hostfile="hosts")
    assert value(line, "--master_port") == "29500" and "--num_gpus" not in line and "--num_nodes" not in line


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
    environment["RANK"] = "3"
    assert launch.called_by_launcher()
    environment["WORLD_SIZE"] = "1"
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
    environment.update(SLURM | {"RANK": "0", "WORLD_SIZE": "8"})
    assert launch.called_by_launcher()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "8")


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
