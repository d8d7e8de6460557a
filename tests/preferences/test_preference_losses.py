"""Preference losses against the papers' numbers, in float32 and with bfloat16 inputs."""

import math

import pytest
import torch

from align_cli.preferences import losses
from align_cli.preferences.losses import Side, Term, preference_loss

# mean log-probabilities of three pairs, and what the reference functions of the papers give for them
CHOSEN, REJECTED = [-0.5, -1.0, -2.0], [-1.0, -0.9, -2.0]
SIMPO_2_05 = [0.693147, 1.463282, 1.313262]
SIMPO_10_03 = [0.126928, 4.018150, 3.048587]
LOG_ODDS = [0.974077, -0.163160, 0.0]
ODDS_RATIO = [0.320300, 0.778051, 0.693147]
# summed log-probabilities under policy and reference (eric-mitchell/direct-preference-optimization)
POLICY, REFERENCE = ([-10.0, -5.0, -20.0], [-12.0, -4.0, -20.0]), ([-11.0, -5.0, -18.0], [-11.0, -5.0, -21.0])
DPO = [0.598139, 0.744397, 0.854355]
CONSERVATIVE = [0.618139, 0.734397, 0.824355]

# what bfloat16 holds of the inputs is off by up to 1/256 of them, times SimPO's β of 10
PRECISION = {torch.float32: 1e-5, torch.bfloat16: 0.03}
TYPES = pytest.mark.parametrize("dtype", PRECISION)


def means(dtype):
    return torch.tensor(CHOSEN, dtype=dtype), torch.tensor(REJECTED, dtype=dtype)


def sides(length=1):
    """Chosen and rejected responses of DPO's golden pairs, of `length` tokens each."""
    tokens = torch.full((3,), length)
    return [Side(torch.tensor(sums), tokens, torch.tensor(ref)) for sums, ref in zip(POLICY, REFERENCE, strict=True)]


@TYPES
def test_simpo(dtype):
    for settings, wanted in (((2.0, 0.5), SIMPO_2_05), ((10.0, 0.3), SIMPO_10_03)):
        found = losses.simpo_loss(*means(dtype), beta=settings[0], gamma_ratio=settings[1])
        assert found.dtype is torch.float32
        assert found.tolist() == pytest.approx(wanted, abs=PRECISION[dtype])


@TYPES
def test_orpo(dtype):
    odds, loss = losses.log_odds(*means(dtype)), losses.odds_ratio_loss(*means(dtype))
    assert odds.dtype is loss.dtype is torch.float32
    assert odds.tolist() == pytest.approx(LOG_ODDS, abs=PRECISION[dtype])
    assert loss.tolist() == pytest.approx(ODDS_RATIO, abs=PRECISION[dtype])


@TYPES
def test_dpo_and_spin(dtype):
    (chosen, rejected), (ref_chosen, ref_rejected) = (
        [torch.tensor(side, dtype=dtype) for side in sides_] for sides_ in (POLICY, REFERENCE)
    )
    found = losses.dpo_loss(chosen - ref_chosen, rejected - ref_rejected, beta=0.1)
    assert found.tolist() == pytest.approx(DPO, abs=1e-5)  # these sums are whole numbers, which bfloat16 holds
    found = losses.dpo_loss(chosen - ref_chosen, rejected - ref_rejected, beta=0.1, label_smoothing=0.1)
    assert found.tolist() == pytest.approx(CONSERVATIVE, abs=1e-5)


def test_dpo_starts_at_ln_2_and_simpo_does_not():
    start = torch.zeros(1)
    assert losses.dpo_loss(start, start, beta=0.1).item() == pytest.approx(math.log(2))
    assert losses.simpo_loss(start, start, beta=2.0, gamma_ratio=0.5).item() != pytest.approx(math.log(2), abs=0.1)


@pytest.mark.parametrize("x", [-1e-6, -1e-4, -0.1, -0.6931, -0.6932, -1.0, -20.0, -80.0])
def test_log1mexp_against_float64(x):
    wanted = math.log(-math.expm1(x)) if x > -30 else -math.exp(x)
    assert losses.log1mexp(torch.tensor(x)).item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("x", [0.0, -1e-9, -1e-3, -0.7, -50.0, -200.0])
def test_odds_have_a_finite_gradient_however_certain_the_model_is(x):
    chosen = torch.tensor([x], requires_grad=True)
    loss = losses.odds_ratio_loss(chosen, torch.tensor([-1.0]))
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()


def test_the_terms_of_a_mixture_add_up():
    chosen, rejected = sides(length=4)
    terms = [Term("nll"), Term("odds-ratio", weight=0.1), Term("dpo", weight=2.0), Term("cpo", beta=0.5)]
    total, margin, each = preference_loss(terms, chosen, rejected)
    assert total.tolist() == pytest.approx(
        (each["nll"] + 0.1 * each["odds-ratio"] + 2 * each["dpo"] + each["cpo"]).tolist()
    )
    assert each["dpo"].tolist() == pytest.approx(DPO, abs=1e-5)
    assert each["nll"].tolist() == pytest.approx([2.5, 1.25, 5.0])
    # -log σ(0.5·(lp_w - lp_l)) with lp_w - lp_l = 2, -1, 0
    assert each["cpo"].tolist() == pytest.approx([0.313262, 0.974077, 0.693147], abs=1e-5)
    dpo_margin = torch.tensor([0.2, -0.1, -0.3])
    odds = losses.log_odds(chosen.mean, rejected.mean)
    wanted = 0.1 * odds + 2 * dpo_margin + 0.5 * torch.tensor([2.0, -1.0, 0.0])
    assert margin.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_length_normalised_dpo_is_dpo_on_means():
    (four,), (one,) = ([preference_loss([Term(name)], *sides(n))[0]] for name, n in (("dpo-norm", 4), ("dpo", 1)))
    rescaled = preference_loss([Term("dpo-norm", beta=0.4)], *sides(4))[0]
    assert rescaled.tolist() == pytest.approx(one.tolist(), abs=1e-6)
    assert four.tolist() != pytest.approx(one.tolist(), abs=1e-3)


def test_nll_alone_is_ahead_where_the_mean_is():
    chosen, rejected = sides()
    assert preference_loss([Term("nll")], chosen, rejected)[1].tolist() == [2.0, -1.0, 0.0]


def test_a_loss_without_its_reference_says_so():
    chosen, rejected = (Side(side.sums, side.lengths) for side in sides())
    with pytest.raises(ValueError, match="compares with a reference"):
        preference_loss([Term("dpo")], chosen, rejected)


def test_the_recipe_knows_the_same_losses():
    from typing import get_args

    from align_cli.recipe import preferences

    names = get_args(preferences.PreferenceLoss.__pydantic_fields__["loss"].annotation)
    assert set(names) == set(losses.LOSSES)
    chosen, rejected = (Side(side.sums, side.lengths) for side in sides())
    for name in names:
        if name in preferences.REFERENCED:
            with pytest.raises(ValueError, match="compares with a reference"):
                preference_loss([Term(name)], chosen, rejected)
        else:
            preference_loss([Term(name)], chosen, rejected)
