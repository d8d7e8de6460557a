"""Rows a step: what follows from what, and which numbers would have divided."""

import pytest

from align_cli.errors import RecipeError
from align_cli.recipe.check import from_tree
from align_cli.run import batch


def made(total=None, ranks=1, **trainer):
    data = {"train": ["rows.jsonl"], "batch_size": total}
    recipe = from_tree("sft", {"name": "t", "run_dir": "r", "model": {"path": "m"}, "data": data, "trainer": trainer})
    rows = batch.arithmetic(recipe, ranks)
    return rows.per_device, rows.accumulation, rows.total


def refused(total, ranks, **trainer):
    with pytest.raises(RecipeError) as caught:
        made(total, ranks, **trainer)
    (line,) = caught.value.lines
    assert line.startswith("data.batch_size: ")
    return line


def test_nothing_asked_for_is_trls_eight_rows_a_device():
    assert made() == (8, 1, 8)
    assert made(ranks=4) == (8, 1, 32)


@pytest.mark.parametrize(
    ("total", "ranks", "expected"),
    [(8, 1, (8, 1, 8)), (64, 2, (8, 4, 64)), (12, 1, (6, 2, 12)), (7, 1, (7, 1, 7)), (13, 1, (1, 13, 13))],
)
def test_the_largest_micro_batch_up_to_eight_that_divides(total, ranks, expected):
    assert made(total, ranks) == expected
    per_device, accumulation, product = expected
    assert per_device * accumulation * ranks == product


def test_accumulation_that_agrees_is_kept():
    assert made(64, 2, per_device_train_batch_size=4, gradient_accumulation_steps=8) == (4, 8, 64)


def test_accumulation_that_disagrees_is_shown_as_a_product():
    line = refused(65, 2, per_device_train_batch_size=4, gradient_accumulation_steps=8)
    assert "is 65" in line and "4 × accumulation 8 × 2 ranks = 64" in line
    assert "remove trainer.gradient_accumulation_steps" in line


def test_ranks_that_do_not_divide():
    line = refused(10, 4)
    assert line == "data.batch_size: 10 does not divide by 4 ranks; 8 or 12 would"


def test_fewer_rows_than_ranks():
    assert refused(3, 4) == "data.batch_size: 3 does not divide by 4 ranks; 4 would"


def test_a_micro_batch_that_does_not_divide():
    line = refused(30, 2, per_device_train_batch_size=4)
    assert line == (
        "data.batch_size: 30 does not divide by per device 4 × 2 ranks = 8; 24 or 32 would; "
        "trainer.per_device_train_batch_size=1, 3, 5 or 15 would too"
    )
    for per_device in (1, 3, 5, 15):
        assert made(30, 2, per_device_train_batch_size=per_device)[2] == 30
    for total in (24, 32):
        assert made(total, 2, per_device_train_batch_size=4)[2] == total


def test_no_micro_batch_divides():
    assert refused(7, 2, per_device_train_batch_size=4).endswith("= 8; 8 would")


@pytest.mark.parametrize("rows", [0, -2])
@pytest.mark.parametrize(
    ("total", "key"),
    [
        (8, "gradient_accumulation_steps"),
        (None, "gradient_accumulation_steps"),
        (8, "per_device_train_batch_size"),
        (None, "per_device_train_batch_size"),
    ],
)
def test_counts_below_one_are_refused(total, key, rows):
    with pytest.raises(RecipeError, match=key):
        made(total, 1, **{key: rows})
