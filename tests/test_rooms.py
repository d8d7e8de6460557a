"""The rooms of docs and design against the code: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import align_cli
from align_cli.recipe.schema import STAGES

ROOT = Path(align_cli.__file__).parent
# room -> rooms it may import; every room may import itself, errors and recipe.schema
MAY = {
    "cli": {"recipe", "run", "evaluate", "report", "model"},
    "errors": set(),
    "recipe": set(),
    "compat": set(),
    "data": set(),
    "model": set(),
    "methods": {"data", "model"},
    # of reports, a stage may write the page that goes into its run; of evaluation, it may count refusals
    "stages": {"methods", "data", "model", "run.directory", "run.manifest", "report.audit", "evaluate.refusals"},
    "run": {"recipe", "data", "model", "stages"},
    "report": {"recipe", "run", "data", "model"},
    "evaluate": {"run", "data", "model", "methods"},
}
FREE = {
    "errors",
    "compat",
    "recipe.schema",
    "recipe.sections",
    "recipe.online",
    "recipe.dpo",
    "recipe.cai",
    "recipe.constitution",
    "recipe.rewards",
    "recipe.speaker",
}


def imports(file: Path, *, top_only: bool = False):
    tree = ast.parse(file.read_text())
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                yield f"{node.module}.{name.name}"
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def ours():
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in ("__init__", "__main__"):
            yield file, parts[0]


def test_imports_run_one_way():
    for file, room in ours():
        for name in imports(file):
            if not name.startswith("align_cli."):
                continue
            inner = name.removeprefix("align_cli.")
            allowed = {room} | MAY[room] | FREE
            assert any(inner == place or inner.startswith(f"{place}.") for place in allowed), f"{file}: {name}"


def test_only_the_worker_imports_stages():
    for file, room in ours():
        if room == "run" and file.stem != "worker":
            assert not any(name.startswith("align_cli.stages") for name in imports(file)), file


def test_no_stage_imports_a_stage():
    for stage in STAGES:
        for name in imports(ROOT / "stages" / f"{stage}.py"):
            assert name.split(".")[2:3] != ["stages"] or name.split(".")[-1] not in STAGES, (stage, name)
            assert not any(name.startswith(f"align_cli.stages.{other}") for other in STAGES if other != stage)


def test_the_command_line_imports_nothing_heavy():
    for name in imports(ROOT / "cli.py", top_only=True):
        assert name.split(".")[0] in {
            "__future__",
            "contextlib",
            "functools",
            "os",
            "sys",
            "collections",
            "typing",
            "typer",
            "align_cli",
        }
        assert not name.startswith("align_cli.") or name.startswith("align_cli.errors"), name


def test_no_room_is_two():
    for file, _ in ours():
        assert len(file.read_text().splitlines()) <= 500, f"{file} has grown past one room"


def test_every_import_says_where_from():
    for file, _ in ours():
        relative = [node for node in ast.walk(ast.parse(file.read_text())) if getattr(node, "level", 0)]
        assert not relative, f"{file}: a relative import slips past the table"


def test_every_room_is_in_the_table():
    assert {room for _, room in ours()} == set(MAY)


@pytest.mark.parametrize(("room", "other"), [("data", "model"), ("model", "data")])
def test_data_and_model_never_meet(room, other):
    for file in sorted((ROOT / room).glob("*.py")):
        assert not any(name.startswith(f"align_cli.{other}") for name in imports(file)), file


def test_losses_are_made_of_torch_alone():
    file = ROOT / "methods" / "losses.py"
    if not file.is_file():
        pytest.skip("methods/losses.py is not written yet")
    for name in imports(file):
        first = name.split(".")[0]
        assert first == "torch" or first in sys.stdlib_module_names, name


def test_the_command_line_starts_without_what_it_does_not_need():
    heavy = ("torch", "transformers", "hydra", "omegaconf", "pydantic", "yaml")
    code = f"import sys, align_cli.cli\nprint(*[name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"
