"""ALIGN_PLAIN=1 turns off what is done otherwise on a CPU, and every stage still runs and passes its tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
INSTALLED = """
import sys
from align_cli import cpu
cpu.install(1)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer import utils
print(ALL_ATTENTION_FUNCTIONS["sdpa"].__module__, utils._ChunkedLogProbFunction.__module__)
"""


@pytest.mark.parametrize(
    ("plain", "attention", "head"),
    [
        ("", "align_cli.cpu.attention", "align_cli.cpu.head"),
        ("1", "transformers.integrations.sdpa_attention", "trl.kernels"),
    ],
)
def test_the_switch(plain, attention, head):
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED],
        env=os.environ | {"ALIGN_PLAIN": plain},
        capture_output=True,
        text=True,
        check=True,
    )
    ours, theirs = done.stdout.split()
    assert ours == attention and theirs.startswith(head)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(file.name for file in (TESTS / "stages").glob("test_*.py")))
def test_every_stage_passes_its_tests_without_them(file):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"stages/{file}"],
        cwd=TESTS,
        env=os.environ | {"ALIGN_PLAIN": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
