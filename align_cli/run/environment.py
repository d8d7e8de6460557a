"""Environment variables of training processes, set before libraries are imported. Imports no torch."""

from __future__ import annotations

import os
import socket
import warnings

from align_cli import driver
from align_cli.recipe.sections import Launch
from align_cli.run import devices

PARENT = "ALIGN_PARENT"
"""host:pid of the command that started the ranks. They exit when it ends, because its lock is then released and another
process could write to the run."""


def quiet() -> None:
    """Set variables that libraries read on import: no telemetry, less logging, no warnings about forked tokenizers.

    Also removes what would make libraries take this process for a rank or use a GPU that is hidden. Raises LaunchError
    for variables of launchers that hold no number.
    """
    warnings.simplefilter("ignore")
    for key, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "ACCELERATE_LOG_LEVEL": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "DS_LOG_LEVEL": "error",
        # an index means the same GPU here, in CUDA and in nvidia-smi
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTHONWARNINGS": "ignore",
    }.items():
        os.environ.setdefault(key, value)
    if devices.outer_ranks() is None:
        # somebody exported them, or they are empty
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)
    if not devices.gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if driver.present():
            # DeepSpeed's launcher has overwritten what hid them
            os.environ.update(driver.HIDDEN)


def one_gpu() -> None:
    """Let this process see one GPU, the first visible one. To be called before torch looks for GPUs: with more than
    one, TRL's trainers raise ValueError and transformers' split each batch over all of them."""
    if seen := driver.visible()[:1]:
        os.environ.update(driver.showing(seen))


def of_ranks(launch: Launch) -> dict[str, str]:
    """Variables of DeepSpeed's launcher, and of the ranks that it starts."""
    variables = os.environ | {PARENT: this_process()}
    seen = devices.used(launch)
    if not seen:
        # ranks on one machine slow each other down if each uses as many threads as there are cores
        ranks = launch.num_gpus or 1
        variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        variables.setdefault("LOCAL_SIZE", str(ranks))
        # the launcher prints a line about GPUs that it does not use
        variables |= driver.HIDDEN
    elif launch.hostfile is None:
        # the launcher counts the GPUs that it sees, and --include names some of them
        variables.pop("CUDA_VISIBLE_DEVICES", None)
        if seen[0].gfx is not None:
            variables |= driver.showing(seen)
    return variables


def free_port() -> int:
    """An unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def this_process() -> str:
    """host:pid of this process."""
    return f"{socket.gethostname()}:{os.getpid()}"
