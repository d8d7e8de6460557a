"""Environment variables of training processes, set before libraries are imported. Imports no torch."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterable

from align_cli import driver, locks
from align_cli.errors import LaunchError
from align_cli.recipe.sections import Launch
from align_cli.run import devices

HOST = "ALIGN_HOST"
"""Name of this machine in the hostfile."""
READY = "align: this host is ready"
"""The line by which `run.host` greets the command."""
EXPORTED = (
    *("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "CUDA_", "UCX_", "FI_", "TRITON_"),
    *("OMP_", "MKL_", "ONEDNN_", "ATEN_", "DS_", "ALIGN_", "PYTHON", "LD_LIBRARY_PATH", "VLLM_", "WANDB_", "MLFLOW_"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
)
"""Beginnings of the names of variables that ranks on other hosts need."""
OWN = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "PYTHONSTARTUP", "PYTHONHOME")
"""Exceptions: each host has its own."""
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
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
    }.items():
        os.environ.setdefault(key, value)
    ranks = devices.outer_ranks()
    if ranks is None or (ranks == 1 and not os.environ.get("MASTER_ADDR")):
        # somebody exported them, or they are empty, or name no place where the only rank could meet itself
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
    variables = os.environ | {PARENT: locks.this_process()}
    seen = devices.used(launch)
    if not seen:
        # ranks on one machine slow each other down if each uses as many threads as there are cores
        ranks = launch.num_gpus or 1
        if launch.hostfile is not None:
            ranks = list(devices.slots(launch).values())[launch.node_rank or 0]
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


def exported(names: Iterable[str]) -> dict[str, str]:
    """The variables of this process that ranks on other hosts need, and those in `names`."""
    wanted = set(names)
    return {
        key: value
        for key, value in os.environ.items()
        if key in wanted or (key.startswith(EXPORTED) and key not in (*OWN, PARENT))
    }


def host() -> str:
    """The name of this machine: the hostfile's, so that messages name hosts as the user does, or its own."""
    return os.environ.get(HOST) or socket.gethostname()


def use_interface_to(address: str) -> None:
    """Make gloo use the network interface that leads to rank 0. By itself it takes the one that the machine's own name
    resolves to, which is the loopback interface on many machines, so that other hosts cannot connect to it."""
    import psutil

    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        kind, _, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing, but chooses the route
            own = probe.getsockname()[0]
    except OSError:  # joining fails with a better message
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == own for entry in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def check_port(port: int) -> None:
    """Raise LaunchError if another process on this machine listens at rank 0's port: ranks would join its run."""
    with socket.socket() as probe:
        # as torch does: connections of a run that has just ended may linger
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise LaunchError(
                f"launch.master_port: {port} cannot be used on {host()} ({error.strerror}); set it to a free port"
            ) from None
