"""Exclusive locks on a file: the kernel's flock, or, on file systems without it, a lock file with a heartbeat.

flock ends with its process. NFS without a lock daemon, Lustre mounted without `flock` and some FUSE file systems refuse
it (ENOLCK, ENOSYS, EOPNOTSUPP), which says nothing about other processes. There, `<name>.held` is created exclusively;
it names its owner, who touches it every BEAT seconds. It is stale if the owner ran here and is gone, or if it ran on
another machine and its heartbeat stopped. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
"""flock's errors if another process holds the lock."""
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
"""flock's errors if the file system has no locks."""
BEAT = 10.0
"""Seconds between heartbeats."""
STALE = 120.0
"""Seconds without a heartbeat after which the lock of another machine is stale."""
POLL = 0.2
"""Seconds between attempts where the kernel cannot wake a waiting process."""


class Taken(Exception):
    """Another process holds the lock. `owner` describes it; `remove` is the file to delete if it has ended, if any."""

    def __init__(self, owner: str, remove: Path | None = None):
        super().__init__(owner)
        self.owner, self.remove = owner, remove


class Lock:
    """A lock that this process holds until `release` or its end."""

    def __init__(self, flocked: TextIO | None, held: _Held | None = None):
        self._flocked, self._held = flocked, held

    def release(self) -> None:
        """Let other processes take it."""
        if self._held is not None:
            self._held.release()
        if self._flocked is not None:
            self._flocked.close()


def take(file: Path) -> Lock:
    """Lock a file, which is created; its folder must exist.

    Raises Taken if another process holds the lock, FileNotFoundError if the folder is removed or renamed meanwhile, and
    OSError if the file cannot be locked for another reason.
    """
    opened = file.open("a+")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        opened.seek(0)
        owner = opened.read().split("\n")[0]
        opened.close()
        if error.errno in TAKEN:
            raise Taken(_described(owner)) from None
        if error.errno in UNSUPPORTED:
            return Lock(None, _Held(file))
        raise
    if not _is_at(opened, file):
        opened.close()
        raise FileNotFoundError(errno.ENOENT, "renamed while it was locked", str(file))
    opened.truncate(0)
    opened.write(this_process())
    opened.flush()
    return Lock(opened)


@contextlib.contextmanager
def waiting(file: Path) -> Iterator[None]:
    """A context that one process at a time is in; the others wait."""
    with file.open("a") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX)
            held = None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            held = _wait(file)
        try:
            yield
        finally:
            if held is not None:
                held.release()


def _wait(file: Path) -> _Held:
    while True:
        try:
            return _Held(file)
        except Taken:
            time.sleep(POLL)


class _Held:
    """`<name>.held`, created exclusively by this process. It is reached through its folder's descriptor, since a run's
    directory may be renamed while it is locked."""

    def __init__(self, file: Path):
        self.name = f"{file.name}.held"
        self.text = f"{this_process()}\n{_machine()}\n{uuid.uuid4()}\n"
        self.folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            while not self._created():
                self._drop_if_stale(file.with_name(self.name))
            there = _stat(file.parent)
            if there is None or not os.path.samestat(os.fstat(self.folder), there):
                os.unlink(self.name, dir_fd=self.folder)
                raise FileNotFoundError(errno.ENOENT, "renamed while it was locked", str(file))
        except BaseException:
            os.close(self.folder)
            raise
        self.ended = threading.Event()
        self.beats = threading.Thread(target=self._beat, daemon=True)
        self.beats.start()

    def release(self) -> None:
        self.ended.set()
        self.beats.join()
        if self._read(self.name) == self.text:
            os.unlink(self.name, dir_fd=self.folder)
        os.close(self.folder)

    def _created(self) -> bool:
        try:
            made = os.open(self.name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=self.folder)
        except FileExistsError:
            return False
        with os.fdopen(made, "w") as stream:
            stream.write(self.text)
        return True

    def _drop_if_stale(self, file: Path) -> None:
        """Remove the lock of an owner that is gone. Raises Taken if it isn't stale."""
        text, silent = self._read(self.name), self._silent()
        if text is None or silent is None:  # released meanwhile
            return
        owner, machine = [*text.split("\n"), "", ""][:2]
        if _runs(owner) if machine == _machine() else silent < STALE:
            raise Taken(f"{_described(owner)}, last seen {silent:.0f} s ago", file)
        aside = f".{uuid.uuid4()}.stale"
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.name, aside, src_dir_fd=self.folder, dst_dir_fd=self.folder)
            if self._read(aside) != text:  # another process has replaced the stale lock by its own just now
                os.rename(aside, self.name, src_dir_fd=self.folder, dst_dir_fd=self.folder)
            else:
                os.unlink(aside, dir_fd=self.folder)

    def _read(self, name: str) -> str | None:
        try:
            with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=self.folder)) as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def _silent(self) -> float | None:
        """Seconds since the last heartbeat by the file server's clock, since hosts' clocks differ."""
        probe = f".{uuid.uuid4()}.now"
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=self.folder))
        try:
            now = os.stat(probe, dir_fd=self.folder).st_mtime
            return max(0.0, now - os.stat(self.name, dir_fd=self.folder).st_mtime)
        except FileNotFoundError:
            return None
        finally:
            os.unlink(probe, dir_fd=self.folder)

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            text = self._read(self.name)
            if text is None:  # removed with its folder
                return
            if text != self.text:
                # this machine was silent for so long (suspended, cut off) that another took the lock and writes here
                sys.stderr.write(f"{self.name}: was taken by {_described(text)} meanwhile; this process ends\n")
                sys.stderr.flush()
                os._exit(1)
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.name, dir_fd=self.folder)


def this_process() -> str:
    """host:pid of this process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _machine() -> str:
    """What tells whether a process id of a lock file is one of ours: the boot and the namespace of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _runs(owner: str) -> bool:
    """Whether the process of `host:pid` runs on this machine."""
    try:
        os.kill(int(owner.rpartition(":")[2]), 0)
    except PermissionError:  # it is another user's
        return True
    except (ProcessLookupError, ValueError):
        return False
    return True


def _described(owner: str) -> str:
    """`process 12` for an owner `host:pid` on this host, `process 12 on node3` otherwise."""
    host, _, pid = owner.split("\n")[0].rpartition(":")
    if not pid:
        return "an unknown process"
    return f"process {pid}" if host == socket.gethostname() else f"process {pid} on {host}"


def _is_at(opened: TextIO, file: Path) -> bool:
    """Whether an open file is still the one at its path."""
    there = _stat(file)
    return there is not None and os.path.samestat(os.fstat(opened.fileno()), there)


def _stat(path: Path) -> os.stat_result | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat()
    return None
