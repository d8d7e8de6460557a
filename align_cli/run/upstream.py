"""The models that a recipe names: can they serve, or which command makes them. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from align_cli.errors import RecipeError, did_you_mean
from align_cli.model import kind
from align_cli.recipe import check as recipe_check
from align_cli.recipe.compose import default_run_dir
from align_cli.recipe.schema import STAGES
from align_cli.recipe.sections import Data


def policy_problems(key: str, path: str, starting: bool, todo: list[str]) -> list[str]:
    """Why a path cannot serve as a causal language model; adds the commands that make it to `todo`, in order, if it is
    still to be made and nothing is `starting`."""
    held = kind.look(path)
    stage = stage_of_run(path)
    if stage is not None and held.kind == "missing":
        return _to_be_made(key, path, stage, starting, todo)
    if stage is not None and held.kind == "unfinished":
        return [f"{key}: {path} is not finished; run `align {stage} recipe={recipe_of(stage, path)}` first"]
    if held.kind == "reward-model" or held.reward:
        return [f"{key}: {path} is a reward model (a scalar head); name the SFT run it came from"]
    if held.kind == "adapter":
        base = kind.look(held.base) if held.base else None
        if base is None or base.kind not in ("causal-lm", "hub"):
            found = "is not there" if base is None or base.kind == "missing" else base.finding or f"is a {base.kind}"
            return [
                f"{key}: {path} is an adapter whose base {held.base or '(unnamed)'} {found}; "
                "put the base back, or name a model merged by `align merge`"
            ]
        return []
    if held.kind == "missing":
        near = _near_directory(path)
        return [f"{key}: {path}: no such directory{near}; name a model directory, a finished run or a hub id"]
    if held.kind == "unfinished":
        return [f"{key}: {path} is not finished; run its stage again to finish it"]
    if held.kind == "other":
        return [f"{key}: {path}: {held.finding}; {held.mend or 'name a model directory or a finished run'}"]
    return []


def reward_problems(key: str, path: str, starting: bool, todo: list[str]) -> list[str]:
    """Why a path cannot serve as a reward model: a policy's head would be drawn anew, and rewards be noise."""
    held, stage = kind.look(path), stage_of_run(path)
    if stage is not None and held.kind == "missing":
        return _to_be_made(key, path, stage, starting, todo)
    if held.kind == "unfinished":
        again = f"`align {stage} recipe={recipe_of(stage, path)}`" if stage else "its stage"
        return [f"{key}: {path} is not finished; run {again} first"]
    if held.kind in ("reward-model", "hub") or (held.kind == "adapter" and held.reward):
        return []
    found = {"causal-lm": "is a language model without a trained scalar head", "adapter": "is a policy's adapter"}
    said = found.get(held.kind, held.finding or "is no model")
    return [f"{key}: {path} {said}; name a finished `align rm` run, such as ${{stage:rm}}"]


def backbone_problems(key: str, run: str, base: str) -> list[str]:
    """Why a reward model cannot share the backbone `base`."""
    held = kind.look(run)
    if held.kind == "missing":
        return []  # said elsewhere, or still to be made
    if held.kind != "adapter" or not held.reward:
        return [
            f"{key}: {run} is no adapter, so it cannot share the policy's backbone; train it with lora: on {base}, or "
            "remove lora here"
        ]
    if held.base != base and kind.fingerprint(held.base or "") != (kind.fingerprint(base) or "none"):
        return [
            f"{key}: {run} is an adapter on {held.base}, not on {base}; name the model it was made on, or remove lora"
        ]
    return []


def there_already(data: Data, lines: list[str], starting: bool, todo: list[str]) -> tuple[Data | None, list[str]]:
    """The data without files that a run which is still to be made will write (None if that leaves no training data),
    and those files. Adds the commands that make them to `todo`, and to `lines` why they cannot be made or, where a
    stage is `starting`, that they must be made first."""
    pending: list[str] = []
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        for source in sources if isinstance(sources, list) else ():
            run = os.path.dirname(source.path)
            stage = stage_of_run(run) if run else None
            if stage is not None and kind.look(run).kind == "missing":
                lines += _to_be_made(key, run, stage, starting, todo)
                pending.append(source.path)
            elif stage is not None and kind.look(run).kind == "unfinished" and not os.path.isfile(source.path):
                again = f"align {stage} recipe={recipe_of(stage, run)}"
                lines.append(f"{key}: {source.path} is not there yet; finish its run with `{again}`")
                pending.append(source.path)
    if not pending:
        return data, pending
    train = [source for source in data.train if source.path not in pending]
    held_out = data.eval
    if isinstance(held_out, list):
        held_out = [source for source in held_out if source.path not in pending] or None
    return (replace(data, train=train, eval=held_out) if train else None), pending


def _to_be_made(key: str, path: str, stage: str, starting: bool, todo: list[str]) -> list[str]:
    """Why a run that is not there cannot be made, or has to be made first."""
    named = recipe_of(stage, path)
    command = f"align {stage} recipe={named}"
    if command in todo:
        return []
    try:
        _, above = recipe_check.load(stage, [f"recipe={named}"])
    except RecipeError as error:
        return [f"{key}: {path} is not there, and no recipe makes it ({error.lines[0]})"]
    if not same_place(above.run_dir, path):
        return [f"{key}: {path} is not there, and `{command}` makes {above.run_dir}; name that, or mend its name"]
    if same_place(above.model.path, path):
        return [f"{key}: {path} is not there, and `{command}` starts from it; write a recipe that makes it"]
    if starting:
        return [f"{key}: {path} is not there; run `{command}` first"]
    todo.append(command)  # for runs that name each other
    lines = policy_problems(f"`{command}`: model.path", above.model.path, starting, todo)
    todo.remove(command)
    todo.append(command)  # after what it needs itself
    return lines


def same_place(one: str, other: str) -> bool:
    """Whether two spellings are of one path."""
    return os.path.abspath(one) == os.path.abspath(other)


def stage_of_run(path: str) -> str | None:
    """The stage whose default run directory this is."""
    path = os.path.relpath(path or ".")
    parts = Path(path).parts
    return (
        parts[-1] if len(parts) == 3 and path == default_run_dir(parts[1], parts[-1]) and parts[-1] in STAGES else None
    )


def recipe_of(stage: str, path: str) -> str:
    """What to write after recipe= to make that run."""
    unfinished = Path(path) / "recipe.yaml"
    return str(unfinished) if unfinished.is_file() else f"{Path(os.path.relpath(path)).parts[1]}.yaml"


def _near_directory(path: str) -> str:
    siblings = (
        [str(entry) for entry in Path(path).parent.glob("*") if entry.is_dir()] if Path(path).parent.is_dir() else []
    )
    return did_you_mean(path, siblings).rstrip("?")
