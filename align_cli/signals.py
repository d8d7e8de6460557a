"""Temporary handlers for SIGINT (Ctrl-C) and SIGTERM. Imports no torch."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from align_cli.errors import Interrupted

_received: list[int] = []
_stopping = threading.Event()

Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def caught_by(handler: Handler) -> Iterator[None]:
    """Call `handler` on SIGINT and SIGTERM inside the context; restore the previous handlers afterwards."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def note(number: int | None) -> None:
    """Remember that a signal asked for an end, or, with None, that it was dealt with. `pause` then returns at once."""
    _received[:] = [] if number is None else [number]
    _stopping.clear() if number is None else _stopping.set()


def pause(seconds: float) -> None:
    """Sleep. Raises Interrupted as soon as a signal asks for an end."""
    if _stopping.wait(seconds):
        raise Interrupted(_received[0], "stopped while waiting for a server; the same command resumes")


def deliver(number: int) -> None:
    """End the process by the default action of the signal."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
