"""Ranks: joining them, values that all of them share, and the device of each.

Every function works in a single process, too. Those that exchange something must be called on all ranks.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch

Value = TypeVar("Value")


def rank() -> int:
    """This process' number among the ranks."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks that exchange something: 1 before they have joined."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def device() -> torch.device:
    """Where this rank computes: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def use_local_device() -> None:
    """Make this rank's own GPU the current one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def join() -> None:
    """Form the process group, which later libraries find and use."""
    if not torch.distributed.is_initialized():
        use_local_device()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30))


def leave() -> None:
    """End together: the launcher kills the ranks that remain once one has exited with a code other than 0."""
    if world_size() > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait until all ranks are here."""
    if world_size() > 1:
        torch.distributed.barrier()


def broadcast(value: Value | None) -> Value:
    """Rank 0's value, on every rank; what the others pass is ignored."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Value) -> list[Value]:
    """Every rank's value, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Value] = [value] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def largest(value: int) -> int:
    """The largest of all ranks' numbers, on every rank."""
    if world_size() == 1:
        return value
    number = torch.tensor([value], device=device())
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    return int(number.item())
