"""Sampling by row: the right distribution, and nothing else that it depends on."""

import torch

from align_cli.generation.sampling import SeededSampling, row_seed, uniform


def sampled(seeds, logits, **kwargs):
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "start": 3} | kwargs
    ids = torch.zeros(len(seeds), 4, dtype=torch.long)
    return SeededSampling(seeds, **settings)(ids, logits).argmax(1)


def test_samples_follow_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    n = 40_000
    found = sampled([row_seed(1, 0, n_) for n_ in range(2000)], logits.expand(2000, -1))
    counts = torch.zeros(5)
    for position in range(n // 2000):
        ids = torch.zeros(2000, 4 + position, dtype=torch.long)
        maker = SeededSampling([row_seed(1, 0, r) for r in range(2000)], temperature=1.0, top_p=1, top_k=0, start=3)
        counts += maker(ids, logits.expand(2000, -1)).argmax(1).bincount(minlength=5)
    assert len(found) == 2000
    # the standard error of a share is at most 0.0025
    assert torch.allclose(counts / n, logits.softmax(0), atol=0.01)


def test_temperature_sharpens():
    logits = torch.tensor([1.0, 0.0]).expand(4000, -1)
    seeds = [row_seed(7, 0, row) for row in range(4000)]
    share = (sampled(seeds, logits, temperature=0.5) == 0).float().mean().item()
    assert abs(share - torch.tensor([2.0, 0.0]).softmax(0)[0].item()) < 0.03


def test_top_p_and_top_k_leave_the_rest_out():
    logits = torch.tensor([3.0, 2.0, -5.0, -6.0]).expand(500, -1)
    seeds = [row_seed(3, 1, row) for row in range(500)]
    assert set(sampled(seeds, logits, top_p=0.9).tolist()) == {0, 1}
    assert set(sampled(seeds, logits, top_k=1).tolist()) == {0}


def test_a_row_does_not_depend_on_its_neighbours_or_padding():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    seeds = [row_seed(1, 2, row) for row in range(6)]
    whole = sampled(seeds, logits)
    assert whole.tolist() == [sampled(seeds[at : at + 1], logits[at : at + 1]).item() for at in range(6)]
    longer = SeededSampling(seeds, temperature=1.0, top_p=1.0, top_k=0, start=10)
    assert longer(torch.zeros(6, 11, dtype=torch.long), logits).argmax(1).tolist() == whole.tolist()


def test_seeds_rows_rollouts_and_positions_all_differ():
    seeds = {row_seed(a, b, c) for a in range(4) for b in range(20) for c in range(50)}
    assert len(seeds) == 4 * 20 * 50
    values = torch.stack(
        [uniform(torch.tensor([row_seed(1, 1, row) for row in range(64)]), at) for at in range(1000)], 1
    )
    assert values.unique().numel() > 63_990
    assert values.min() > 0 and values.max() < 1
    assert abs(values.mean().item() - 0.5) < 0.005 and abs(values.var().item() - 1 / 12) < 0.002
    # neighbours in row and in position are independent: the standard error of a product's mean is 0.0003
    centred = values - 0.5
    assert abs((centred[1:] * centred[:-1]).mean().item()) < 0.0013
    assert abs((centred[:, 1:] * centred[:, :-1]).mean().item()) < 0.0013


def test_what_has_no_probability_is_never_drawn():
    logits = torch.full((2000, 6), -torch.inf)
    logits[:, 2], logits[:, 4] = 0.0, 1.0
    seeds = [row_seed(5, 1, row) for row in range(2000)]
    assert set(sampled(seeds, logits).tolist()) == {2, 4}


def test_logits_that_round_otherwise_seldom_change_a_sample():
    # as they do on another rank, or beside other rows
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 500, generator=draw)
    seeds = [row_seed(9, 0, row) for row in range(4000)]
    other = sampled(seeds, logits + 1e-6 * torch.randn(logits.shape, generator=draw))
    assert (sampled(seeds, logits) != other).sum() <= 2
