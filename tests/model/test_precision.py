"""The choice of data types: by the hardware's own flags, with torch's list of them as oracle."""

import json
import platform
from pathlib import Path

import project
import pytest
import torch

from align_cli import distributed, hardware
from align_cli.hardware import Machine
from align_cli.model import precision
from align_cli.recipe.check import load
from align_cli.recipe.stages import POLICY, REFERENCE, REWARD

AVX2, AMX = Machine(gpu=False, bf16=False), Machine(gpu=False, bf16=True)
V100, A100 = Machine(gpu=True, bf16=False), Machine(gpu=True, bf16=True)


def test_the_cpu_is_judged_as_torch_judges_it():
    flags = torch.cpu.get_capabilities()
    theirs = any(flags.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    assert hardware.cpu_units({}) == theirs


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize(
    ("flags", "cap", "wanted"),
    [
        ("sse4_2 avx avx2 fma", None, False),
        ("avx2 avx512f avx512_vnni", None, False),
        ("avx2 avx512f avx512_bf16", None, True),
        ("avx2 amx_bf16 amx_tile", None, True),
        ("avx2 avx512f avx512_bf16", "AVX2", False),
        ("avx2 amx_bf16 amx_tile", "avx512_core", False),
        ("avx2 avx512f avx512_bf16", "AVX512_CORE_BF16", True),
        ("avx2 amx_bf16 amx_tile", "DEFAULT", True),
    ],
)
def test_units_of_a_cpu(tmp_path, monkeypatch, flags, cap, wanted):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: avx512_bf16\n")
    read = hardware._flags.__wrapped__
    monkeypatch.setattr(hardware, "_flags", lambda: read(file))
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        assert hardware.cpu_units({name: cap} if cap else {}) is wanted


def test_a_system_without_cpuinfo_has_no_units(monkeypatch):
    read = hardware._flags.__wrapped__
    monkeypatch.setattr(hardware, "_flags", lambda: read(Path("/nowhere/cpuinfo")))
    assert hardware.cpu_units({}) is False


@pytest.mark.parametrize(("capability", "bf16"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_that_emulates_bfloat16_has_no_units(monkeypatch, capability, bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert distributed.machine() == Machine(gpu=True, bf16=bf16)


F, B, H = "float32", "bfloat16", "float16"
LORA = "lora={r: 4}"


@pytest.mark.parametrize(
    ("machine", "words", "weights", "products", "scorer", "generator"),
    [
        (AVX2, [], F, F, F, F),
        (AVX2, [LORA], F, F, F, F),
        (AVX2, ["trainer.bf16=true"], F, B, F, B),
        (AVX2, [LORA, "trainer.bf16=true"], B, B, F, B),
        (AMX, [], F, B, F, B),
        (AMX, [LORA], B, B, F, B),
        (AMX, ["trainer.bf16=auto"], F, B, F, B),
        (AMX, ["trainer.bf16=false"], F, F, F, F),
        (AMX, ["trainer.bf16=null"], F, B, F, B),
        (V100, [], F, F, F, F),
        (V100, [LORA], F, F, F, F),
        (V100, ["trainer.fp16=true"], F, H, F, F),
        (V100, [LORA, "trainer.fp16=true"], H, H, F, F),
        (A100, [], F, B, B, B),
        (A100, [LORA], B, B, B, B),
        (A100, ["trainer.bf16=false"], F, F, B, B),
        (A100, ["trainer.fp16=true"], F, H, B, B),
        (A100, ["model.dtype=bfloat16"], B, B, B, B),
        (AMX, [LORA, "model.dtype=float32"], F, B, F, B),
        (AVX2, ["model.dtype=bfloat16"], B, B, F, B),
    ],
)
def test_data_types(here, machine, words, weights, products, scorer, generator):
    recipe = load("rloo", ["recipe=hh", "model.dtype=auto", *words])[1]
    chosen = precision.choose(recipe, machine)
    assert (chosen.weights, chosen.products, chosen.scorer, chosen.generator) == (weights, products, scorer, generator)
    assert [precision.of(role, chosen) for role in (POLICY, REFERENCE, REWARD)] == [weights, weights, scorer]
    assert precision.problems(recipe, machine) == []


def test_what_is_slow_or_contradictory_is_said(here):
    def of(which, machine, *words):
        return which(load("rloo", ["recipe=hh", "model.dtype=auto", *words])[1], machine)

    assert of(precision.notes, AMX) == of(precision.notes, A100) == of(precision.notes, AVX2) == []
    assert "emulated and slow" in of(precision.notes, AVX2, "trainer.bf16=true")[0]
    assert "emulated and slow" in of(precision.notes, V100, "model.dtype=bfloat16")[0]
    assert of(precision.notes, V100)[0].startswith("float32, since this is a GPU without bf16 units; trainer.fp16=true")
    assert of(precision.problems, AVX2, "trainer.fp16=true") == [
        "trainer.fp16: needs a GPU; remove it, or set trainer.bf16=auto"
    ]
    assert "keep one of them" in of(precision.problems, A100, "trainer.fp16=true", "trainer.bf16=true")[0]


@pytest.fixture
def home(here):
    return project.build(here)


def test_the_choice_stands_in_the_manifest_and_a_switch_changes_it(home):
    project.ok("sft", "recipe=t", "trainer.max_steps=1", cwd=home)
    entry = project.manifest(home / "runs/t/sft")["precision"]
    assert entry == {
        **{"weights": F, "products": F, "scorer": F, "generator": F},
        "machine": "CPU without bf16 units",
    }
    project.ok("sft", "recipe=t", "name=b", "trainer.max_steps=1", "trainer.bf16=true", "lora.r=4", cwd=home)
    assert project.manifest(home / "runs/b/sft")["precision"]["weights"] == B


def test_wrong_values_are_named(home):
    done = project.align("check", "sft", "recipe=t", "trainer.bf16=maybe", cwd=home)
    assert done.returncode == 2
    assert done.stderr == "command line: trainer.bf16: expected auto or bool or null, found str 'maybe'\n"


@pytest.mark.parametrize("zero", ["none", "zero2"])
def test_resuming_on_a_machine_of_another_kind_is_said(home, zero):
    words = ("sft", "recipe=t", f"zero={zero}", "trainer.max_steps=400", "trainer.save_steps=2")
    run = home / "runs/t/sft"
    project.kill_after_a_checkpoint(*words, run=run, cwd=home)
    file = run / "checkpoints/ranks.json"
    wrote = json.loads(file.read_text())
    wrote["precision"] |= {"products": B, "machine": str(AMX)}
    file.write_text(json.dumps(wrote))
    rows = len(project.metrics(run))
    done = project.align(*words, cwd=home)
    if zero == "zero2":
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "was written with float32 weights and bfloat16 products (CPU with bf16 units)" in done.stderr
        assert len(project.metrics(run)) <= rows
        return
    assert done.returncode == 0
    line = next(line for line in done.stdout.splitlines() if line.startswith("warning: until step"))
    assert "this run had float32 weights and bfloat16 products (CPU with bf16 units)" in line
    assert line.endswith("from here on float32 weights, float32 products (CPU without bf16 units)")
    (earlier,) = project.manifest(run)["precision"]["earlier"]
    assert earlier["products"] == B and 2 <= earlier["until_step"] < 400
