"""What KTO adds to TRL's trainer, by numbers worked out by hand."""

import pytest
import torch

from align_cli.preferences.kto import balance, ranked, rotated


def test_every_row_gets_its_neighbours_response_within_a_step():
    assert rotated([[1], [2], [3], [4], [5]], 3) == [[3], [1], [2], [5], [4]]


def test_ranked_counts_pairs_and_half_of_the_ties():
    assert ranked(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])) == pytest.approx((0.5 + 0 + 1 + 1) / 4)


@pytest.mark.parametrize(
    ("good", "bad", "desirable", "undesirable", "said"),
    [
        (10, 10, 1.0, 1.0, ""),
        (10, 13, 1.33, 1.0, ""),
        (10, 20, 1.0, 1.0, "method.desirable_weight=2 gives 1"),
        (40, 10, 1.0, 2.0, "method.desirable_weight=0.5 gives"),
        (10, 0, 1.0, 1.0, ""),
    ],
)
def test_the_weights_that_equation_8_wants(good, bad, desirable, undesirable, said):
    found = balance(good, bad, desirable, undesirable)
    assert said in found and bool(found) == bool(said)


def test_every_loss_of_the_recipe_is_one_of_trls():
    from typing import get_args

    from trl import KTOConfig

    from align_cli.recipe.preferences import KtoMethod
    from align_cli.stages.kto import LOSSES

    names = get_args(KtoMethod.__pydantic_fields__["loss"].annotation)
    assert set(names) == set(LOSSES)
    assert set(LOSSES.values()) == set(KTOConfig.__dataclass_fields__["loss_type"].metadata["choices"])
