"""Hosts, ranks and GPUs."""

import pytest

from align_cli.errors import LaunchError
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


def test_a_host_without_slots(here):
    assert "hosts:1" in refused(hostfile(here, "one slots=0\n"))[0]


def test_ranks_over_hosts(here):
    file = hostfile(here, "a slots=4\nb slots=8\nc slots=8\n")
    assert devices.world_size(Launch(hostfile=file)) == 20
    assert devices.world_size(Launch(hostfile=file, num_nodes=2)) == 12
    assert devices.world_size(Launch(hostfile=file, num_gpus=6)) == 4 + 6 + 6
    assert devices.world_size(Launch(num_gpus=3)) == 3


def test_under_a_launcher_its_word_counts(here, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert devices.world_size(Launch(num_gpus=2)) == 6


def test_the_machine_decides_only_about_its_own_ranks(here, monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: 1)
    assert devices.problems(Launch(hostfile=hostfile(here, "a slots=8\nb slots=8\n"))) == []
    assert len(devices.problems(Launch(num_gpus=8))) == 1


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
    assert devices.problems(Launch(node_rank=0, num_nodes=2)) == [
        "launch.node_rank: needs launch.hostfile; add it or remove node_rank",
        "launch.num_nodes: needs launch.hostfile; add it or remove num_nodes",
    ]


@pytest.mark.parametrize(("visible", "seen"), [(None, 4), ("0,1", 2), ("", 0), ("-1", 0), ("0,1,2,3,4,5", 4)])
def test_gpus_that_may_be_used(monkeypatch, tmp_path, visible, seen):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.gpus() == seen
