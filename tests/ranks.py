"""Ranks as plain processes, without a launcher: each runs the same code, in a folder of its own if it is given one."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(code: str, *folders: Path, **environment: str) -> list[subprocess.Popen]:
    """One rank per folder, which runs `code` there."""
    meet = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=folder,
            env=os.environ | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]


def said(code: str, *folders: Path, **environment: str) -> list[str]:
    """The output of each rank; all must succeed."""
    ranks = start(code, *folders, **environment)
    printed = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(printed)
    return [text.strip() for text in printed]
