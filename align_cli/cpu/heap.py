"""Memory that a training step frees, kept for the next one."""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD."""
MOST = 2**31 - 1


def keep_freed() -> None:
    """Tell glibc to hold on to what tensors in main memory free: it would give each large one back to the kernel, which
    clears every page of the next one. Does nothing where the C library is another."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, MOST)
        mallopt(TRIM_THRESHOLD, MOST)
