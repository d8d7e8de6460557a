"""Notices a rank or a host that dies, and ends all other ranks with one line that names it.

A collective waits for a lost host until its time-out, and NCCL does so without noticing a closed connection. Therefore
every rank keeps an idle TCP connection to rank 0. The kernel closes it when a rank is killed, and keep-alive probes,
which the kernel answers too, find a host that is gone. A rank that merely works for hours is not disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from align_cli import distributed
from align_cli.errors import AlignError, LaunchError
from align_cli.run import environment

PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""A connection whose other end has been silent for 10 + 4 × 5 seconds is lost."""
JOIN = 120.0
"""Seconds in which every rank must connect to rank 0."""
SETTLE = 2.0
"""Seconds in which the ranks of one host die together, so that one line names them all."""
GRACE = 10.0
"""Seconds that a rank has to report an error of its own before another one's ends it."""
RESUME = "the same command resumes from the last checkpoint"


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """A context in which the loss of any rank ends this one. Must be entered on all ranks, after `distributed.join`."""
    if distributed.world_size() == 1:
        yield
        return
    hosts = distributed.gather(environment.host())
    watch = _Hub(hosts) if distributed.rank() == 0 else _Spoke(hosts)
    threading.Thread(target=watch.run, daemon=True).start()
    try:
        yield
    except AlignError as error:
        watch.leave(error.exit_code, error.lines)
        raise
    except Exception:
        # when a rank dies, the others' collectives fail with a traceback of their own; the watch knows why
        time.sleep(2 * GRACE)
        watch.leave(1)
        raise
    except BaseException:
        watch.leave(130)
        raise
    watch.leave(0)


class _End:
    """One end of a rank's connections; messages are JSON lines."""

    def __init__(self, hosts: list[str]) -> None:
        self.hosts = hosts
        """Each rank's host."""
        self.leaving = threading.Event()

    @staticmethod
    def keep_alive(connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in PROBES.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)

    @staticmethod
    def send(connection: socket.socket, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(message).encode() + b"\n")

    @staticmethod
    def heard(connection: socket.socket) -> dict[str, Any] | None:
        """The next message; None if the other end is gone."""
        text = b""
        with contextlib.suppress(OSError):
            while not text.endswith(b"\n") and (more := connection.recv(1)):
                text += more
        return json.loads(text) if text.endswith(b"\n") else None

    def end(self, code: int, lines: list[str]) -> None:
        """End this process, unless it is leaving by itself."""
        if self.leaving.is_set():
            return
        sys.stdout.flush()
        for line in lines:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
        os._exit(code)


class _Hub(_End):
    """Rank 0's end: one connection to every other rank."""

    def __init__(self, hosts: list[str]) -> None:
        super().__init__(hosts)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)
        token = secrets.token_hex(16)
        distributed.broadcast((server.getsockname()[1], token))
        self.ranks: dict[socket.socket, int] = {}
        until = time.monotonic() + JOIN
        while len(self.ranks) < distributed.world_size() - 1:
            server.settimeout(max(until - time.monotonic(), 0.1))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = set(range(1, distributed.world_size())) - set(self.ranks.values())
                lost = sorted({hosts[rank] for rank in missing})
                raise LaunchError(
                    f"{', '.join(lost)}: ranks there cannot connect to rank 0 on {hosts[0]}, port "
                    f"{server.getsockname()[1]}; hosts must reach each other on any port"
                ) from None
            connection.settimeout(GRACE)
            if (hello := self.heard(connection)) is None or hello.get("token") != token:
                connection.close()  # not one of our ranks
                continue
            self.keep_alive(connection)
            self.ranks[connection] = hello["rank"]
        server.close()

    def run(self) -> None:
        """Wait for ranks to leave or to be lost."""
        with selectors.DefaultSelector() as selector:
            for connection in self.ranks:
                selector.register(connection, selectors.EVENT_READ)
            lost: list[int] = []
            left = len(self.ranks)
            while left or lost:
                ready = selector.select(SETTLE if lost else None)
                for key, _ in ready:
                    message, left = self.heard(key.fileobj), left - 1
                    selector.unregister(key.fileobj)
                    if message is None:
                        lost.append(self.ranks[key.fileobj])
                    elif message["code"]:
                        threading.Thread(target=self._failed, args=(key.fileobj, message), daemon=True).start()
                if lost and not ready:
                    self._lost(lost)
                    return

    def _lost(self, lost: list[int]) -> None:
        hosts: dict[str, list[int]] = {}
        for rank in sorted(lost):
            hosts.setdefault(self.hosts[rank], []).append(rank)
        self._tell(2)
        self.end(2, [_lost(host, ranks) for host, ranks in hosts.items()])

    def _failed(self, connection: socket.socket, message: dict[str, Any]) -> None:
        """A rank ended with an error. Usually all have the same; if not, its lines are printed here."""
        time.sleep(GRACE)
        rank = self.ranks[connection]
        self._tell(message["code"])
        self.end(message["code"], message["lines"] or [f"{self.hosts[rank]}: rank {rank} failed; {RESUME}"])

    def _tell(self, code: int) -> None:
        if not self.leaving.is_set():
            for connection in self.ranks:
                self.send(connection, {"code": code})

    def leave(self, code: int, lines: tuple[str, ...] = ()) -> None:
        """Tell all ranks that this one ends, and how."""
        self._tell(code)
        self.leaving.set()


class _Spoke(_End):
    """The end of every other rank."""

    def __init__(self, hosts: list[str]) -> None:
        super().__init__(hosts)
        port, token = distributed.broadcast(None)
        address = os.environ["MASTER_ADDR"]
        try:
            self.connection = socket.create_connection((address, port), timeout=JOIN)
        except OSError as error:
            raise LaunchError(f"{environment.host()}: cannot connect to {address}:{port} ({error})") from None
        self.keep_alive(self.connection)
        self.send(self.connection, {"token": token, "rank": distributed.rank()})

    def run(self) -> None:
        """Wait for rank 0 to leave or to be lost."""
        message = self.heard(self.connection)
        if message is None:
            # one line for each host that is left
            first_here = self.hosts.index(self.hosts[distributed.rank()]) == distributed.rank()
            self.end(2, [_lost(self.hosts[0], [0])] if first_here else [])
        elif message["code"]:
            time.sleep(GRACE)
            self.end(message["code"], [])

    def leave(self, code: int, lines: tuple[str, ...] = ()) -> None:
        """Tell rank 0 that this rank ends, and how."""
        self.leaving.set()
        self.send(self.connection, {"code": code, "lines": lines})


def _lost(host: str, ranks: list[int]) -> str:
    named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return f"{host}: {named} died, or the host was lost; {RESUME}"
