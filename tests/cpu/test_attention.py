"""Attention written out for short rows against transformers' own."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from align_cli.cpu import attention


def tensors(b=3, h=6, k=2, q=12, t=12, d=8, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(b, heads, n, d, generator=draw).to(dtype) for heads, n in ((h, q), (k, t), (k, t))]


def masks(b=3, q=12, t=12):
    causal = torch.ones(q, t, dtype=torch.bool).tril(t - q)
    padded = causal.expand(b, 1, q, t).clone()
    padded[1, :, :, :5] = False  # the first rows see nothing
    return {"none": None, "causal": causal.expand(b, 1, q, t), "padded": padded}


@pytest.mark.parametrize("name", ["none", "causal", "padded"])
@pytest.mark.parametrize("added", [False, True])
def test_it_is_what_sdpa_gives(name, added):
    mask = masks()[name]
    if added and mask is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.bfloat16).min).to(torch.bfloat16)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True, training=True)
    wanted = [tensor.float().requires_grad_() for tensor in tensors()]
    exact = sdpa_attention_forward(
        module, *wanted, None if mask is None else mask if mask.dtype == torch.bool else mask.float(), scaling=0.3
    )[0]
    given = [tensor.requires_grad_() for tensor in tensors()]
    found = attention.attend(module, *given, mask, scaling=0.3)[0]
    assert found.isfinite().all()
    sees = torch.ones(3, 12, dtype=torch.bool)
    if name == "padded":
        sees[1, :5] = False
    weigh = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)) * sees[:, :, None, None]
    assert torch.allclose(found.float()[sees], exact[sees], atol=0.03)
    (exact * weigh).sum().backward()
    (found.float() * weigh).sum().backward()
    for one, other in zip(given, wanted, strict=True):
        assert (one.grad.float() - other.grad).norm() < 0.02 * other.grad.norm()


@pytest.mark.parametrize(
    ("why", "change", "named"),
    [
        ("float32", {"dtype": torch.float32}, {}),
        ("long", {"q": 300, "t": 300}, {}),
        ("one token", {"q": 1}, {}),
        ("dropout", {}, {"dropout": 0.1}),
        ("bias", {}, {"position_bias": torch.zeros(1, 6, 12, 12, dtype=torch.bfloat16)}),
    ],
)
def test_everything_else_is_left_to_sdpa(monkeypatch, why, change, named):
    called = []
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *given, **others: called.append(others) or (None, None)
    )
    attention.attend(SimpleNamespace(num_key_value_groups=3), *tensors(**change), None, scaling=0.3, **named)
    assert called and called[0].items() >= named.items()


def test_under_autocast_what_counts_is_the_pass_precision():
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True, training=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention.attend(module, *tensors(dtype=torch.float32), None)[0].dtype == torch.bfloat16
