"""What KTO adds to TRL's trainer, by numbers worked out by hand."""

import pytest
import torch

from align_cli.preferences.kto import EpochOrder, balance, ranked, rotated


def test_every_row_gets_its_neighbours_response_within_a_step():
    assert rotated([[1], [2], [3], [4], [5]], 3) == [[3], [1], [2], [5], [4]]


def test_a_row_alone_in_the_last_step_is_not_its_own_mismatch():
    assert rotated([[1], [2], [3], [4]], 3) == [[4], [1], [2], [3]]
    assert rotated([1, 2, 3, 4, 5], 2) == [2, 1, 5, 3, 4]
    assert rotated([1], 3) == [1]  # nothing else is there


@pytest.mark.parametrize(("rows", "block"), [(48, 8), (49, 8), (51, 8), (13, 8)])
def test_each_epoch_draws_its_order_and_its_mismatches_within_a_step(rows, block):
    order, seen = EpochOrder(rows, block, seed=3), []
    for epoch in range(3):
        order.epoch = epoch
        pairs = list(order)
        assert pairs == list(order) and len(pairs) == len(order) == rows
        own, other = zip(*pairs, strict=True)
        assert sorted(own) == sorted(other) == list(range(rows))
        assert all(one != two for one, two in pairs)
        whole = rows - rows % block
        for start in range(0, whole - block, block):  # the last step may hold one row more
            assert set(own[start : start + block]) == set(other[start : start + block])
        seen.append(pairs)
    assert seen[0] != seen[1] != seen[2] and dict(seen[0]) != dict(seen[1])
    again = EpochOrder(rows, block, seed=4)
    assert list(again) != seen[0]


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
