"""Where the rewards of a composed recipe come from, before it is checked as a whole. Imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError

from align_cli.data.count import Count, of_constitution
from align_cli.errors import RecipeError
from align_cli.recipe import constitution
from align_cli.recipe.rewards import RewardSource, reward_keys
from align_cli.run import constitutional


def reward_models(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, path) of every reward model that a recipe names."""
    return _rewards(tree, "path")


def functions(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, module:function) of every Python function that a recipe names as a reward."""
    return _rewards(tree, "python")


def compared(tree: dict[str, Any]) -> list[str]:
    """The columns of the data that rewards compare responses with."""
    checks = [entry.get("verify") for _, entry in _entries(tree)]
    columns = [check.get("column") for check in checks if isinstance(check, dict)]
    return list(dict.fromkeys(column for column in columns if isinstance(column, str)))


def judges(tree: dict[str, Any]) -> list[tuple[str, RewardSource]]:
    """(key, reward) of every reward that is a judge's and by itself in order."""
    found = []
    for key, entry in _entries(tree):
        try:
            source = TypeAdapter(RewardSource).validate_python(entry)
        except ValidationError:
            continue  # the recipe's check says why
        if source.judge is not None and not any(source.rules()):
            found.append((key, source))
    return found


def judge_problems(tree: dict[str, Any], starting: bool, todo: list[str]) -> tuple[list[str], list[Count]]:
    """Problems of judges and their constitutions, and the constitutions as sources of the manifest."""
    lines: list[str] = []
    counts: list[Count] = []
    for key, source in judges(tree):
        lines += constitutional.speaker_problems(f"{key}.judge", source.judge, starting, todo)
        try:
            counts.append(of_constitution(constitution.chosen(source.constitution, source.principles, key)))
        except RecipeError as error:
            lines += error.lines
    return lines, counts


def _rewards(tree: dict[str, Any], what: str) -> list[tuple[str, str]]:
    found = _entries(tree) + [(role, _as_entry(tree.get(role))) for role in ("value", "gold")]
    return [(f"{key}.{what}", entry[what]) for key, entry in found if isinstance(entry.get(what), str)]


def _entries(tree: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    named = tree.get("reward")
    entries = named if isinstance(named, list) else [named]
    return list(zip(reward_keys(len(entries)), map(_as_entry, entries), strict=True))


def _as_entry(named: Any) -> dict[str, Any]:
    """A section; a string alone is a path."""
    return named if isinstance(named, dict) else {"path": named}
