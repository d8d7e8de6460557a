"""Where recipes are found: `recipes/` of the working directory, and the package."""

from __future__ import annotations

from pathlib import Path

from align_cli.errors import RecipeError, did_you_mean
from align_cli.recipe.stages import STAGES

GROUPS = ("model", "data", "lora", "zero")
"""Config groups: a name on the command line or in `defaults` picks a file of recipes/<group>/."""


def shipped() -> Path:
    """Folder of the shipped recipes: inside the wheel, or next to the package in a checkout or an editable install."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def roots() -> list[Path]:
    """Folders with `<stage>/<name>.yaml` and the config groups, by precedence."""
    here = Path("recipes")
    if not here.is_dir():
        return [shipped()]
    return [here] if here.resolve() == shipped() else [here, shipped()]


def listing() -> dict[str, Path]:
    """`stage/name` -> file of every recipe; those in the working directory hide shipped ones of the same name."""
    recipes: dict[str, Path] = {}
    for root in roots():
        for stage in STAGES:
            for file in sorted((root / stage).glob("*.yaml")):
                recipes.setdefault(f"{stage}/{file.stem}", file)
    return recipes


def _folders(stage: str) -> list[Path]:
    """The search path of a recipe, by precedence."""
    return [Path(), *(root / stage for root in roots())]


def find(stage: str, named: str) -> Path:
    """The file of `recipe=named` under `align <stage>`.

    Raises RecipeError with the closest names if it does not exist.
    """
    plain = named if named.endswith(".yaml") else f"{named}.yaml"
    places = [folder / name for name in dict.fromkeys((named, plain)) for folder in _folders(stage)]
    there = [place for place in places if place.is_file()]
    if file := next((place for place in there if place.suffix == ".yaml"), None):
        return file
    if there:
        raise RecipeError(f"recipe={named}: recipes end in .yaml; rename {there[0]} to {there[0].with_suffix('.yaml')}")
    known = {key.removeprefix(f"{stage}/"): key for key in listing() if key.startswith(f"{stage}/")}
    wanted = Path(named).name.removesuffix(".yaml")
    nearest = did_you_mean(wanted, list(known))
    listed = f"known for {stage}: {', '.join(known) or 'none'}"
    elsewhere = [key for key in listing() if key.endswith(f"/{wanted}")]
    if elsewhere and not nearest:
        listed += f"; other stages have {', '.join(elsewhere)}"
    raise RecipeError(f"recipe={named}: no such file or recipe{nearest or ';'} ({listed})".replace("; (", " ("))


def group_files(group: str) -> dict[str, Path]:
    """Name -> file of a config group (`model`, `data`, `lora`, `zero`)."""
    files: dict[str, Path] = {}
    for root in roots():
        for file in sorted((root / group).glob("*.yaml")):
            files.setdefault(file.stem, file)
    return files
