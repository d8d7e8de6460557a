"""GPUs as the driver reports them, and which of them a process sees."""

import os
import random
import subprocess
import sys
from pathlib import Path

import machines
import pytest
import torch
from torch import cuda

from align_cli import driver

H100 = [machines.gpu(at) for at in range(4)]
ALL = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "DS_ACCELERATOR")


@pytest.fixture
def clean(monkeypatch):
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    driver.present.cache_clear()
    driver.unsupported.cache_clear()
    yield
    driver.present.cache_clear()
    driver.unsupported.cache_clear()


@pytest.fixture
def nvidia(clean, tmp_path, monkeypatch):
    """Gives this process the GPUs that it is called with."""

    def put(gpus, build="cuda"):
        monkeypatch.syspath_prepend(machines.nvidia(tmp_path / "driver", gpus))
        monkeypatch.delitem(sys.modules, "pynvml", raising=False)
        monkeypatch.setattr(driver, "_torch_build", lambda: build)
        monkeypatch.setattr(driver, "NVIDIA", tmp_path)
        monkeypatch.setattr(driver, "TOPOLOGY", tmp_path / "none")

    return put


@pytest.fixture
def amd(clean, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "_torch_build", lambda: "hip")
    monkeypatch.setattr(driver, "TOPOLOGY", machines.amd(tmp_path / "nodes", 90402, 90402, 90010))


def seen(monkeypatch, **variables):
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        return [gpu.index for gpu in driver.visible()]


def test_what_nvml_reports(nvidia):
    nvidia([machines.gpu(0), machines.gpu(1, "NVIDIA GB10", (12, 1), memory=None)])
    first, second = driver.visible()
    assert first == driver.Gpu(0, "NVIDIA H100 80GB HBM3", 80 << 30, "GPU-00aa0000-0000-0000-0000-000000000000", (9, 0))
    assert (second.index, second.memory, second.capability) == (1, None, (12, 1))
    assert driver.described(driver.visible()) == "1 × NVIDIA H100 80GB HBM3 and 1 × NVIDIA GB10"


@pytest.mark.parametrize(("gpus", "build"), [(None, "cuda"), ([], "cuda"), (H100, None), (H100, "hip")])
def test_no_driver_and_no_torch_for_it_are_no_gpu(nvidia, gpus, build):
    nvidia(gpus, build)
    assert driver.visible() == () and not driver.bf16()
    assert len(driver.unsupported()) == len(gpus or [])


def test_a_driver_that_fails_on_the_way_is_no_gpu(nvidia, monkeypatch):
    nvidia([*H100, {"name": "lost"}])
    import pynvml

    def lost(index):
        if index == 4:
            raise pynvml.NVMLError("GPU is lost")
        return pynvml.GPUS[index]

    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lost)
    assert driver.present() == ()


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("2,3", [2, 3]),
        ("3,0", [3, 0]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [0]),
        ("1,9,2", [1]),
        ("1,1", []),
        (" 1 , 2", [1, 2]),
        ("1,,2", [1]),
        ("NoDevFiles", []),
        ("GPU-20aa,GPU-0", [2, 0]),
        ("GPU-1,GPU-10aa", []),
        ("GPU-", []),
        ("GPU-3,1", [3]),
        ("1,GPU-3", [1]),
        ("GPU-3,GPU-9,GPU-1", [3]),
        ("MIG-1", []),
    ],
)
def test_a_list_of_visible_devices(nvidia, monkeypatch, listed, expected):
    nvidia(H100)
    assert seen(monkeypatch, CUDA_VISIBLE_DEVICES=listed) == expected


def test_torch_reads_every_list_in_the_same_way(nvidia, monkeypatch):
    """torch counts the devices of CUDA_VISIBLE_DEVICES itself, as CUDA does."""
    uuids = ["GPU-1a2b", "GPU-1a3c", "GPU-2d4e"]
    nvidia([machines.gpu(at, uuid=uuid) for at, uuid in enumerate(uuids)])
    draw, filled = random.Random(0), 0
    indices = ["0", "1", "2", "3", "-1", "+1", " 2", "1x", "x", "", "GPU-2"]
    names = ["GPU-1a2b", "GPU-1a3", "GPU-1a", "GPU-2", "GPU-9", "1", "GPU-2d4e", " GPU-2"]
    for _ in range(3000):
        listed = ",".join(draw.choices(draw.choice([indices, names]), k=draw.randint(1, 4)))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        wanted = cuda._parse_visible_devices()
        if wanted and isinstance(wanted[0], str):
            wanted = cuda._transform_uuid_to_ordinals(wanted, uuids)
        elif over := [at for at, index in enumerate(wanted) if index >= len(uuids)]:
            wanted = wanted[: over[0]]
        assert [gpu.index for gpu in driver.visible()] == wanted, listed
        filled += len(wanted) > 1
    assert filled > 100


def test_deepspeed_told_to_use_the_cpu_sees_no_gpu(nvidia, monkeypatch):
    nvidia(H100)
    assert seen(monkeypatch, DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="0,1") == []
    assert seen(monkeypatch, DS_ACCELERATOR="cuda", CUDA_VISIBLE_DEVICES="0,1") == [0, 1]


def test_a_process_sees_one_mig_device_and_no_gpu_beside_it(nvidia, monkeypatch):
    nvidia([machines.mig("aa", "bb"), machines.gpu(1)])
    for listed, uuid in ((None, "MIG-aa"), ("0", "MIG-aa"), ("MIG-bb,MIG-aa", "MIG-bb"), ("1,0", "MIG-aa")):
        with monkeypatch.context() as patch:
            if listed:
                patch.setenv("CUDA_VISIBLE_DEVICES", listed)
            (only,) = driver.visible()
        assert only.uuid == uuid and only.memory == 40 << 30 and only.capability == (9, 0)
        assert driver.showing([only]) == {"CUDA_VISIBLE_DEVICES": uuid}
    assert seen(monkeypatch, CUDA_VISIBLE_DEVICES="1") == [1]


def test_which_variable_hides_gpus(nvidia, monkeypatch):
    nvidia(H100)
    assert driver.limited_by() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert driver.limited_by() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert driver.limited_by() == "CUDA_VISIBLE_DEVICES=2"


@pytest.mark.parametrize(
    ("capabilities", "expected"), [([(8, 0), (9, 0)], True), ([(8, 0), (7, 5)], False), ([(7, 0)], False), ([], False)]
)
def test_bfloat16_needs_it_on_every_gpu(nvidia, monkeypatch, capabilities, expected):
    nvidia([machines.gpu(at, capability=capability) for at, capability in enumerate(capabilities)])
    assert driver.bf16() is expected
    if len(capabilities) == 2:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        assert driver.bf16() and not driver.bf16([driver.Gpu(0, "V100", 16 << 30, capability=(7, 0))])


def test_what_rocm_reports(amd):
    gpus = driver.visible()
    assert [gpu.name for gpu in gpus] == ["AMD gfx942", "AMD gfx942", "AMD gfx90a"]
    assert gpus[0] == driver.Gpu(0, "AMD gfx942", 192 << 30, "GPU-7000000000000002", gfx=90402)
    assert driver.bf16() and not driver.bf16([driver.Gpu(0, "AMD gfx906", 16 << 30, gfx=90006)])


def test_rocm_numbers_what_the_runtime_below_leaves(amd, monkeypatch):
    assert seen(monkeypatch, HIP_VISIBLE_DEVICES="2,0") == [2, 0]
    assert seen(monkeypatch, CUDA_VISIBLE_DEVICES="1") == [1]
    assert seen(monkeypatch, HIP_VISIBLE_DEVICES="0", CUDA_VISIBLE_DEVICES="1") == [0]
    assert seen(monkeypatch, ROCR_VISIBLE_DEVICES="1,2", HIP_VISIBLE_DEVICES="1") == [2]
    assert seen(monkeypatch, ROCR_VISIBLE_DEVICES="GPU-7000000000000003") == [1]
    assert seen(monkeypatch, **driver.HIDDEN) == []
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1,2")
    assert driver.showing(driver.visible()[1:]) == {"HIP_VISIBLE_DEVICES": "1"}


def test_a_gpu_that_a_container_may_not_use(amd, monkeypatch):
    readable = Path.read_text

    def refused(self, **how):
        if self.parent.name == "3":
            raise PermissionError(self)
        return readable(self, **how)

    monkeypatch.setattr(Path, "read_text", refused)
    assert [gpu.name for gpu in driver.visible()] == ["AMD gfx942", "AMD gfx90a"]


def test_what_torch_is_built_for_stands_in_its_files():
    built = "cuda" if torch.version.cuda else "hip" if torch.version.hip else None
    assert driver._torch_build() == built


@pytest.mark.parametrize(("build", "count"), [("cuda", 2), ("hip", 0)])
def test_another_process_counts_without_torch(tmp_path, build, count):
    folder = machines.torch_of(machines.nvidia(tmp_path, H100[:2]), build)
    code = "import sys\nfrom align_cli import driver\nprint(len(driver.visible()), 'torch' in sys.modules)"
    path = f"{folder}:{Path(driver.__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    kept = {name: value for name, value in os.environ.items() if name not in ALL}
    done = subprocess.run([sys.executable, "-c", code], env=kept | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout == f"{count} False\n", done.stderr


def test_the_fake_driver_has_the_names_of_the_real_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import pynvml\nprint(*dir(pynvml))"], cwd=tmp_path, capture_output=True, text=True
    )
    faked = {line[4:].split("(")[0] for line in machines.PYNVML.splitlines() if line.startswith("def ")}
    assert faked | {"NVMLError", "NVML_DEVICE_MIG_ENABLE"} <= set(done.stdout.split()), done.stderr
