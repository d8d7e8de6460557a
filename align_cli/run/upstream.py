"""Checks that the models of a recipe are usable, and finds the commands that create missing ones. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from align_cli.errors import RecipeError, did_you_mean
from align_cli.model import kind, templates
from align_cli.recipe import catalog, check
from align_cli.recipe.compose import default_run_dir
from align_cli.recipe.generation import GeneratorSource
from align_cli.recipe.sections import Data
from align_cli.recipe.stages import STAGES


def policy_problems(key: str, path: str, starting: bool, todo: list[str]) -> list[str]:
    """Why a path cannot be used as a causal language model. For a run that does not exist yet, adds the commands that
    create it to `todo`, in order, unless `starting`."""
    contents = kind.look(path)
    stage = stage_of_run(path)
    if stage is not None and contents.kind == "missing":
        return _to_be_made(key, path, stage, starting, todo)
    if stage is not None and contents.kind == "unfinished":
        return [f"{key}: {path} is not finished; run `align {stage} recipe={recipe_of(stage, path)}` first"]
    if contents.kind == "reward-model" or contents.reward:
        return [f"{key}: {path} is a reward model (a scalar head); name the SFT run it came from"]
    if contents.kind == "adapter":
        return _base_problems(key, path, contents.base)
    if contents.kind == "missing":
        return [f"{key}: {path}: no such directory; name a model directory, a finished run or a hub id{_near(path)}"]
    if contents.kind == "unfinished":
        return [f"{key}: {path} is not finished; run its stage again to finish it"]
    if contents.kind == "other":
        return [f"{key}: {path}: {contents.finding}; {contents.remedy or 'name a model directory or a finished run'}"]
    return []


def _base_problems(key: str, path: str, base: str | None) -> list[str]:
    """Why an adapter's base model cannot be used."""
    contents = kind.look(base) if base else None
    if contents is not None and contents.kind in ("causal-lm", "hub"):
        return []
    missing = contents is None or contents.kind == "missing"
    finding = "does not exist" if missing else contents.finding or f"is a {contents.kind}"
    return [
        f"{key}: {path} is an adapter whose base {base or '(unnamed)'} {finding}; restore the base, or name a model "
        "merged by `align merge`"
    ]


def reward_problems(key: str, path: str, starting: bool, todo: list[str]) -> list[str]:
    """Why a path cannot be used as a reward model. A policy cannot: its scalar head would be random."""
    contents, stage = kind.look(path), stage_of_run(path)
    if stage is not None and contents.kind == "missing":
        return _to_be_made(key, path, stage, starting, todo)
    if contents.kind == "unfinished":
        again = f"`align {stage} recipe={recipe_of(stage, path)}`" if stage else "its stage"
        return [f"{key}: {path} is not finished; run {again} first"]
    if contents.kind in ("reward-model", "hub"):
        return []
    if contents.kind == "adapter" and contents.reward:
        return _base_problems(key, path, contents.base)
    policies = {"causal-lm": "is a language model without a trained scalar head", "adapter": "is a policy's adapter"}
    finding = policies.get(contents.kind, contents.finding or "is not a model")
    return [f"{key}: {path} {finding}; name a finished `align rm` run, such as ${{stage:rm}}"]


def backbone_problems(key: str, run: str, base: str) -> list[str]:
    """Why a reward model cannot share the backbone `base`."""
    contents = kind.look(run)
    if contents.kind == "missing":
        return []  # reported by `reward_problems`, or a run that does not exist yet
    if contents.kind != "adapter" or not contents.reward:
        return [
            f"{key}: {run} is not an adapter, so it cannot share the policy's backbone; train it with lora: on {base}, "
            "or remove lora here"
        ]
    if contents.base != base and kind.fingerprint(contents.base or "") != (kind.fingerprint(base) or "none"):
        return [
            f"{key}: {run} is an adapter on {contents.base}, not on {base}; set model.path to its base, or remove lora"
        ]
    return []


def generator_problems(key: str, source: GeneratorSource, starting: bool, todo: list[str]) -> list[str]:
    """Why a writer or a judge cannot be used. Endpoints are not contacted before the run starts."""
    if source.path is None:
        return source.environment_problems(key)
    template = templates.problems(source.path, source.chat_template)
    return policy_problems(f"{key}.path", source.path, starting, todo) + [
        line.replace("model.", f"{key}.") for line in template
    ]


def existing(data: Data, lines: list[str], starting: bool, todo: list[str]) -> tuple[Data | None, list[str]]:
    """(the data without files that upstream runs have not written yet, those files); None if no training data remains.

    Adds the commands that write them to `todo`. Adds to `lines` why they cannot be written or, with `starting`, that
    they must be written first.
    """
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
                lines.append(f"{key}: {source.path} does not exist yet; finish its run with `{again}`")
                pending.append(source.path)
    if not pending:
        return data, pending
    train = [source for source in data.train if source.path not in pending]
    held_out = data.eval
    if isinstance(held_out, list):
        held_out = [source for source in held_out if source.path not in pending] or None
    return (replace(data, train=train, eval=held_out) if train else None), pending


def _to_be_made(key: str, path: str, stage: str, starting: bool, todo: list[str]) -> list[str]:
    """Why a missing run cannot be created, or that it must be created first. Otherwise adds its command to `todo`."""
    name = recipe_of(stage, path)
    command = f"align {stage} recipe={name}"
    if command in todo:
        return []
    try:
        _, above = check.load(stage, [f"recipe={name}"])
    except RecipeError as error:
        return [f"{key}: {path} does not exist, and no recipe makes it ({error.lines[0]})"]
    if not same_place(above.run_dir, path):
        return [f"{key}: {path} does not exist, and `{command}` makes {above.run_dir}; name that, or correct the path"]
    if same_place(above.model.path, path):
        return [f"{key}: {path} does not exist, and `{command}` starts from it; write a recipe that makes it"]
    if starting:
        return [f"{key}: {path} does not exist. Run `{command}` first."]
    todo.append(command)  # stops the recursion for runs that name each other
    lines = policy_problems(f"`{command}`: model.path", above.model.path, starting, todo)
    todo.remove(command)
    todo.append(command)  # after the commands it depends on
    return lines


def same_place(one: str, other: str) -> bool:
    """Whether two strings denote the same path."""
    return os.path.abspath(one) == os.path.abspath(other)


def stage_of_run(path: str) -> str | None:
    """The stage whose default run directory this is."""
    path = os.path.relpath(path or ".")
    parts = Path(path).parts
    if len(parts) < 3 or parts[-1] not in STAGES or path != default_run_dir(_name(path), parts[-1]):
        return None
    return parts[-1]


def _name(path: str) -> str:
    """The name of the run whose default directory this is; it may contain slashes."""
    return "/".join(Path(os.path.relpath(path)).parts[1:-1])


def recipe_of(stage: str, path: str) -> str:
    """The value of recipe= that creates a run."""
    unfinished = Path(path) / "recipe.yaml"
    if unfinished.is_file():
        return str(unfinished)
    return catalog.maker(stage, _name(path))


def _near(path: str) -> str:
    """`. Did you mean …?` with the closest name of a sibling directory, else the empty string."""
    parent = Path(path).parent
    return did_you_mean(path, [str(entry) for entry in parent.glob("*") if entry.is_dir()] if parent.is_dir() else [])
