"""What is done otherwise on a CPU than on a GPU, behind one door."""

from __future__ import annotations

import os


def install(ranks: int) -> None:
    """Put the CPU's own language-model head, attention and memory settings in place, where this process computes on
    one; ranks of one machine share its cores."""
    import torch

    if torch.cuda.is_available():
        return
    from align_cli.cpu import attention, head, heap

    if ranks > 1:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    head.put_in_place()
    attention.put_in_place()
    heap.keep_freed()
