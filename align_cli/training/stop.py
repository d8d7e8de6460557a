"""Clean stop on a signal: all ranks finish the current step and stop together."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from align_cli import distributed
from align_cli.signals import caught_by, deliver, note


class Stopped(Exception):
    """A signal ended the run between two units of work; `number` is the signal number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class StopRequest:
    """Records Ctrl-C and SIGTERM; a second signal ends the process at once."""

    def __init__(self, after: str = "this step"):
        self.after = after
        self.received: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which signals are recorded."""
        note(None)
        with caught_by(self._note):
            yield

    def on_any_rank(self) -> int | None:
        """The signal that any rank received, or None. All ranks must call it, since they must stop at the same step."""
        self.received = distributed.largest(self.received or 0) or None
        return self.received

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            deliver(number)
        self.received = number
        note(number)
        name = signal.Signals(number).name
        sys.stderr.write(f"\n{name}: stopping after {self.after}; a second signal stops at once\n")
