"""The head on a CPU against logits written out."""

import pytest
import torch
from trl.trainer import utils

from align_cli.cpu import head

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def written_out(hidden, weight, bias, targets, temperature, scale):
    z = (torch.nn.functional.linear(hidden, weight, bias).float() * scale) / temperature
    log_p = z.log_softmax(1)
    return (
        log_p.gather(1, targets.unsqueeze(1)).squeeze(1),
        -(log_p.exp() * log_p).sum(1),
        (2 * log_p).logsumexp(1),
        z.mean(1),
        z.argmax(1) == targets,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients_are_those_of_the_logits(monkeypatch, bias, entropy):
    monkeypatch.setattr(head, "TOKENS", 4)  # 11 tokens in three parts
    draw = torch.Generator().manual_seed(0)
    made = []
    for way in (head.LogProbs.apply, written_out):
        draw.manual_seed(0)
        hidden, weight, offset = (
            torch.randn(*shape, generator=draw, dtype=torch.float64).float().requires_grad_()
            for shape in ((11, 6), (30, 6), (30,))
        )
        targets = torch.randint(0, 30, (11,), generator=draw)
        upstream = torch.randn(2, 11, generator=draw)
        offset = offset if bias else None
        if way is written_out:
            found = way(hidden, weight, offset, targets, 0.7, 0.5)
        else:
            found = way(hidden, weight, offset, targets, 0.7, 32768, None, 0.5, OUTPUTS)
        loss = (found[0] * upstream[0]).sum() + ((found[1] * upstream[1]).sum() if entropy else 0)
        loss.backward()
        made.append(([*found], [hidden.grad, weight.grad, *([offset.grad] if bias else [])]))
    (values, gradients), (expected, wanted) = made
    for one, other in zip(values, expected, strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-5)
    for one, other in zip(gradients, wanted, strict=True):
        assert torch.allclose(one, other, atol=2e-5)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    found = head.LogProbs.apply(hidden, weight, None, torch.tensor([1, 2, 3]), 1.0, 32768)
    assert found[1:] == (None,) * 4
    found[0].sum().backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0


def test_in_bfloat16_it_is_as_near_as_logits_written_out():
    draw = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(64, 32, generator=draw), torch.randn(200, 32, generator=draw) * 0.3
    targets = torch.randint(0, 200, (64,), generator=draw)
    exact = written_out(hidden.double(), weight.double(), None, targets, 1.0, 1.0)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = head.LogProbs.apply(hidden, weight, None, targets, 1.0, 32768)[0]
        plain = written_out(hidden, weight, None, targets, 1.0, 1.0)[0]
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() <= 1.2 * (plain - exact).abs().mean() + 1e-6


def test_trls_head_goes_through_it_and_skips_what_has_no_label(monkeypatch, tmp_path):
    import tiny
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)
    monkeypatch.setattr(utils, "_use_triton", utils._use_triton)
    model = AutoModelForCausalLM.from_pretrained(tiny.model(tmp_path / "m"), dtype=torch.float32)
    utils.add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :6] = -100
    before = model(input_ids=ids, labels=labels, fused_lm_head=True)
    head.put_in_place()
    seen = []
    monkeypatch.setattr(
        head, "_logits", lambda ctx, hidden, *given, f=head._logits: seen.append(len(hidden)) or f(ctx, hidden, *given)
    )
    after = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert seen == [9], "three positions of three rows"
    for name in ("log_probs", "entropy", "loss"):
        assert torch.allclose(getattr(before, name), getattr(after, name), atol=1e-5), name
