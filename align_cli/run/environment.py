"""Environment variables of training processes, set before libraries are imported. Imports no torch."""

from __future__ import annotations

import os
import socket
import warnings

from align_cli.run import devices

PARENT = "ALIGN_PARENT"
"""host:pid of the command that started the ranks. They exit when it ends, because its lock is then released and another
process could write to the run."""


def quiet() -> None:
    """Set variables that libraries read on import: no telemetry, less logging, no warnings about forked tokenizers."""
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
        "PYTHONWARNINGS": "ignore",
    }.items():
        os.environ.setdefault(key, value)
    if not devices.gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def free_port() -> int:
    """An unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def this_process() -> str:
    """host:pid of this process."""
    return f"{socket.gethostname()}:{os.getpid()}"
