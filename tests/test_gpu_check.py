"""scripts/gpu_check.py: every check on this machine's GPUs (`pytest -m gpu`), and the same lines on CPU ranks.

The checks run every stage in bfloat16 with gradient checkpointing, under LoRA and in full, on one rank and on two under
ZeRO-2 and ZeRO-3, and compare with float32 in one process.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import gpu_check

FAST = {"rm lora zero3"}
"""Run by `make test`: a head, adapters and sharded weights at once."""


def keys(device):
    machine = gpu_check.Machine(Path(), device, gpus=2, name=device)
    return [key for key, _ in gpu_check.checks(machine, list(gpu_check.RECIPES))]


@pytest.fixture(scope="module")
def cpu(tmp_path_factory):
    machine = gpu_check.found_machine("cpu", tmp_path_factory.mktemp("cpu"))
    gpu_check.build(machine.work)
    return machine


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    machine = gpu_check.found_machine("cuda", tmp_path_factory.mktemp("cuda"))
    gpu_check.build(machine.work)
    return machine


def check(machine, key):
    made = dict(gpu_check.checks(machine, list(gpu_check.RECIPES)))
    if key not in made:
        pytest.skip("needs several GPUs")
    row = gpu_check.measured(key, made[key])
    assert row.ok is not False, f"{row.check}: {row.found}"


@pytest.mark.parametrize("key", [pytest.param(k, marks=[] if k in FAST else [pytest.mark.slow]) for k in keys("cpu")])
def test_on_cpu_ranks(cpu, key):
    check(cpu, key)


@pytest.mark.gpu
@pytest.mark.parametrize("key", keys("cuda"))
def test_on_gpus(cuda, key):
    check(cuda, key)


def test_the_page_has_every_row_and_the_versions(tmp_path):
    machine = gpu_check.Machine(tmp_path, "cuda", 2, "NVIDIA X | 1")
    machine.done = {
        "a": gpu_check.Row("Correctness", "sft", "finite", "loss 1 | 2", True, 3.0),
        "b": gpu_check.Row("Correctness", "rm", "finite", "not finite", False, 4.0),
        "c": gpu_check.Row("Memory", "sft", "measured", "1 GiB", None, 5.0),
    }
    page = gpu_check.page(machine)
    assert "1 checks hold, 1 do not, 1 only measured" in page
    assert "| sft | finite | loss 1 / 2 | yes | 3 |" in page and "| rm | finite | not finite | **no** | 4 |" in page
    assert "torch 2." in page and "trl 1.16.0" in page


def test_a_check_that_fails_is_a_row():
    def broken():
        raise gpu_check.Failed("exit code 1: boom")

    row = gpu_check.measured("sft lora", broken)
    assert row.ok is False and row.found == "Failed: exit code 1: boom"


def test_a_second_call_goes_on_and_repeats_what_failed(tmp_path, monkeypatch, capsys):
    called, good = [], {"sft": True, "rm": False}

    def row(key):
        called.append(key)
        return gpu_check.Row("Correctness", key, "runs", "ran", good[key])

    monkeypatch.setattr(gpu_check, "checks", lambda machine, stages: [(key, lambda key=key: row(key)) for key in good])
    monkeypatch.setattr(gpu_check, "build", lambda folder: folder)
    words = ["gpu_check.py", "--device", "cpu", "--work", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    for code in (1, 0):
        with pytest.raises(SystemExit) as end:
            gpu_check.main()
        assert end.value.code == code
        good["rm"] = True
    assert called == ["sft", "rm", "rm"]
    page = next((tmp_path / "out").glob("*.md")).read_text()
    assert "2 checks hold, 0 do not" in page and page.count("| rm |") == 1
