"""Checks of iterative DPO and SPIN before they start, and one line per round for `align check`."""

from __future__ import annotations

import math
from dataclasses import replace

from align_cli.data.groups import Count, check_sources
from align_cli.data.load import is_local
from align_cli.model.saved_tokenizer import SavedTokenizer
from align_cli.recipe.preferences import DpoRecipe, SpinRecipe
from align_cli.recipe.sections import Data, Recipe
from align_cli.recipe.trl_config import fields


def in_rounds(recipe: Recipe) -> bool:
    """Whether the recipe is for iterative DPO."""
    return isinstance(recipe, DpoRecipe) and recipe.method.rounds is not None


def count(recipe: Recipe) -> int:
    """Number of models that a run leaves: one for each round of a loop."""
    if isinstance(recipe, SpinRecipe):
        return recipe.method.iterations
    return recipe.method.rounds if isinstance(recipe, DpoRecipe) and recipe.method.rounds is not None else 1


def sources(recipe: Recipe, data: Data, tokenizer: SavedTokenizer | None) -> tuple[list[str], list[Count]]:
    """Problems and counts of a recipe's sources; for iterative DPO, data.train holds prompts and data.eval preferences.

    With a `tokenizer` (only its chat template is needed), rows that the template rejects are included.
    """
    cells, rows = recipe.compared_columns(), recipe.row_kind()
    if not in_rounds(recipe):
        return check_sources(data, rows, cells=cells, tokenizer=tokenizer)
    lines, counts = check_sources(replace(data, eval=None), rows, cells=cells, tokenizer=tokenizer)
    if isinstance(data.eval, list):
        watched = replace(data, train=data.eval, eval=None)
        more, held_out = check_sources(watched, recipe.spec.rows, tokenizer=tokenizer)
        lines, counts = lines + more, counts + held_out
    return lines, counts


def problems(recipe: Recipe, counts: list[Count]) -> list[str]:
    """An error line if the sources are known to hold too few prompts."""
    prompts = _prompts(recipe, counts)
    if prompts is None:
        return []
    if isinstance(recipe, SpinRecipe):
        wanted = recipe.method.prompts
        if wanted is not None and wanted > sum(prompts):
            return [f"method.prompts: is {wanted}, but data.train holds {sum(prompts)}; lower it, or null for all"]
    elif isinstance(recipe, DpoRecipe) and (rounds := recipe.method.rounds) is not None:
        wanted = recipe.method.prompts
        each = min(prompts) if recipe.method.fresh == "sources" else sum(prompts) // rounds
        if each < (wanted or 1):
            key, value = ("prompts", each) if wanted and each else ("rounds", sum(prompts))
            return [
                f"data.train: {sum(prompts)} prompts are too few for {rounds} rounds of {wanted or 1} new prompts; add "
                f"prompts or set method.{key}={value} or less"
            ]
    return []


def plan(recipe: Recipe, counts: list[Count], batch: int) -> list[tuple[str, str]]:
    """(heading, text) for every round of a loop; empty for other stages."""
    prompts = _prompts(recipe, counts)
    if isinstance(recipe, SpinRecipe):
        return _iterations(recipe, prompts, batch)
    return _rounds(recipe, prompts, batch) if in_rounds(recipe) else []


def _rounds(recipe: DpoRecipe, prompts: list[int] | None, batch: int) -> list[tuple[str, str]]:
    method, share = recipe.method, None
    if prompts:
        share = min(prompts) if method.fresh == "sources" else sum(prompts) // method.rounds
    size = method.prompts or share
    answers = f"{size} prompts × {method.k} answers" if size else f"{method.k} answers a prompt"
    per = {"all": method.k * (method.k - 1) // 2, "adjacent": method.k - 1}.get(method.pairs, 1)
    return [
        (
            f"round {number}",
            f"{recipe.run_dir}/round-{number} from {_start(recipe, 'round', number, 1)} · {answers} · "
            f"β {method.beta:g}{_steps(recipe, size and size * per, batch)}",
        )
        for number in range(1, method.rounds + 1)
    ]


def _iterations(recipe: SpinRecipe, prompts: list[int] | None, batch: int) -> list[tuple[str, str]]:
    method, lines = recipe.method, []
    size = method.prompts or (sum(prompts) if prompts else None)
    if size and method.prompts is None and isinstance(recipe.data.eval, float):
        size = math.ceil(size * (1 - recipe.data.eval))
    for number in range(method.iterations):
        beta, rate = method.at(number)
        if rate is None:
            rate = recipe.trainer.get("learning_rate", fields("spin")["learning_rate"].default)
        pairs = size and size * (2 if number and method.mix_previous else 1)
        lines.append(
            (
                f"iteration {number}",
                f"{recipe.run_dir}/iteration-{number} from {_start(recipe, 'iteration', number, 0)} · "
                f"{f'{size} replies · ' if size else ''}β {beta:g}, learning rate {rate:g}"
                f"{_steps(recipe, pairs, batch)}",
            )
        )
    return lines


def _prompts(recipe: Recipe, counts: list[Count]) -> list[int] | None:
    """Number of prompts of each source of data.train; None unless all are known."""
    sources = recipe.data.train
    known = counts[: len(sources)] if all(map(is_local, sources)) else []
    if not known or any(count.partial for count in known):
        return None
    return [int(count.rows_used * source.weight) for count, source in zip(known, sources, strict=True)]


def _start(recipe: Recipe, word: str, number: int, first: int) -> str:
    return recipe.model.path if number == first else f"{word}-{number - 1}"


def _steps(recipe: Recipe, pairs: int | None, batch: int) -> str:
    """The maximum number of steps as text: prompts whose answers have equal scores give no pair."""
    if (limit := recipe.trainer.get("max_steps", -1)) > 0:
        return f" · {limit} steps"
    if not pairs:
        return ""
    return f" · {math.ceil(math.ceil(pairs / batch) * recipe.trainer.get('num_train_epochs', 3.0))} steps at most"
