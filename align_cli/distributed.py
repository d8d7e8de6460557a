"""Process group of the ranks, communication between them, and the device of each.

Every function also works in a single process. Functions that communicate must be called on all ranks. They have a
process group of their own, in which ranks wait for each other for as long as it takes: preparing data, answering and
judging take hours, and not the same hours on every rank. `run.watch` ends ranks that wait for a dead one. Where such a
phase is followed by a collective of a library, `barrier` must come between, since that one times out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar

import torch

from align_cli import driver, hardware
from align_cli.errors import AlignError, Interrupted, LaunchError
from align_cli.hardware import Machine

Value = TypeVar("Value")

COLLECTIVE = timedelta(minutes=30)
"""Time-out of the libraries' collectives: ranks enter them together, so that a longer wait is a fault."""
MESSAGE = timedelta(days=30)
"""Time-out of this module's own."""
BUCKET = 25 << 20
"""Bytes that one exchange of gradients takes, as in DDP. Small exchanges are bound by latency."""
_messages: torch.distributed.ProcessGroup | None = None


def rank() -> int:
    """Global rank of this process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks in the process group; 1 before `join`."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def device() -> torch.device:
    """This rank's device: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def use_local_device() -> None:
    """Make this rank's own GPU the current one: the only GPU that it sees, or the one at LOCAL_RANK.

    Under `srun --gpus-per-task=1` every task sees one GPU, whatever its number on the host. LOCAL_RANK is then set to
    0, since libraries use it as an index, too. Raises LaunchError if there are more ranks than GPUs, and if torch
    cannot use the GPUs.
    """
    if not torch.cuda.is_available():
        if shown := driver.visible():
            raise LaunchError(
                f"torch {torch.__version__}: cannot use {driver.described(shown)}; update the driver or install a "
                "build of torch that fits it, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        return
    seen, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    index = 0 if seen == 1 else local
    if index >= seen:
        raise LaunchError(
            f"LOCAL_RANK: is {local}, but this rank sees {seen} GPUs; start one rank per GPU, or with srun add "
            "--gpus-per-task=1"
        )
    if "LOCAL_RANK" in os.environ:
        os.environ["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)


def machine() -> Machine:
    """What this rank computes on, by asking torch."""
    if not torch.cuda.is_available():
        return Machine(False, hardware.cpu_units())
    if torch.version.hip:
        # gfx908 (MI100) is the first with bfloat16 matrix units
        units = int(torch.cuda.get_device_properties(device()).gcnArchName.split(":")[0].removeprefix("gfx"), 16)
        return Machine(True, units >= 0x908)
    # `is_bf16_supported` is also true where bfloat16 is emulated
    return Machine(True, torch.cuda.get_device_capability(device()) >= (8, 0))


def join() -> None:
    """Create the process groups. Libraries reuse the first. Raises LaunchError if the ranks cannot meet."""
    global _messages
    if not torch.distributed.is_initialized():
        use_local_device()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            torch.distributed.init_process_group(backend, timeout=COLLECTIVE)
            _messages = torch.distributed.new_group(backend="gloo", timeout=MESSAGE)
        except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise LaunchError(
                f"launch.master_addr: ranks cannot meet at {where} ({str(error).splitlines()[0]}); rank 0 must listen "
                "there and all hosts must reach it; set launch.master_addr or launch.master_port"
            ) from None


def leave() -> None:
    """Wait for all ranks, since the launcher kills the others once one exits with an error, then destroy the group."""
    if world_size() > 1:
        barrier()
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        torch.distributed.barrier(_messages)


def broadcast(value: Value | None) -> Value:
    """Rank 0's value, on every rank; the values of the other ranks are ignored."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, group=_messages)
    return box[0]


def from_rank_0(decide: Callable[[], Value]) -> Value:
    """What `decide` returns on rank 0, on every rank; the others do not call it. For whatever depends on files: hosts
    may see a change of a shared folder at different times, and ranks that disagree wait for each other forever.

    Raises on every rank the AlignError that `decide` raises.
    """
    value: Value | None = None
    error: AlignError | None = None
    if rank() == 0:
        try:
            value = decide()
        except AlignError as raised:
            error = raised
    value, error = broadcast((value, error))
    if error is not None:
        raise error
    return value


def together(compute: Callable[[], Value]) -> Value:
    """What `compute` returns on this rank. For what may fail on one rank alone, such as a user's function: every rank
    raises the AlignError of the first rank that failed, which would otherwise leave the others waiting for it."""
    value: Value | None = None
    error: AlignError | None = None
    try:
        value = compute()
    except AlignError as raised:
        error = raised
    failed = [(at, one) for at, one in enumerate(gather(error)) if one is not None]
    if failed:
        at, first = failed[0]
        everywhere = len(failed) == world_size() and all(one.lines == first.lines for _, one in failed)
        if not everywhere and not isinstance(first, Interrupted):
            first = AlignError(*(f"rank {at}: {line}" for line in first.lines))
        raise first
    return value


def gather(value: Value) -> list[Value]:
    """Every rank's value, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Value] = [value] * world_size()
    torch.distributed.all_gather_object(values, value, group=_messages)
    return values


def average(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each tensor by its mean over all ranks, as many per exchange as fit into `BUCKET` bytes."""
    if world_size() == 1:
        return
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or _bytes(bucket) + _bytes([tensor]) > BUCKET):
            _average_at_once(bucket)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _average_at_once(bucket)


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _average_at_once(tensors: list[torch.Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def largest(value: int) -> int:
    """The maximum over all ranks, on every rank."""
    if world_size() == 1:
        return value
    number = torch.tensor([value])
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX, group=_messages)
    return int(number.item())
