"""KL, reward shaping, GAE, whitening and the KL controller against worked-out numbers."""

import math

import pytest
import torch

from align_cli.rl.losses import clipped_value_loss
from align_cli.rl.returns import KLController, gae, kl_estimate, moments, shaped_rewards, whiten

RATIO = torch.tensor([[0.5, -0.25, 1.0]]).double()
ALL = torch.ones(1, 3)


def near(found, expected, **kwargs):
    assert found.flatten().tolist() == pytest.approx(expected, **(kwargs or {"abs": 1e-6}))


@pytest.mark.parametrize(("how", "mean"), [("k1", 0.416667), ("k2", 0.218750), ("k3", 0.169479)])
def test_kl_estimators(how, mean):
    assert kl_estimate(RATIO, how).mean().item() == pytest.approx(mean, abs=1e-6)


def test_the_score_lands_on_the_last_response_token():
    near(shaped_rewards(torch.tensor([1.0]), RATIO, ALL, beta=0.02), [-0.01, 0.005, 0.98])
    padded = torch.cat([RATIO, torch.tensor([[7.0]])], 1)
    mask = torch.tensor([[1.0, 1, 1, 0]])
    near(shaped_rewards(torch.tensor([1.0]), padded, mask, beta=0.02), [-0.01, 0.005, 0.98, 0.0])


@pytest.mark.parametrize(("lam", "advantages"), [(0.95, [0.7277, 0.566, 0.38]), (1.0, [0.775, 0.585, 0.38])])
def test_gae(lam, advantages):
    rewards, values = torch.tensor([[-0.01, 0.005, 0.98]]), torch.tensor([[0.2, 0.4, 0.6]])
    found, returns = gae(rewards, values, ALL, gamma=1.0, lam=lam)
    near(found, advantages, abs=1e-4)
    near(returns, [a + v for a, v in zip(advantages, [0.2, 0.4, 0.6], strict=True)], abs=1e-4)
    # what lies behind the response changes nothing
    mask = torch.tensor([[1.0, 1, 1, 0]])
    longer = torch.cat([rewards, torch.tensor([[9.0]])], 1), torch.cat([values, torch.tensor([[9.0]])], 1)
    near(gae(*longer, mask, gamma=1.0, lam=lam)[0][:, :3], advantages, abs=1e-4)


def test_the_value_may_move_only_so_far_from_the_rollouts():
    far = clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2)
    assert far.item() == pytest.approx((0.2 - 1) ** 2 / 2)
    near_by = clipped_value_loss(torch.tensor([0.1]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2)
    assert near_by.item() == pytest.approx(0.81 / 2)


def test_whitening_is_over_all_ranks_and_response_tokens():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(4, 6, generator=draw) * 3 + 2
    mask = (torch.arange(6) < torch.tensor([[6], [2], [4], [1]])).float()
    total = moments(values[:2], mask[:2]) + moments(values[2:], mask[2:])
    white = torch.cat([whiten(values[:2], mask[:2], total), whiten(values[2:], mask[2:], total)])
    chosen = white[mask.bool()]
    assert chosen.mean().item() == pytest.approx(0, abs=1e-5)
    assert chosen.var(unbiased=False).item() == pytest.approx(1, abs=1e-4)


def test_the_controller_follows_the_paper():
    adaptive = KLController(0.2, target=6.0, horizon=10_000)
    adaptive.update(12.0, 500)
    assert adaptive.beta == pytest.approx(0.2 * (1 + 0.2 * 500 / 10_000))
    adaptive.update(6.0, 500)
    assert adaptive.beta == pytest.approx(0.202)
    adaptive.update(5.4, 1000)
    assert adaptive.beta == pytest.approx(0.202 * (1 - 0.1 * 1000 / 10_000))
    fixed = KLController(0.05)
    fixed.update(100.0, 500)
    assert fixed.beta == 0.05


def test_k3_is_never_negative():
    assert (kl_estimate(torch.linspace(-5, 5, 101), "k3") >= 0).all()
    assert math.isclose(kl_estimate(torch.zeros(1), "k3").item(), 0)
