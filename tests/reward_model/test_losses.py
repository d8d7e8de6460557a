"""Ranking losses: the numbers of the papers' formulae, and what they must not depend on."""

import itertools
import math

import pytest
import torch

from align_cli.reward_model.losses import best_of_k_loss, centering, pair_targets, plackett_luce_loss, ranking_loss

K4 = torch.tensor([[0, 1, 2, 3]])
FIRST, SECOND = torch.tensor([[2.0, 1, 0, -1]]).double(), torch.tensor([[1, 0.5, -0.2, 0.3]]).double()


def test_the_ranking_loss_is_the_papers():
    assert ranking_loss(FIRST, pair_targets(K4)).item() == pytest.approx(0.207038, abs=1e-6)
    assert ranking_loss(SECOND, pair_targets(K4)).item() == pytest.approx(0.519325, abs=1e-6)


def test_plackett_luce_and_best_of_k_are_the_papers():
    assert plackett_luce_loss(SECOND, K4).item() == pytest.approx(2.690886, abs=1e-6)
    assert best_of_k_loss(SECOND, K4).item() == pytest.approx(0.877263, abs=1e-6)


@pytest.mark.parametrize(("probability", "loss"), [(0.377541, 0.785306), (0.4, 0.774077), (0.6, 0.674077)])
def test_a_soft_label_enters_as_a_probability(probability, loss):
    targets = pair_targets(torch.tensor([[0, 1]]), torch.tensor([probability]))
    assert ranking_loss(torch.tensor([[0.5, 0.0]]), targets).item() == pytest.approx(loss, abs=1e-6)


def test_two_responses_are_bradley_terry():
    scores, levels = torch.tensor([[0.7, -0.4]]).double(), torch.tensor([[0, 1]])
    expected = -math.log(1 / (1 + math.exp(-1.1)))
    assert ranking_loss(scores, pair_targets(levels)).item() == pytest.approx(expected)
    assert plackett_luce_loss(scores, levels).item() == pytest.approx(expected)
    assert best_of_k_loss(scores, levels).item() == pytest.approx(expected)


@pytest.mark.parametrize("shift", [-100.0, 3.25])
def test_shifting_all_rewards_changes_nothing(shift):
    for scores in (FIRST, SECOND):
        assert torch.allclose(ranking_loss(scores + shift, pair_targets(K4)), ranking_loss(scores, pair_targets(K4)))
        assert torch.allclose(plackett_luce_loss(scores + shift, K4), plackett_luce_loss(scores, K4))
        assert torch.allclose(best_of_k_loss(scores + shift, K4), best_of_k_loss(scores, K4))


def test_centering_sees_the_shift_that_the_ranking_does_not():
    levels = torch.tensor([[0, 1]])
    # TRL's center_rewards_coefficient: (r_chosen + r_rejected)²
    assert centering(torch.tensor([[1.0, 0.5]]), pair_targets(levels)).item() == pytest.approx(2.25)


def test_a_tie_is_in_no_pair():
    tied = torch.tensor([[0, 1, 1]])
    scores = torch.tensor([[1.0, 0.2, -0.7]])
    by_hand = (math.log1p(math.exp(-0.8)) + math.log1p(math.exp(-1.7))) / 2
    assert ranking_loss(scores, pair_targets(tied)).item() == pytest.approx(by_hand, abs=1e-6)
    assert pair_targets(tied).sum() == 2


def test_tied_losers_are_left_alone_by_plackett_luce():
    scores = torch.tensor([[1.0, 0.2, -0.7]], requires_grad=True)
    loss = plackett_luce_loss(scores, torch.tensor([[0, 1, 1]]))
    assert loss.item() == pytest.approx(math.log(math.e + math.exp(0.2) + math.exp(-0.7)) - 1, abs=1e-6)


def test_two_best_share_the_target():
    loss = best_of_k_loss(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0, 0, 1]]))
    assert loss.item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("loss", [ranking_loss, plackett_luce_loss, best_of_k_loss])
def test_padding_neither_counts_nor_breaks_the_gradient(loss):
    def of(scores, levels):
        return loss(scores, pair_targets(levels) if loss is ranking_loss else levels)

    alone = of(FIRST[:, :3], torch.tensor([[0, 1, 2]]))
    padded = torch.cat([FIRST[:, :3], torch.tensor([[9.0]])], 1).requires_grad_()
    value = of(padded, torch.tensor([[0, 1, 2, -1]]))
    value.sum().backward()
    assert torch.allclose(value, alone)
    assert padded.grad.isfinite().all()
    assert padded.grad[0, 3] == 0


def test_a_margin_moves_the_threshold():
    levels = torch.tensor([[0, 1]])
    moved = ranking_loss(torch.tensor([[1.0, 0.0]]), pair_targets(levels), 0.5)
    assert moved.item() == pytest.approx(math.log1p(math.exp(-0.5)))
    each = torch.tensor([[[0.0, 0.5], [-0.5, 0.0]]])
    assert torch.allclose(ranking_loss(torch.tensor([[1.0, 0.0]]), pair_targets(levels), each), moved)


def test_plackett_luce_is_a_distribution_over_orders():
    scores = torch.tensor([0.3, -1.0, 0.8, 0.1]).double()
    total = sum(
        math.exp(-plackett_luce_loss(scores[list(order)].unsqueeze(0), K4).item())
        for order in itertools.permutations(range(4))
    )
    assert total == pytest.approx(1.0)
