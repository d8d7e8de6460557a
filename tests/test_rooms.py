"""The rooms of the code against docs and design: who may import whom, and how pages and messages are written."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import align_cli
from align_cli.recipe.stages import STAGES

ROOT = Path(align_cli.__file__).parent
LAYERS = (
    ("errors", "hardware", "driver"),
    ("recipe", "compat", "distributed", "signals", "hub", "locks"),
    ("data", "model", "cpu"),
    ("generation",),
    ("training",),
    ("rewards",),
    ("reward_model", "rl"),
    ("preferences", "constitutional"),
    ("stages",),
    ("run",),
    ("evaluate", "report"),
    ("cli",),
)
"""A room may import from those in lower layers, and from itself."""
EXCEPTIONS = {"run.directory", "run.manifest"}
"""The format of a run's directory, which rooms below `run` read and write."""
LONGEST = 500
"""Lines of a file."""
FORBIDDEN = re.compile(r"\bis no\b|\bmend(s|ed|ing)?\b|\bnone is\b|\bmet with\b", re.IGNORECASE)
"""Turns of phrase that a reader stumbles over."""


def files():
    for file in sorted(ROOT.rglob("*.py")):
        room = file.relative_to(ROOT).with_suffix("").parts[0]
        if room not in ("__init__", "__main__"):
            yield file, room


def module(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(file) for file, _ in files()}


def imports(file: Path, *, top_only: bool = False, run_time: bool = False):
    """Dotted names that a file imports; `run_time` leaves out what only type checkers read."""
    tree = ast.parse(file.read_text())
    skipped = set()
    if run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= set(ast.walk(node))
    for node in tree.body if top_only else ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                yield f"{node.module}.{name.name}"
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def ours(file: Path, **how) -> set[str]:
    """The modules of this package that a file imports."""
    found = set()
    for name in imports(file, **how):
        parts = name.split(".")
        if parts[0] == "align_cli":
            found |= {".".join(parts[1:end]) for end in range(2, len(parts) + 1)} & MODULES
    # of `model.load`, the package `model` is imported too, which is empty
    return {one for one in found if not any(other.startswith(f"{one}.") for other in found)}


def test_every_room_has_a_layer():
    assert {room for _, room in files()} == {room for layer in LAYERS for room in layer}


def test_imports_run_one_way():
    height = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    wrong = [
        f"{module(file)} imports {other}"
        for file, room in files()
        for other in ours(file)
        if (upper := other.split(".")[0]) != room and height[upper] >= height[room] and other not in EXCEPTIONS
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_leads_back():
    arrows = {module(file): ours(file, run_time=True) for file, _ in files()}
    done: set[str] = set()

    def follow(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for other in sorted(arrows.get(name, ())):
            follow(other, (*path, name))
        done.add(name)

    for name in sorted(arrows):
        follow(name, ())


def test_stages_import_no_stage_and_are_imported_by_none():
    assert {file.stem for file in (ROOT / "stages").glob("*.py")} == {"__init__", *STAGES}
    for file, _ in files():
        assert not any(other.startswith("stages.") for other in ours(file)), file


def test_the_command_line_imports_nothing_heavy():
    for name in imports(ROOT / "cli.py", top_only=True):
        first = name.split(".")[0]
        assert first in {"typer", "align_cli"} or first in sys.stdlib_module_names
        assert first != "align_cli" or name.startswith(("align_cli.errors.", "align_cli.recipe.stages.")), name


def test_no_file_is_two():
    for file, _ in files():
        assert len(file.read_text().splitlines()) <= LONGEST, f"{file} has grown past one subject"


def test_every_import_is_absolute():
    for file, _ in files():
        relative = [node for node in ast.walk(ast.parse(file.read_text())) if getattr(node, "level", 0)]
        assert not relative, f"{file}: a relative import slips past the table"


@pytest.mark.parametrize("room", ["reward_model", "preferences", "rl"])
def test_losses_are_made_of_torch_alone(room):
    for name in imports(ROOT / room / "losses.py"):
        first = name.split(".")[0]
        assert first == "torch" or first in sys.stdlib_module_names, name


def test_private_names_of_libraries_are_in_one_room():
    """`from torch.x import _private`, `library._private` and hooks that override a library's private method."""
    libraries = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "hydra", "typer"}
    for file, room in files():
        if room == "compat":
            continue
        tree = ast.parse(file.read_text())
        imported = {
            alias.asname or alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if ((node.module or "") if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0] in libraries
        }
        for node in ast.walk(tree):
            private = ""
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in libraries:
                private = next((alias.name for alias in node.names if _private(alias.name)), "")
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
                private = node.attr if _private(node.attr) else ""
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call):
                called = node.value.func
                private = node.attr if isinstance(called, ast.Name) and called.id == "super" else ""
                private = private if _private(private) else ""
            assert not private, f"{file}:{node.lineno}: {private} belongs into compat/"


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_the_command_line_starts_without_what_it_does_not_need():
    heavy = ("torch", "transformers", "hydra", "omegaconf", "pydantic", "yaml")
    code = f"import sys, align_cli.cli\nprint(*[name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "\n"


def pages():
    top = ROOT.parent
    yield from (file for file, _ in files())
    for pattern in ("*.md", "docs/*.md", "scripts/**/*.py", "scripts/demo/data/*.md", "recipes/*/*.yaml", "Makefile"):
        yield from (file for file in sorted(top.glob(pattern)) if file.parent.name != "constitution")


def test_english_is_plain():
    wrong = [
        f"{file.relative_to(ROOT.parent)}:{number}: {match[0]}"
        for file in pages()
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if (match := FORBIDDEN.search(line))
    ]
    assert not wrong, "\n".join(wrong)
