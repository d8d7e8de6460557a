"""Prepares the run directory of a plan, once, before any rank starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from align_cli.errors import LaunchError, UpstreamError
from align_cli.recipe.check import to_tree
from align_cli.run import manifest, preflight, settings
from align_cli.run.directory import RunDirectory, write_atomically
from align_cli.run.plan import Plan

CACHE = Path("runs/.cache")


def begin(plan: Plan, say: Callable[[str], None]) -> RunDirectory | None:
    """Lock the run directory and write recipe.yaml into it; returns None if it holds a finished, unchanged run.

    A finished run of another recipe is renamed, never overwritten. Raises UpstreamError as `check` does, and
    LaunchError if another process uses the run or its disk is too small.
    """
    differs = check(plan, say)
    if differs is None:
        return None
    settings.check(plan.recipe)
    run = RunDirectory(plan.recipe.run_dir)
    if plan.storage is not None and (problem := plan.storage.problem()):
        raise LaunchError(f"run_dir: {run.path}: {problem}")
    run.lock()
    if run.state() != plan.state:
        run.unlock()
        raise LaunchError(f"{run.path}: another align changed it just now; run the same command again")
    if plan.state == "finished" or (plan.state == "unfinished" and plan.recipe.force):
        why = "force=true" if plan.recipe.force else _shortened(differs)
        say(f"{run.path}: running again ({why}); the old run is now {run.set_aside()}")
        run.lock()
    tree = to_tree(plan.recipe) | {"force": False}
    tree["data"] |= {"date": preflight.date_of(plan)}
    head = f"# align {plan.composed.stage} recipe={run.recipe}   repeats this run\n"
    write_atomically(run.recipe, head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    manifest.keep_data(run, plan.counts)
    return run


def check(plan: Plan, say: Callable[[str], None]) -> list[str] | None:
    """The differences between the recipe and the run in its directory, empty without a run; None if that run is
    finished and unchanged, so that nothing is to do. Writes nothing.

    Raises UpstreamError for an unfinished run of another recipe or of parents that have changed, whose checkpoints this
    one must not continue.
    """
    run, recipe = RunDirectory(plan.recipe.run_dir), plan.recipe
    if plan.state not in ("finished", "unfinished"):
        return []
    same, differs = preflight.unchanged(plan)
    if plan.state == "finished" and same and not recipe.force:
        say(f"{run.path} is finished and unchanged; nothing to do (force=true runs it again)")
        return None
    if plan.state == "unfinished" and not same and not recipe.force:
        raise UpstreamError(
            f"{run.path}: holds an unfinished run of another recipe ({_shortened(differs)}); finish it with "
            f"`align {plan.composed.stage} recipe={run.recipe}`, or start over with force=true"
        )
    inputs = manifest.inputs(run) if plan.state == "unfinished" and not recipe.force else None
    changed = preflight.changed_inputs(inputs) if inputs else []
    if plan.state == "unfinished" and not recipe.force:
        changed += manifest.changed_data(run, plan.counts)
    if changed:
        raise UpstreamError(
            f"{run.path}: is unfinished, and its {_shortened(changed)}; restore it, or start over with force=true"
        )
    return differs


def _shortened(differs: list[str]) -> str:
    more = f" and {len(differs) - 3} more" if len(differs) > 3 else ""
    return "; ".join(differs[:3]) + more
