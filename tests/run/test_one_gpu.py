"""Commands on a machine with two GPUs, up to the point where they import torch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import machines
import project
import pytest

import align_cli

ROOT = Path(align_cli.__file__).parents[1]
NAMES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "DS_ACCELERATOR", "CUDA_DEVICE_ORDER")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A project beside the folder of a driver that reports two GPUs."""
    home = project.build(tmp_path_factory.mktemp("home"))
    gpus = [machines.gpu(0, "NVIDIA L4", (8, 9)), machines.gpu(1, "NVIDIA L4", (8, 9))]
    machines.torch_of(machines.nvidia(home / "machine", gpus), "cuda")
    return home


def on_two_gpus(folder, *line, **variables):
    """A command's process, and the environment in which it imported torch (None if it did not)."""
    seen = folder / "imported.json"
    seen.unlink(missing_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    path = f"{folder / 'machine'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment = kept | {"PYTHONPATH": path, "TORCH_IMPORTED": str(seen)} | variables
    done = subprocess.run([sys.executable, *line], cwd=folder, env=environment, capture_output=True, text=True)
    return done, json.loads(seen.read_text()) if seen.exists() else None


def align(folder, *words, **variables):
    return on_two_gpus(folder, "-m", "align_cli", *words, **variables)


@pytest.mark.parametrize(
    ("word", "visible", "ranks"),
    [
        ("launch.num_gpus=auto", None, "2 ranks on 2 × NVIDIA L4"),
        ("launch.num_gpus=auto", "1", "1 rank on NVIDIA L4"),
        ("launch.num_gpus=auto", "", "1 rank on the CPU"),
        ("seed=1", None, "1 rank on NVIDIA L4, 1 of 2 GPUs"),
    ],
)
def test_the_plan_counts_gpus_without_torch(folder, word, visible, ranks):
    done, imported = align(
        folder, "check", "sft", "recipe=t", word, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    )
    assert done.returncode == 0 and imported is None, done.stderr
    assert re.search(rf"^ranks +{ranks}", done.stdout, re.MULTILINE), done.stdout


def test_too_many_ranks_are_one_line(folder):
    done, imported = align(folder, "sft", "recipe=t", "launch.num_gpus=3", CUDA_VISIBLE_DEVICES="1")
    assert done.returncode == 2 and imported is None
    assert done.stderr.strip().startswith("launch.num_gpus: is 3, but CUDA_VISIBLE_DEVICES=1 shows 1 of 2 × NVIDIA L4")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "left"),
    [({}, "0"), ({"CUDA_VISIBLE_DEVICES": "1,0"}, "1"), ({"CUDA_VISIBLE_DEVICES": "GPU-1"}, "1")],
)
def test_a_run_in_one_process_sees_one_gpu(folder, given, left):
    _, imported = align(folder, "sft", "recipe=t", "force=true", **given)
    assert imported["CUDA_VISIBLE_DEVICES"] == left and imported["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "DS_ACCELERATOR" not in imported


@pytest.mark.parametrize("given", [{"CUDA_VISIBLE_DEVICES": ""}, {"DS_ACCELERATOR": "cpu"}])
def test_a_run_on_the_cpu_sees_none(folder, given):
    _, imported = align(folder, "sft", "recipe=t", "force=true", **given)
    assert imported["CUDA_VISIBLE_DEVICES"] == "" and imported["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize("line", ["score runs/none data=none.jsonl", "merge adapter"])
def test_other_commands_see_one_gpu_too(folder, line):
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "models/tiny"}')
    (folder / "adapter" / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    done, imported = align(folder, *line.split())
    assert imported is not None, done.stderr
    assert imported["CUDA_VISIBLE_DEVICES"] == "0"


SCRIPTS = {
    "methods_table.py": "runs/none",
    "bench_rm.py": "dpo.jsonl --model models/tiny --way rows",
    "bench_preference.py": "dpo.jsonl --model models/tiny --way simpo",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_that_load_models_see_one_gpu(folder, script):
    done, imported = on_two_gpus(folder, str(ROOT / "scripts" / script), *SCRIPTS[script].split())
    assert imported is not None, done.stderr
    assert imported["CUDA_VISIBLE_DEVICES"] == "0"
