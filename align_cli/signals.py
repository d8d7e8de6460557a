"""Ctrl-C and SIGTERM: one way to catch them for a while. Imports no torch."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def caught_by(handler: Handler) -> Iterator[None]:
    """Within, SIGINT and SIGTERM call `handler`; afterwards what handled them before does again."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def deliver(number: int) -> None:
    """End the process as the signal would without a handler."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
