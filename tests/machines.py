"""Machines with GPUs that are not there: a `pynvml` that reports what a file says, and a `torch` that must not run."""

import json
from pathlib import Path

PYNVML = """
import json
from pathlib import Path

NVML_DEVICE_MIG_ENABLE = 1
GPUS = json.loads(Path(__file__).with_name("gpus.json").read_text())


class NVMLError(Exception):
    pass


class Memory:
    def __init__(self, total):
        self.total = total


def nvmlInit():
    if GPUS is None:
        raise NVMLError("Driver Not Loaded")


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return len(GPUS)


def nvmlDeviceGetHandleByIndex(index):
    return GPUS[index]


def nvmlDeviceGetName(handle):
    return handle["name"]


def nvmlDeviceGetUUID(handle):
    return handle["uuid"]


def nvmlDeviceGetCudaComputeCapability(handle):
    return tuple(handle["capability"])


def nvmlDeviceGetMemoryInfo(handle):
    if handle["memory"] is None:
        raise NVMLError("Not Supported")
    return Memory(handle["memory"])


def nvmlDeviceGetMigMode(handle):
    if "mig" not in handle:
        raise NVMLError("Not Supported")
    return [1, 1]


def nvmlDeviceGetMaxMigDeviceCount(handle):
    return 7


def nvmlDeviceGetMigDeviceHandleByIndex(handle, slot):
    if slot >= len(handle["mig"]):
        raise NVMLError("Not Found")
    return handle["mig"][slot]
"""
TORCH = """
import json, os, sys

with open(os.environ["TORCH_IMPORTED"], "w") as file:
    json.dump(dict(os.environ), file)
sys.exit("torch was imported")
"""


def gpu(at: int, name: str = "NVIDIA H100 80GB HBM3", capability: tuple[int, int] = (9, 0), **more) -> dict:
    """A GPU as NVML reports it."""
    uuid = f"GPU-{at}0aa0000-0000-0000-0000-00000000000{at}"
    return {"name": name, "uuid": uuid, "capability": capability, "memory": 80 << 30} | more


def mig(*parts: str) -> dict:
    """A GPU in MIG mode, with MIG devices of these ids."""
    name = "NVIDIA H100 80GB HBM3 MIG 3g.40gb"
    return gpu(0, mig=[{"name": name, "uuid": f"MIG-{part}", "memory": 40 << 30} for part in parts])


def nvidia(folder: Path, gpus: list[dict] | None) -> Path:
    """A folder for PYTHONPATH with a driver that reports these GPUs; None: a machine without a driver."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pynvml.py").write_text(PYNVML)
    (folder / "gpus.json").write_text(json.dumps(gpus))
    return folder


def torch_of(folder: Path, build: str) -> Path:
    """Puts into the folder a torch built for `cuda` or `hip`. Importing it writes the environment into the file
    $TORCH_IMPORTED and ends the process."""
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TORCH)
    kinds = {kind: "'13.0'" if kind == build else "None" for kind in ("cuda", "hip")}
    lines = ["__version__ = '2.13.0'", *(f"{kind}: Optional[str] = {value}" for kind, value in kinds.items())]
    (package / "version.py").write_text("from typing import Optional\n\n" + "\n".join(lines) + "\n")
    return folder


def amd(folder: Path, *gfx: int) -> Path:
    """A folder such as /sys/class/kfd/kfd/topology/nodes, with two CPUs and GPUs of these gfx_target_versions."""
    for at, version in enumerate((0, 0, *gfx)):
        banks = folder / str(at) / "mem_banks" / "0"
        banks.mkdir(parents=True)
        unique, simds = (7 << 60 | at) if version else 0, 416 if version else 0
        lines = [f"cpu_cores_count {0 if version else 64}", f"simd_count {simds}", f"gfx_target_version {version}"]
        (folder / str(at) / "properties").write_text("\n".join([*lines, f"unique_id {unique}", ""]))
        (banks / "properties").write_text(f"heap_type {1 if version else 0}\nsize_in_bytes {192 << 30}\n")
    return folder
