"""Optimisations for training on a CPU, installed by one function."""

from __future__ import annotations

import os


def install(ranks: int) -> None:
    """Install our language-model head, attention and memory settings if this process computes on a CPU. With several
    ranks, limit torch to OMP_NUM_THREADS threads, since the ranks share the machine's cores."""
    import torch

    if torch.cuda.is_available():
        return
    from align_cli.cpu import attention, head, heap

    if ranks > 1:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    head.put_in_place()
    attention.put_in_place()
    heap.keep_freed()
