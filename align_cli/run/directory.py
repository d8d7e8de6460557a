"""A run's directory: its files, its state, and a lock that lets only one process write to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Literal

from align_cli import locks
from align_cli.errors import LaunchError

COMPLETE = "complete"
"""Marker file in a checkpoint, written after the files of all ranks; a checkpoint without it is incomplete."""

RECORD = "ranks.json"
"""File beside the checkpoints: who wrote them."""

State = Literal["absent", "unfinished", "finished", "foreign"]


class RunDirectory:
    """`runs/<name>/<stage>/`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.manifest = self.path / "manifest.json"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        """Logs of trackers such as TensorBoard."""
        self._lock: locks.Lock | None = None

    def state(self) -> State:
        """Whether the directory holds a finished run, an unfinished run, nothing, or something that is not a run."""
        # hidden files are the lock and files being written by another host of the same run
        if not self.path.exists() or (
            self.path.is_dir() and all(entry.name.startswith(".") for entry in self.path.iterdir())
        ):
            return "absent"
        if _status(self.manifest) == "complete":
            return "finished"
        return "unfinished" if self.recipe.is_file() else "foreign"

    def begun(self) -> bool:
        """Whether there are results worth keeping: checkpoints, rows, or a round of a loop."""
        made = (entry for pattern in ("*.jsonl", "*/recipe.yaml") for entry in self.path.glob(pattern))
        return self.checkpoints.exists() or any(made)

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        whole = [
            (int(match[1]), folder)
            for folder in self.checkpoints.glob("checkpoint-*")
            if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and (folder / COMPLETE).is_file()
        ]
        return max(whole)[1] if whole else None

    def batch(self) -> int | None:
        """Rows a step of the run that its checkpoints belong to; None without a complete checkpoint."""
        try:
            return json.loads((self.checkpoints / RECORD).read_text())["batch"] if self.latest_checkpoint() else None
        except (OSError, ValueError, KeyError):
            return None

    def drop_half_written(self) -> None:
        """Remove checkpoints that a kill left incomplete, so that they are never loaded."""
        for folder in self.checkpoints.glob("*checkpoint-*"):
            if folder.is_dir() and not (folder / COMPLETE).is_file():
                shutil.rmtree(folder)

    def set_aside(self) -> Path:
        """Rename the run to `<path>.old-N`, so that it can be run again. Deletes nothing. Returns the new path."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(aside)
        self.unlock()
        return aside

    def discard(self) -> None:
        """Remove a run without results (see `begun`), and its parent folders if they become empty."""
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in (self.path.parent, self.path.parent.parent):
            if folder.is_dir() and folder.name and not any(folder.iterdir()):
                folder.rmdir()

    def lock(self) -> None:
        """Lock the directory until `unlock` or process exit.

        Raises LaunchError if another process holds the lock, or if the directory cannot be locked.
        """
        while self._lock is None:
            self.path.mkdir(parents=True, exist_ok=True)
            # FileNotFoundError: another process has just renamed or removed the directory
            with contextlib.suppress(FileNotFoundError):
                self._lock = self._locked()

    def _locked(self) -> locks.Lock:
        try:
            return locks.take(self.path / ".lock")
        except locks.Taken as taken:
            remedy = f"; if it has ended, remove {taken.remove}" if taken.remove else ""
            raise LaunchError(
                f"{self.path}: another align ({taken.owner}) is using it; wait for it, stop it, or set run_dir=…"
                f"{remedy}"
            ) from None
        except FileNotFoundError:
            raise
        except OSError as error:
            raise LaunchError(
                f"{self.path}: cannot be locked ({error.strerror}); correct the directory's permissions or its file "
                "system, or set run_dir=…"
            ) from None

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _status(manifest: Path) -> str | None:
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, TypeError, KeyError):  # incomplete, or not written by align
        return None


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that readers see either the old or the complete new content."""
    part = file.with_name(f".{file.name}.part")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def trim_metrics(file: Path, step: int) -> None:
    """Remove metrics lines after `step` and an incomplete last line: a resumed run writes them again."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    write_atomically(file, "".join(f"{line}\n" for line in kept))
