"""Asks the libraries, in a process of their own, about `trainer:` settings that only they can judge."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from align_cli import driver
from align_cli.errors import RecipeError, raise_all
from align_cli.recipe import trainer_rules
from align_cli.recipe.sections import Recipe

OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that would make the process wait for other ranks."""


def problems(recipe: Recipe) -> list[str]:
    """A line for every setting of `trainer:` that transformers, TRL or torch refuse on this machine.

    Takes seconds, since it imports them; no time if all settings are known (`trainer_rules.SURE`). Hosts of a hostfile
    may have other devices than this machine, so their ranks are the first to ask.
    """
    if not trainer_rules.unsure(recipe.trainer) or recipe.launch.hostfile is not None:
        return []
    variables = {key: value for key, value in os.environ.items() if key not in OF_RANKS}
    if seen := driver.visible()[:1]:
        variables |= driver.showing(seen)
    tried = subprocess.run(
        [sys.executable, "-m", "align_cli.training.trial"],
        input=json.dumps({"stage": recipe.stage, "trainer": recipe.trainer}),
        capture_output=True,
        text=True,
        env=variables,
        check=False,
    )
    if tried.returncode:
        raise RuntimeError(f"the trial of trainer: ended with code {tried.returncode}: {tried.stderr[-2000:]}")
    return json.loads(tried.stdout.splitlines()[-1])


def check(recipe: Recipe) -> None:
    """Raises RecipeError with all `problems`."""
    raise_all(RecipeError, problems(recipe))
