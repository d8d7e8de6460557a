"""Lists, prints and copies the recipes that can be found."""

from __future__ import annotations

from pathlib import Path

from align_cli.errors import AlignError, RecipeError, did_you_mean
from align_cli.recipe import files, places


def listed() -> list[str]:
    """One line per recipe: its name, and the command that runs it."""
    every = places.listing().items()
    return [f"{key:<28} {file.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}" for key, file in every]


def find(name: str) -> Path:
    """The file of STAGE/NAME. Raises RecipeError."""
    known = places.listing()
    key = name.removesuffix(".yaml")
    if key not in known:
        raise RecipeError(f"{name}: no such recipe{did_you_mean(key, list(known)) or '; known: ' + ', '.join(known)}")
    return known[key]


def maker(stage: str, name: str) -> str:
    """The value of recipe= whose run of this stage has this name: the file of that name, or one that sets it."""
    plain = f"{name}.yaml"
    every = places.listing().items()
    known = {key.removeprefix(f"{stage}/"): file for key, file in every if key.startswith(f"{stage}/")}
    if name in known and _name(known[name]) == name:
        return plain
    return next((file.name for file in known.values() if _name(file) == name), plain)


def _name(file: Path) -> str:
    """The name that a recipe gives its run, or that of its file."""
    try:
        entries = {key.value: value.value for key, value in files.read(file).value}
    except RecipeError:
        return file.stem
    return entries.get("name", file.stem)


def copy(name: str, destination: str) -> str:
    """Copy a recipe to a file or into a directory; returns what to run. Raises AlignError if the target exists."""
    source, target = find(name), Path(destination)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise AlignError(f"{target}: exists already; remove it or name another file")
    if not target.parent.is_dir():
        raise AlignError(f"{target}: the directory {target.parent} does not exist; make it first")
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return f"{target}: run it with `align {name.split('/')[0]} recipe={target}`"
