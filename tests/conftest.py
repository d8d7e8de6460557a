"""What tests of every room share: an empty working directory, and no launcher's variables around it."""

import os

import pytest

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # tests side by side share the cores; threads that wait for a core spin, and slow each other down many times over
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))

# float32 on every machine, since results are compared to 1e-5; tests of bfloat16 ask for it
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_LAUNCH_NODE_IPADDR", "SLURM_JOB_ID")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder as the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in (*LAUNCHERS, *SLURM):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
