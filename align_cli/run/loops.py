"""Iterative DPO and SPIN before they start: what their sources must hold, and a line a round for `align check`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from align_cli.data.groups import Count, check_sources
from align_cli.data.load import is_local
from align_cli.recipe.sections import Data
from align_cli.recipe.trainer import fields


def in_rounds(stage: str, tree: dict[str, Any]) -> bool:
    """Whether a composed tree is of iterative DPO."""
    method = tree.get("method")
    return stage == "dpo" and isinstance(method, dict) and method.get("rounds") is not None


def sampling(recipe: Any) -> bool:
    """Whether a recipe is of iterative DPO."""
    return getattr(recipe.method, "rounds", None) is not None


def idle(recipe: Any) -> set[str]:
    """Keys of `method` that mean nothing to this recipe."""
    only_in_rounds = {"prompts", "fresh", "k", "min_gap", "missing_eos"}
    return only_in_rounds if hasattr(recipe.method, "rounds") and not sampling(recipe) else set()


def sources(
    stage: str, tree: dict[str, Any], data: Data, need: str, cells: list[str], tokenizer: Any = None
) -> tuple[list[str], list[Count]]:
    """Problems and counts of a recipe's sources; in rounds, data.train holds prompts and data.eval preferences.

    With a `tokenizer`, which needs no more than a chat template, rows that the template refuses are among them.
    """
    if not in_rounds(stage, tree):
        return check_sources(data, need, cells=cells, tokenizer=tokenizer)
    lines, counts = check_sources(replace(data, eval=None), "prompts", cells=cells, tokenizer=tokenizer)
    if isinstance(data.eval, list):
        more, watched = check_sources(replace(data, train=data.eval, eval=None), need, tokenizer=tokenizer)
        lines, counts = lines + more, counts + watched
    return lines, counts


def problems(recipe: Any, counts: list[Count]) -> list[str]:
    """A line where the sources are known to hold too few prompts."""
    rounds, wanted = getattr(recipe.method, "rounds", None), getattr(recipe.method, "prompts", None)
    held = _held(recipe, counts)
    if held is None or (rounds is None and not hasattr(recipe.method, "iterations")):
        return []
    if rounds is None:
        if wanted is not None and wanted > sum(held):
            return [f"method.prompts: is {wanted}, but data.train holds {sum(held)}; lower it, or null for all"]
        return []
    each = min(held) if recipe.method.fresh == "sources" else sum(held) // rounds
    if each < (wanted or 1):
        return [
            f"data.train: {sum(held)} prompts are too few for {rounds} rounds of {wanted or 1} fresh ones; add prompts "
            f"or set method.{'prompts' if wanted and each else 'rounds'}={(wanted and each) or sum(held)} or less"
        ]
    return []


def plan(recipe: Any, counts: list[Count], batch: int) -> list[tuple[str, str]]:
    """(heading, text) for every round of a loop; nothing for what runs once."""
    method, held = recipe.method, _held(recipe, counts)
    if sampling(recipe):
        share = min(held) if held and method.fresh == "sources" else sum(held) // method.rounds if held else None
        asked = method.prompts or share
        much = f"{asked} prompts × {method.k} answers" if asked else f"{method.k} answers a prompt"
        per = {"all": method.k * (method.k - 1) // 2, "adjacent": method.k - 1}.get(method.pairs, 1)
        return [
            (
                f"round {number}",
                f"{recipe.run_dir}/round-{number} from {_start(recipe, 'round', number, 1)} · {much} · "
                f"β {method.beta:g}{_steps(recipe, asked and asked * per, batch)}",
            )
            for number in range(1, method.rounds + 1)
        ]
    lines = []
    asked = getattr(method, "prompts", None) or (sum(held) if held else None)
    if asked and isinstance(recipe.data.eval, float):
        asked = math.ceil(asked * (1 - recipe.data.eval)) if getattr(method, "prompts", None) is None else asked
    for number in range(getattr(method, "iterations", 0)):
        beta, rate = method.at(number)
        rate = (
            rate if rate is not None else recipe.trainer.get("learning_rate", fields("spin")["learning_rate"].default)
        )
        pairs = asked and asked * (2 if number and method.mix_previous else 1)
        lines.append(
            (
                f"iteration {number}",
                f"{recipe.run_dir}/iteration-{number} from {_start(recipe, 'iteration', number, 0)} · "
                f"{f'{asked} replies · ' if asked else ''}β {beta:g}, learning rate {rate:g}"
                f"{_steps(recipe, pairs, batch)}",
            )
        )
    return lines


def _held(recipe: Any, counts: list[Count]) -> list[int] | None:
    """Prompts of each source of data.train, where all are known."""
    sources = recipe.data.train
    known = counts[: len(sources)] if all(map(is_local, sources)) else []
    if not known or any(count.partial for count in known):
        return None
    return [int(count.rows_used * source.weight) for count, source in zip(known, sources, strict=True)]


def _start(recipe: Any, word: str, number: int, first: int) -> str:
    return recipe.model.path if number == first else f"{word}-{number - 1}"


def _steps(recipe: Any, pairs: int | None, batch: int) -> str:
    """At most so many steps: prompts whose answers score alike make no pair."""
    if (limit := recipe.trainer.get("max_steps", -1)) > 0:
        return f" · {limit} steps"
    if not pairs:
        return ""
    return f" · {math.ceil(math.ceil(pairs / batch) * recipe.trainer.get('num_train_epochs', 3.0))} steps at most"
