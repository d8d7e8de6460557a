"""Keeps memory freed by a training step in the process, for the next step."""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD."""
MOST = 2**31 - 1


def keep_freed() -> None:
    """Make glibc keep the memory of freed tensors. By default it returns each large block to the kernel, which then has
    to zero every page of the next one. Does nothing with other C libraries."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, MOST)
        mallopt(TRIM_THRESHOLD, MOST)
