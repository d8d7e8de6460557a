"""Rows per step = per device × accumulation × ranks, solved for the factors that the recipe leaves open."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

from align_cli.errors import RecipeError
from align_cli.recipe import trl_config
from align_cli.recipe.sections import Recipe


@dataclass(frozen=True)
class Batch:
    """Rows per device and micro-step, micro-steps per step, and rows per step over all ranks."""

    per_device: int
    accumulation: int
    total: int


def arithmetic(recipe: Recipe, ranks: int) -> Batch:
    """The batch of a recipe on `ranks` ranks.

    Raises RecipeError if data.batch_size is not divisible, with the nearest sizes that are.
    """
    known, given = trl_config.fields(recipe.stage), recipe.trainer
    per_device = given.get("per_device_train_batch_size", known["per_device_train_batch_size"].default)
    accumulation = given.get("gradient_accumulation_steps")
    wanted, rollout = recipe.data.batch_size, recipe.rollout()
    if wanted is not None and rollout is not None:
        for key, unit, what in (("minibatches", rollout.minibatches, ""), ("k", rollout.k, " samples per prompt")):
            if wanted % unit:
                raise RecipeError(
                    f"data.batch_size: {wanted} episodes do not divide by method.{key}={unit}{what}; "
                    f"{_near(wanted, unit)} would"
                )
        # an optimizer step of an online stage uses one minibatch of a rollout
        wanted //= rollout.minibatches
    for key, value in (("per_device_train_batch_size", per_device), ("gradient_accumulation_steps", accumulation)):
        if value is not None and value < 1:
            raise RecipeError(f"trainer.{key}: is {value}; give 1 or more")
    if wanted is None:
        accumulation = accumulation or 1
        return Batch(per_device, accumulation, per_device * accumulation * ranks)
    if accumulation is not None:
        if per_device * accumulation * ranks == wanted:
            return Batch(per_device, accumulation, wanted)
        raise RecipeError(
            f"data.batch_size: is {wanted}, but per device {per_device} × accumulation {accumulation} × {ranks} "
            f"ranks = {per_device * accumulation * ranks}; remove trainer.gradient_accumulation_steps, "
            "which is computed from the others"
        )
    if "per_device_train_batch_size" not in given:
        # not set by the recipe: the largest divisor up to the default
        per_device = next((n for n in range(min(per_device, wanted), 0, -1) if wanted % (n * ranks) == 0), 0)
        if not per_device:
            raise RecipeError(
                f"data.batch_size: {wanted} does not divide by {ranks} ranks; {_near(wanted, ranks)} would"
            )
    if wanted % (per_device * ranks):
        divisors = [n for n in range(1, min(wanted // ranks, 4 * per_device) + 1) if wanted % (n * ranks) == 0]
        also = f"; trainer.per_device_train_batch_size={_listed(divisors)} would too" if divisors else ""
        raise RecipeError(
            f"data.batch_size: {wanted} does not divide by per device {per_device} × {ranks} ranks = "
            f"{per_device * ranks}; {_near(wanted, per_device * ranks)} would{also}"
        )
    return Batch(per_device, wanted // (per_device * ranks), wanted)


def resumed(recipe: Recipe, ranks: int, total: int | None) -> Batch:
    """The batch with which a run goes on that began with `total` rows a step, perhaps on another number of ranks: the
    same rows a step, so that the epochs and the schedule stay as they were. None: the run begins here.

    Raises RecipeError if these ranks cannot share them.
    """
    if total is None:
        return arithmetic(recipe, ranks)
    with contextlib.suppress(RecipeError):
        if (plain := arithmetic(recipe, ranks)).total == total:
            return plain
    given = {key: value for key, value in recipe.trainer.items() if key != "gradient_accumulation_steps"}
    if (most := given.get("per_device_train_batch_size")) is not None:
        # how a step is cut does not change it
        whole = (n for n in range(most, 0, -1) if total % (n * ranks) == 0)
        given["per_device_train_batch_size"] = next(whole, most)
    rollout = recipe.rollout()
    data = replace(recipe.data, batch_size=total * (rollout.minibatches if rollout else 1))
    try:
        return arithmetic(replace(recipe, data=data, trainer=given), ranks)
    except RecipeError as error:
        raise RecipeError(
            f"launch.num_gpus: this run began with {total} {recipe.spec.unit} a step, which {ranks} ranks cannot share "
            f"({error.lines[0]}); resume with as many ranks as it began with"
        ) from None


def _near(wanted: int, unit: int) -> str:
    below, above = wanted // unit * unit, -(-wanted // unit) * unit
    return f"{below} or {above}" if below else str(above)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + (" or " if len(numbers) > 1 else "") + str(numbers[-1])
