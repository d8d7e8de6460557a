"""The models that a recipe names: can they serve, or which command makes them. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from align_cli.errors import RecipeError, did_you_mean
from align_cli.model import kind
from align_cli.recipe import places
from align_cli.recipe.compose import default_run_dir
from align_cli.recipe.schema import STAGES


def policy_problems(key: str, path: str, starting: bool, todo: list[str]) -> list[str]:
    """Why a path cannot serve as a causal language model; adds the command that makes it to `todo` if it is still to be
    made and nothing is `starting`."""
    held = kind.look(path)
    stage = stage_of_run(path)
    if held.kind in ("missing", "unfinished") and stage is not None:
        command = f"align {stage} recipe={recipe_of(stage, path)}"
        if held.kind == "missing":
            try:
                places.find(stage, recipe_of(stage, path))
            except RecipeError as error:
                return [f"{key}: {path} is not there, and no recipe makes it ({error.lines[0]})"]
            if not starting:
                todo.append(command)
                return []
        verb = "is not there" if held.kind == "missing" else "is not finished"
        return [f"{key}: {path} {verb}; run `{command}` first"]
    if held.kind == "reward-model" or held.reward:
        return [f"{key}: {path} is a reward model (a scalar head); name the SFT run it came from"]
    if held.kind == "adapter":
        if held.base is None or (kind.look(held.base).kind not in ("causal-lm", "hub")):
            return [
                f"{key}: {path} is an adapter whose base {held.base or '(unnamed)'} is not there; "
                "put the base back, or name a model merged by `align merge`"
            ]
        return []
    if held.kind == "missing":
        near = _near_directory(path)
        return [f"{key}: {path}: no such directory{near}; name a model directory, a finished run or a hub id"]
    if held.kind == "unfinished":
        return [f"{key}: {path} is not finished; run its stage again to finish it"]
    if held.kind == "other":
        mend = (
            "save it with save_pretrained (safetensors)" if held.config else "name a model directory or a finished run"
        )
        return [f"{key}: {path}: {held.finding}; {mend}"]
    return []


def stage_of_run(path: str) -> str | None:
    """The stage whose default run directory this is."""
    path = os.path.normpath(path)
    parts = Path(path).parts
    return (
        parts[-1] if len(parts) == 3 and path == default_run_dir(parts[1], parts[-1]) and parts[-1] in STAGES else None
    )


def recipe_of(stage: str, path: str) -> str:
    """What to write after recipe= to make that run."""
    unfinished = Path(path) / "recipe.yaml"
    return str(unfinished) if unfinished.is_file() else f"{Path(path).parts[1]}.yaml"


def _near_directory(path: str) -> str:
    siblings = (
        [str(entry) for entry in Path(path).parent.glob("*") if entry.is_dir()] if Path(path).parent.is_dir() else []
    )
    return did_you_mean(path, siblings).rstrip("?")
