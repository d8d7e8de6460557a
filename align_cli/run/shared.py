"""Checks that all ranks see the same run directory and cache, before anything is loaded.

Checkpoints, merged parents, rows and the cache are written by one rank and read by others, so that hosts must share
their file system. A host with a folder of its own under the same path would train on something else without an error.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from align_cli import distributed
from align_cli.errors import LaunchError
from align_cli.run import environment

PATIENCE = 20.0
"""Seconds in which a new file must become visible; network file systems keep listings for some time."""


def check(run: Path, cache: Path) -> None:
    """Raise LaunchError on every rank, naming the hosts, if a rank does not see what rank 0 writes into the folders.

    Must be called on all ranks.
    """
    folders = {"run_dir": run, "working directory": cache}
    token = distributed.from_rank_0(lambda: _write(list(folders.values())))
    missing = [key for key, folder in folders.items() if not _appears(folder / f".shared-{token}")]
    reports = distributed.gather((environment.host(), missing))
    if distributed.rank() == 0:
        for folder in folders.values():
            (folder / f".shared-{token}").unlink(missing_ok=True)
    home, blind = reports[0][0], dict.fromkeys((key, host) for host, keys in reports for key in keys)
    for key, folder in folders.items():
        if hosts := [host for where, host in blind if where == key]:
            raise LaunchError(
                f"{key}: {', '.join(hosts)} {'does' if len(hosts) == 1 else 'do'} not see what {home} writes into "
                f"{folder.absolute()}; {'set run_dir= to' if folder is run else 'start in'} a folder on a file system "
                "that all hosts share"
            )


def _write(folders: list[Path]) -> str:
    """Write a file with an unused name into each folder. Returns the token in its name."""
    token = secrets.token_hex(8)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".shared-{token}").touch()
    return token


def _appears(file: Path) -> bool:
    """Whether the file exists, now or soon."""
    until = time.monotonic() + PATIENCE
    while not file.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True
