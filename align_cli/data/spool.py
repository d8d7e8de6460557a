"""Groups on disk, so that a data set of any size is split, weighted and shuffled without being in memory."""

from __future__ import annotations

import pickle
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

from align_cli.data.count import Count
from align_cli.data.format import Group

IN_MEMORY = 64 << 20
"""Bytes of groups that are not written to disk."""


class Spool:
    """Groups in the order in which they were added, in a file without a name, which goes with the process."""

    def __init__(self, folder: Path | None = None):
        """`folder` holds the file once it is large; None for the system's temporary folder."""
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=folder)  # noqa: SIM115  open as long as its groups
        self._starts = array("Q", [0])
        self._counts: list[Count | None] = []

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, group: Group) -> None:
        """Append a group. All groups are added before the first one is read."""
        if not self._counts or self._counts[-1] is not group.count:
            self._counts.append(group.count)
        data = pickle.dumps((len(self._counts) - 1, replace(group, count=None)), pickle.HIGHEST_PROTOCOL)
        self._file.write(data)
        self._starts.append(self._starts[-1] + len(data))

    def read(self, number: int) -> Group:
        """The group that was added as the `number`th, counted from 0."""
        start, stop = self._starts[number : number + 2]
        self._file.seek(start)
        count, group = pickle.loads(self._file.read(stop - start))
        return replace(group, count=self._counts[count])


class Spooled(Sequence[Group]):
    """A selection of spooled groups as a sequence; each access reads a group from the file."""

    def __init__(self, spool: Spool, numbers: Sequence[int]):
        self.spool, self.numbers = spool, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> Group: ...
    @overload
    def __getitem__(self, at: slice) -> Spooled: ...

    def __getitem__(self, at: int | slice) -> Group | Spooled:
        picked = self.numbers[at]
        return Spooled(self.spool, picked) if isinstance(at, slice) else self.spool.read(picked)

    def picked(self, at: Iterable[int]) -> Spooled:
        """The groups at these indices, in their order."""
        return Spooled(self.spool, [self.numbers[one] for one in at])
