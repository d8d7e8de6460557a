"""The GPUs of this machine, as their driver reports them. Imports no torch.

`present` asks NVML or reads ROCm's topology. `visible` also applies the variables that hide GPUs from a process.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}
"""Variables that hide all GPUs. HIP takes an empty list for an unset one."""
NVIDIA = Path("/proc/driver/nvidia")
"""Where the kernel has the folder of its NVIDIA module."""
TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
"""ROCm's folder for each processor: CPUs and GPUs."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a MIG device: a part of a GPU that works like a GPU of its own."""

    index: int
    """Position in the driver's order."""
    name: str
    memory: int | None
    """Total memory in bytes. None if the driver does not report it, as where the GPU uses main memory."""
    uuid: str | None = None
    """`GPU-…`, or `MIG-…` for a MIG device."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability. None for ROCm."""
    gfx: int | None = None
    """ROCm's gfx_target_version: 90402 is gfx942. None for CUDA."""

    @property
    def mig(self) -> bool:
        """Whether it is a MIG device."""
        return self.uuid is not None and self.uuid.startswith("MIG-")


@cache
def present() -> tuple[Gpu, ...]:
    """All GPUs that the installed torch is built for. None without a driver, or with a driver that fails."""
    build = _torch_build()
    return _nvidia() if build == "cuda" else _amd() if build == "hip" else ()


@cache
def unsupported() -> tuple[Gpu, ...]:
    """GPUs that the installed torch is not built for, if it is built for none here."""
    # importing NVML's bindings takes 0.2 s, in vain on most machines whose torch is built for the CPU
    return () if present() else (_nvidia() if NVIDIA.exists() else ()) or _amd()


def visible() -> tuple[Gpu, ...]:
    """The GPUs that a process started here sees, in its order.

    DS_ACCELERATOR=cpu hides all of them: DeepSpeed's launcher overwrites CUDA_VISIBLE_DEVICES for its ranks even where
    it was told to use the CPU.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return ()
    seen = present()
    if seen and seen[0].gfx is not None:
        seen = _selected(_unhidden_by_rocr(), os.environ.get("HIP_VISIBLE_DEVICES") or _cuda_list())
    else:
        seen = _selected(seen, _cuda_list())
    # CUDA shows a process one MIG device, and no whole GPU beside it
    return next(((gpu,) for gpu in seen if gpu.mig), seen)


def limited_by() -> str | None:
    """The variable that hides GPUs, as `NAME=value`; None if all are visible."""
    if len(visible()) == len(present()):
        return None
    rocm = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES") if present()[0].gfx is not None else ()
    names = ("DS_ACCELERATOR", *rocm, "CUDA_VISIBLE_DEVICES")
    return next((f"{name}={value}" for name in names if (value := os.environ.get(name)) is not None), None)


def showing(gpus: Sequence[Gpu]) -> dict[str, str]:
    """Variables that let a process see only these GPUs, in this order. `gpus` are some of the visible ones."""
    if gpus[0].gfx is not None:
        # HIP counts what ROCR_VISIBLE_DEVICES leaves
        left = _unhidden_by_rocr()
        return {"HIP_VISIBLE_DEVICES": ",".join(str(left.index(gpu)) for gpu in gpus)}
    # indices where possible: DeepSpeed and vLLM convert every entry to int
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid if gpu.mig else str(gpu.index) for gpu in gpus)}


def bf16(gpus: Sequence[Gpu] | None = None) -> bool:
    """Whether all these GPUs, by default all visible ones, multiply bfloat16 in hardware. False without a GPU."""
    seen = visible() if gpus is None else gpus
    return bool(seen) and all(gpu.capability >= (8, 0) if gpu.gfx is None else gpu.gfx >= 90008 for gpu in seen)


def described(gpus: Sequence[Gpu]) -> str:
    """`8 × NVIDIA H100 80GB HBM3`, `4 × NVIDIA A100-SXM4-80GB and 1 × NVIDIA T4`."""
    return " and ".join(f"{number} × {name}" for name, number in Counter(gpu.name for gpu in gpus).items())


def _cuda_list() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _unhidden_by_rocr() -> tuple[Gpu, ...]:
    return _selected(present(), os.environ.get("ROCR_VISIBLE_DEVICES"))


def _selected(gpus: tuple[Gpu, ...], listed: str | None) -> tuple[Gpu, ...]:
    """The GPUs of a list such as `2,3` or `GPU-1a2b,GPU-3c`, read as CUDA does: it ends at the first entry that names
    no GPU or more than one, `1x` is 1, and a list that names a GPU twice selects none.

    CUDA numbers GPUs from fastest to slowest, NVML by PCI bus. The two differ only where GPUs differ, and
    `environment.quiet` sets CUDA_DEVICE_ORDER=PCI_BUS_ID for that case.
    """
    if listed is None:
        return gpus
    prefix = next((kind for kind in ("GPU-", "MIG-") if listed.startswith(kind)), None)
    words: list[Any] = []
    for entry in listed.split(","):
        number = re.match(r"[+-]?\d+", entry.strip())
        if not (entry.startswith(prefix) if prefix else number and int(number[0]) >= 0):
            break
        words.append(entry if prefix else int(number[0]))
    # an index stands for the first MIG device of a GPU in MIG mode
    numbered = [gpu for at, gpu in enumerate(gpus) if gpu.index not in {before.index for before in gpus[:at]}]
    chosen: list[Gpu] = []
    for word in words:
        named = [gpu for gpu in gpus if gpu.uuid and gpu.uuid.startswith(word)] if prefix else numbered[word : word + 1]
        if len(named) != 1:
            break
        chosen += named
    twice = len(set(words)) < len(words) or len(set(chosen)) < len(chosen)
    return () if twice else tuple(chosen)


def _torch_build() -> str | None:
    """`cuda` or `hip` if torch is built for GPUs of that kind. Read from its files: importing it takes seconds."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    text = file.read_text(encoding="utf-8") if file and file.is_file() else ""
    return next((kind for kind in ("cuda", "hip") if re.search(rf"^{kind}\b[^=\n]*=\s*['\"]", text, re.M)), None)


def _nvidia() -> tuple[Gpu, ...]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    found = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            whole = pynvml.nvmlDeviceGetHandleByIndex(index)
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(whole))
            for handle in _parts(pynvml, whole):
                memory = None
                with contextlib.suppress(pynvml.NVMLError):
                    memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
                name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
                found.append(Gpu(index, name, memory, uuid, capability))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()
    return tuple(found)


def _parts(pynvml: Any, whole: Any) -> list[Any]:
    """NVML's handles of a GPU's MIG devices, or of the GPU itself if it is not in MIG mode."""
    try:
        enabled = pynvml.nvmlDeviceGetMigMode(whole)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError:  # most GPUs have no such mode
        return [whole]
    if not enabled:
        return [whole]
    parts = []
    for slot in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(whole)):
        with contextlib.suppress(pynvml.NVMLError):  # an unused slot
            parts.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, slot))
    return parts


def _amd() -> tuple[Gpu, ...]:
    found: list[Gpu] = []
    for node in sorted(TOPOLOGY.glob("*"), key=lambda folder: int(folder.name)):
        try:
            values = _properties(node / "properties")
            banks = [_properties(file) for file in node.glob("mem_banks/*/properties")]
        except OSError:  # a GPU that this container may not use
            continue
        if not values.get("simd_count"):
            continue
        gfx, unique = values.get("gfx_target_version", 0), values.get("unique_id", 0)
        found.append(
            Gpu(
                index=len(found),
                name=f"AMD gfx{gfx // 10000}{gfx // 100 % 100:x}{gfx % 100:x}",
                # heaps 1 and 2 are the GPU's own memory
                memory=sum(bank["size_in_bytes"] for bank in banks if bank.get("heap_type") in (1, 2)),
                uuid=f"GPU-{unique:016x}" if unique else None,
                gfx=gfx,
            )
        )
    return tuple(found)


def _properties(file: Path) -> dict[str, int]:
    """`name value` lines with whole numbers."""
    pairs = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
