"""Optimisations for training on a CPU, installed by one function."""

from __future__ import annotations

import os

PLAIN = "ALIGN_PLAIN"
"""Environment variable; at 1 nothing is installed, and a CPU computes with the libraries' own code."""


def install(ranks: int) -> None:
    """Install our language-model head, attention and memory settings if this process computes on a CPU, unless
    ALIGN_PLAIN=1 asks for what the libraries do, as on a GPU. With several ranks, limit torch to OMP_NUM_THREADS
    threads, since the ranks share the machine's cores."""
    import torch

    if torch.cuda.is_available():
        return
    if ranks > 1:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if os.environ.get(PLAIN) == "1":
        return
    from align_cli.cpu import attention, head, heap

    head.put_in_place()
    attention.put_in_place()
    heap.keep_freed()
