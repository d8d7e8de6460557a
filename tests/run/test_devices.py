"""Hosts, ranks and GPUs."""

from pathlib import Path

import pytest

from align_cli import driver
from align_cli.errors import LaunchError
from align_cli.hardware import Machine
from align_cli.recipe.sections import Launch
from align_cli.run import devices


def hostfile(here, text):
    (here / "hosts").write_text(text)
    return "hosts"


def refused(name):
    with pytest.raises(LaunchError) as caught:
        devices.hosts(name)
    return list(caught.value.lines)


def test_hosts_keep_their_order_without_comments_and_blank_lines(here):
    file = hostfile(here, "\n# head\n  zeta   slots=2   # the first\nalpha slots=16\n\n")
    assert list(devices.hosts(file).items()) == [("zeta", 2), ("alpha", 16)]


def test_every_bad_line_is_named(here):
    file = hostfile(here, "one slots=four\ntwo\nthree slots=1\nthree slots=1\n")
    assert refused(file) == [
        "hosts:1: 'one slots=four' is not `host slots=N`; correct this line",
        "hosts:2: 'two' is not `host slots=N`; correct this line",
        "hosts:4: host three is named twice; write one line with all its slots",
    ]


def test_a_hostfile_without_hosts_or_that_is_not_there(here):
    assert "names no host" in refused(hostfile(here, "# none\n"))[0]
    assert refused("nope") == ["launch.hostfile: nope: no such file; its lines read `host slots=8`"]
    assert devices.problems(Launch(hostfile="nope")) == refused("nope")


def test_a_hostfile_that_is_no_text_or_cannot_be_read(here):
    (here / "latin").write_bytes("höst slots=1\n".encode("latin-1"))
    assert refused("latin") == ["launch.hostfile: latin: is not UTF-8 text; save it as UTF-8"]
    if Path("/proc/1/mem").exists():
        assert "/proc/1/mem: cannot be read (" in refused("/proc/1/mem")[0]


def test_a_host_without_slots(here):
    assert "hosts:1" in refused(hostfile(here, "one slots=0\n"))[0]


def test_ranks_over_hosts(here):
    file = hostfile(here, "a slots=4\nb slots=8\nc slots=8\n")
    assert devices.world_size(Launch(hostfile=file)) == 20
    assert devices.world_size(Launch(hostfile=file, num_nodes=2)) == 12
    assert devices.world_size(Launch(hostfile=file, num_gpus=6)) == 4 + 6 + 6
    assert devices.world_size(Launch(num_gpus=3)) == 3


def test_one_rank_on_each_host_is_not_the_default(here):
    file = hostfile(here, "a slots=4\nb slots=8\n")
    assert devices.world_size(devices.resolved(Launch(hostfile=file, num_gpus=1))) == 2
    assert devices.world_size(devices.resolved(Launch(hostfile=file))) == 12
    assert devices.world_size(devices.resolved(Launch(hostfile=file, num_gpus="auto"))) == 12


@pytest.fixture
def machine(here, monkeypatch):
    """Gives this process GPUs with these names."""
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)

    def put(*names, ids="GPU"):
        found = [driver.Gpu(at, name, 80 << 30, f"{ids}-{at}", (9, 0)) for at, name in enumerate(names)]
        monkeypatch.setattr(driver, "present", lambda: tuple(found))

    return put


def test_auto_is_all_visible_gpus_or_one_rank(machine, monkeypatch):
    machine()
    assert devices.resolved(Launch(num_gpus="auto")).num_gpus == 1
    machine("T4", "T4", "T4")
    assert devices.resolved(Launch(num_gpus="auto")).num_gpus == 3
    assert devices.resolved(Launch()).num_gpus == 1 and devices.resolved(Launch(num_gpus=2)).num_gpus == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    launch = devices.resolved(Launch(num_gpus="auto"))
    assert launch.num_gpus == 2 and [gpu.index for gpu in devices.used(launch)] == [2, 0]


def test_precision_is_that_of_the_gpus_in_use(here, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    mixed = driver.Gpu(0, "A100", 80 << 30, capability=(8, 0)), driver.Gpu(1, "T4", 16 << 30, capability=(7, 5))
    monkeypatch.setattr(driver, "present", lambda: mixed)
    assert devices.machine(Launch()) == Machine(gpu=True, bf16=True)
    assert devices.machine(Launch(num_gpus="auto")) == Machine(gpu=True, bf16=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not devices.machine(Launch()).gpu


def test_under_a_launcher_its_word_counts(machine, monkeypatch):
    machine("T4")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert devices.world_size(Launch(num_gpus=2)) == 2, "a world size that somebody exported"
    monkeypatch.setenv("RANK", "5")
    assert devices.world_size(Launch(num_gpus=2)) == 6
    assert devices.problems(Launch(num_gpus=2)) == [], "each task of srun may see one GPU"


def test_the_machine_decides_only_about_its_own_ranks(here, machine):
    machine("T4")
    assert devices.problems(Launch(hostfile=hostfile(here, "a slots=8\nb slots=8\n"))) == []


def test_more_ranks_than_gpus(machine, monkeypatch):
    machine()
    assert devices.problems(Launch(num_gpus=8)) == [], "ranks run on the CPU"
    machine("NVIDIA T4", "NVIDIA T4")
    assert devices.problems(Launch(num_gpus=2)) == []
    assert devices.problems(Launch(num_gpus=8)) == [
        "launch.num_gpus: is 8, but this machine has 2 × NVIDIA T4; set launch.num_gpus=2"
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert devices.problems(Launch(num_gpus=2)) == [
        "launch.num_gpus: is 2, but CUDA_VISIBLE_DEVICES=1 shows 1 of 2 × NVIDIA T4; set launch.num_gpus=1, or let "
        "this variable name more"
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.problems(Launch(num_gpus=2)) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0,MIG-1")
    machine("NVIDIA A30 MIG 1g.6gb", "NVIDIA A30 MIG 1g.6gb", ids="MIG")
    assert devices.problems(Launch(num_gpus=2)) == [
        "launch.num_gpus: is 2, but a MIG device (NVIDIA A30 MIG 1g.6gb) runs one rank; set launch.num_gpus=1"
    ]


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_variables_of_launchers_that_hold_no_number(here, monkeypatch, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert devices.outer_ranks() == 2
    monkeypatch.setenv(name, " ")
    assert devices.outer_ranks() is None
    monkeypatch.setenv(name, "two")
    with pytest.raises(LaunchError, match=f"^{name}: is 'two', not a number; unset this variable"):
        devices.outer_ranks()


def test_a_rank_beyond_the_world(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(LaunchError, match="^RANK: is 3, but WORLD_SIZE is 1; "):
        devices.outer_ranks()


def test_one_host_of_many(here):
    file = hostfile(here, "a slots=1\nb slots=1\n")
    assert devices.problems(Launch(hostfile=file, node_rank=1, master_addr="a")) == []
    lines = devices.problems(Launch(hostfile=file, node_rank=2))
    assert "give 0 to 1" in lines[0] and lines[1].startswith("launch.master_addr: is missing")


def test_more_hosts_than_the_file_names(here):
    file = hostfile(here, "a slots=1\nb slots=1\nc slots=1\n")
    (line,) = devices.problems(Launch(hostfile=file, num_nodes=4))
    assert line == "launch.num_nodes: is 4, but hosts names 3 hosts; add hosts or lower it"
    (line,) = devices.problems(Launch(hostfile=file, num_nodes=2, node_rank=2, master_addr="a"))
    assert line.endswith("names 3 hosts, of which num_nodes takes 2; give 0 to 1")


def test_host_settings_without_hosts(here):
    assert devices.problems(devices.resolved(Launch(node_rank=0, num_nodes=2))) == [
        "launch.node_rank: needs launch.hostfile; add it or remove node_rank",
        "launch.num_nodes: needs launch.hostfile; add it or remove num_nodes",
    ]
