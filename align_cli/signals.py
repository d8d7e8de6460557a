"""Temporary handlers for SIGINT (Ctrl-C) and SIGTERM. Imports no torch."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

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


def deliver(number: int) -> None:
    """End the process by the default action of the signal."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
