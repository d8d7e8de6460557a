"""`align lineage`: the inputs of a run as a tree, with the parents that have changed since. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from align_cli.errors import UpstreamError
from align_cli.model import kind
from align_cli.run import manifest
from align_cli.run.directory import RunDirectory

SHOWN = ("loss", "train_loss", "eval_loss", "eval_rewards/accuracies")


def show(path: str, console: Console) -> bool:
    """Print the tree of a run's parents. Returns whether they are all unchanged.

    Raises UpstreamError if the run does not exist.
    """
    if not Path(path).is_dir():
        raise UpstreamError(f"{path}: no such run; runs are under runs/<name>/<stage>")
    if manifest.read(path) is None and not RunDirectory(path).recipe.is_file():
        raise UpstreamError(
            f"{path}: is not a run (it has no manifest.json); name a directory such as runs/<name>/<stage>"
        )
    stale: list[str] = []
    console.print(_branch(path, None, stale, set()))
    for line in stale:
        console.print(f"stale: {line}", style="yellow", highlight=False, markup=False)
    return not stale


def _branch(path: str, entry: dict[str, Any] | None, stale: list[str], above: set[str]) -> Tree:
    made = manifest.read(path)
    title = Text()
    if entry is not None:
        title.append(f"{entry['role']:<10}", style="dim")
    title.append(path, style="bold")
    title.append(f"  {_summary(path, made)}")
    tree = Tree(title)
    if made is None or path in above:
        return tree
    changed = manifest.changed_parents(made)
    for parent in made.get("parents", []):
        branch = _branch(parent["path"], parent, stale, above | {path})
        reason = next((line for line in changed if line.startswith(f"{parent['role']} {parent['path']} ")), None)
        if reason:
            branch.label.append(
                f"  ← {reason.removeprefix(parent['role'] + ' ' + parent['path'] + ' ')}", style="yellow"
            )
            stale.append(f"{path}: its {reason}")
        tree.add(branch)
    for data in made.get("data", []):
        dropped = sum((data.get("dropped") or {}).values())
        tree.add(
            Text.assemble(
                ("data      ", "dim"), f"{data.get('source')}  {data.get('rows_used')} rows, {dropped} dropped"
            )
        )
    return tree


def _summary(path: str, made: dict[str, Any] | None) -> str:
    if made is not None:
        figures = [f"{key} {made['metrics'][key]:.4g}" for key in SHOWN if key in made.get("metrics", {})]
        # a manifest.json written by another tool may lack these keys
        parts = [made.get(key, "?") for key in ("stage", "status", "finished")]
        return " · ".join(["{}, {} {}".format(*parts), *figures])
    contents = kind.look(path)
    names = {"hub": "hub id", "missing": "gone", "unfinished": "unfinished", "causal-lm": "model directory"}
    return names.get(contents.kind, contents.kind)
