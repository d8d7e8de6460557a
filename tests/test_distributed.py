"""The device of each rank."""

import os
from types import SimpleNamespace

import pytest

from align_cli import distributed, driver
from align_cli.errors import LaunchError


@pytest.fixture
def rank(here, monkeypatch):
    """The GPU that a rank chooses, and the LOCAL_RANK that it leaves for libraries."""

    def chosen(local, seen):
        taken = []
        monkeypatch.setattr(
            distributed.torch,
            "cuda",
            SimpleNamespace(
                is_available=lambda: seen > 0,
                device_count=lambda: seen,
                set_device=taken.append,
                current_device=lambda: taken[-1],
            ),
        )
        if local is None:
            monkeypatch.delenv("LOCAL_RANK", raising=False)
        else:
            monkeypatch.setenv("LOCAL_RANK", local)
        distributed.use_local_device()
        return distributed.device().index, os.environ.get("LOCAL_RANK")

    return chosen


@pytest.mark.parametrize(
    ("local", "seen", "index", "left"),
    [
        ("3", 1, 0, "0"),  # srun --gpus-per-task=1, or a single entry in CUDA_VISIBLE_DEVICES
        ("3", 8, 3, "3"),
        ("0", 8, 0, "0"),
        ("1", 2, 1, "1"),
        (None, 1, 0, None),
    ],
)
def test_a_rank_takes_its_gpu_among_those_it_sees(rank, local, seen, index, left):
    assert rank(local, seen) == (index, left)


def test_more_ranks_than_gpus(rank):
    with pytest.raises(LaunchError, match="^LOCAL_RANK: is 3, but this rank sees 2 GPUs; start one rank per GPU"):
        rank("3", 2)


def test_on_the_cpu_nothing_is_chosen(rank, monkeypatch):
    monkeypatch.setattr(driver, "visible", tuple)
    assert rank("3", 0) == (None, "3")


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(rank, monkeypatch):
    monkeypatch.setattr(driver, "visible", lambda: (driver.Gpu(0, "NVIDIA H100", 80 << 30),))
    with pytest.raises(LaunchError, match="^torch .*: cannot use 1 × NVIDIA H100; update the driver"):
        rank("0", 0)
