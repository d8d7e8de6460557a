"""The environment of processes that train, set before libraries are imported. Imports no torch."""

from __future__ import annotations

import os
import socket
import warnings

from align_cli.run import devices

PARENT = "ALIGN_PARENT"
"""host:pid of the command that started the ranks; they end when it is gone, so that a lock freed by its death does
not leave them writing."""


def quiet() -> None:
    """Settings that libraries read while they are imported: no telemetry, no chatter, no forked tokenizer warnings."""
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
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def this_process() -> str:
    """host:pid."""
    return f"{socket.gethostname()}:{os.getpid()}"
