"""Starts and watches the ranks of several hosts: one ssh connection per host, over which everything goes.

DeepSpeed's own way needs pdsh, shows the exported variables in the hosts' process lists, and stops a run by killing
every DeepSpeed launcher of the user on these hosts. Here `run.host` runs on each host and starts DeepSpeed's launcher
there. It gets its order, secrets included, and later signals through the connection's input. If that input ends,
because the command was killed or the network is gone, it ends its ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from align_cli.errors import LaunchError
from align_cli.recipe.sections import Launch
from align_cli.rewards import function
from align_cli.run import devices, environment
from align_cli.signals import caught_by

OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "20",
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "3",
    "LogLevel": "ERROR",
}
"""Of ssh: it asks for nothing, and ends if a host is silent for 30 seconds."""
START = 120.0
"""Seconds in which a host must answer."""
GRACE = 30.0
"""Seconds that other hosts' ranks have to notice that a host failed, before they are stopped."""
LOST = 255
"""ssh's exit code for a broken connection."""
MASTER_PORT = 29500


class Host:
    """A host of the hostfile, and the process that leads to it."""

    def __init__(self, name: str, launch: Launch, port: int | None):
        self.name, self.local = name, is_this_machine(name)
        self.errors: list[str] = []
        self.ready = threading.Event()
        own = [sys.executable, "-m", "align_cli.run.host"]
        if not self.local:
            own += ["--greet", *([str(port)] if port else [])]
        elif port:
            environment.check_port(port)
        # a local rank 0 keeps the terminal
        output = None if self.local else subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                own if self.local else [*_ssh(launch.ssh), name, _there(own)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                bufsize=0,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise LaunchError(f"launch.ssh: {error.filename}: no such program; install it, or name another") from None
        self.pumps: list[threading.Thread] = []
        if self.local:
            self.ready.set()
        else:
            for stream, end in ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)):
                self.pumps.append(threading.Thread(target=self._pump, args=(stream, end.fileno()), daemon=True))
                self.pumps[-1].start()

    def _pump(self, stream: BinaryIO, end: int) -> None:
        """Copy what the host prints. Until it is ready, errors are collected."""
        with os.fdopen(os.dup(stream.fileno()), "rb") as lines:
            for line in lines:
                if line.strip() == environment.READY.encode():
                    self.ready.set()
                elif self.ready.is_set():
                    with contextlib.suppress(OSError):
                        os.write(end, line)
                else:
                    self.errors.append(line.decode(errors="replace").strip())

    def tell(self, text: str) -> None:
        """Send a line to the host."""
        data = text.encode() + b"\n"
        with contextlib.suppress(OSError):
            while data:
                data = data[self.process.stdin.write(data) :]

    def end(self) -> None:
        """Close the connection, which ends the host's ranks, and wait for them."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pump in self.pumps:
            pump.join(timeout=GRACE)


def run(stage: str, path: Path, launch: Launch, secrets: Iterable[str]) -> int:
    """Run a prepared run on all hosts of the hostfile, and pass on signals. Returns the exit code.

    `secrets` are names of environment variables that the recipe uses. Raises LaunchError if a host cannot be reached,
    or if hosts were lost and none of their ranks could say so.
    """
    slots = devices.slots(launch)
    address, port = launch.master_addr or _first(slots), launch.master_port or MASTER_PORT
    # the hosts get the hostfile's lines that are used
    launch = replace(launch, master_addr=address, master_port=port, num_gpus=None, num_nodes=None)
    text = "".join(f"{name} slots={number}\n" for name, number in slots.items())
    hosts: list[Host] = []
    try:
        for name in slots:
            hosts.append(Host(name, launch, None if hosts else launch.master_port))
        _wait_until_ready(hosts)
        for number, host in enumerate(hosts):
            order = {
                "stage": stage,
                "run": str(path),
                "launch": asdict(replace(launch, node_rank=number)),
                "hosts": text,
                "code": function.allowed(),
                "environment": environment.exported(secrets) | {environment.HOST: host.name},
            }
            host.tell(json.dumps(order))
        return _until_all_end(hosts)
    finally:
        for host in hosts:
            host.end()


def _until_all_end(hosts: list[Host]) -> int:
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for host in hosts:
            host.tell("stop")

    ended: dict[str, int] = {}
    due = 0.0
    with caught_by(pass_on):
        while len(ended) < len(hosts):
            for host in hosts:
                if host.name not in ended and (code := host.process.poll()) is not None:
                    ended[host.name] = code
                    if code and not due:
                        due = time.monotonic() + GRACE
            if due and time.monotonic() > due and not received:
                break  # leaving the context ends them
            time.sleep(0.2)
    failed = {name: code for name, code in ended.items() if code}
    if received and failed:
        return 128 + received[0]
    if not failed:
        return 0
    # ranks that could still speak have said what happened
    said = [code for code in failed.values() if code in (1, 2)]
    if not said:
        raise LaunchError(_why(*next(iter(failed.items()))))
    return said[0]


def _why(name: str, code: int) -> str:
    how = "the connection to it was lost" if code == LOST else f"its ranks ended with code {code}"
    return f"{name}: {how}; the same command resumes from the last checkpoint"


def _wait_until_ready(hosts: list[Host]) -> None:
    until = time.monotonic() + START
    while waiting := [host for host in hosts if not host.ready.is_set() and host.process.poll() is None]:
        if time.monotonic() > until:
            raise LaunchError(*(f"launch.hostfile: {host.name}: did not answer over ssh" for host in waiting))
        time.sleep(0.1)
    if lines := [_refusal(host) for host in hosts if not host.ready.is_set()]:
        raise LaunchError(*lines)


def _refusal(host: Host) -> str:
    """Why a host that ended before it was ready cannot start ranks."""
    for pump in host.pumps:
        pump.join(timeout=GRACE)
    said = [line for line in host.errors if line]
    if said and said[-1].startswith("launch."):
        return said[-1]
    if host.process.returncode == LOST:
        remedy = "`ssh HOST true` must work without a password; see launch.ssh"
    else:
        remedy = "hosts need this working directory and this Python environment under the same paths"
    return f"launch.hostfile: {host.name}: cannot start ranks ({said[-1] if said else 'no answer'}); {remedy}"


def is_this_machine(host: str) -> bool:
    """Whether a host's name or address belongs to this machine."""
    if host == socket.gethostname():
        return True
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return True
    return False


def _first(slots: dict[str, int]) -> str:
    """Rank 0's address: the first host. Raises LaunchError if others cannot reach it under that name."""
    first = next(iter(slots))
    if any(not is_this_machine(name) for name in slots):
        with contextlib.suppress(OSError):
            if socket.gethostbyname(first).startswith("127.") and is_this_machine(first):
                raise LaunchError(
                    f"launch.hostfile: other hosts cannot reach the first one as {first}, which is a loopback address; "
                    "name it by its network address, or set launch.master_addr"
                )
    return first


def _ssh(command: str) -> list[str]:
    words = shlex.split(command) or ["ssh"]
    if Path(words[0]).name != "ssh":
        return words
    return [*words, *(word for key, value in OPTIONS.items() for word in ("-o", f"{key}={value}"))]


def _there(command: list[str]) -> str:
    """The shell command that runs `command` on another host, in this working directory."""
    path = os.environ.get("PYTHONPATH")
    setting = ["env", f"PYTHONPATH={path}"] if path else []
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join([*setting, *command])}"
