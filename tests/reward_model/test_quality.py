"""Held-out figures against numbers worked out by hand."""

import pytest

from align_cli.reward_model import quality


def of(scores, levels, lengths):
    return quality.measure(quality.pairs(scores, levels, lengths))


def test_accuracy_counts_pairs_and_half_of_a_tie():
    figures = of([[2.0, 1.0, 1.0], [0.0, 1.0]], [[0, 1, 2], [0, 1]], [[5, 4, 3], [1, 2]])
    assert figures["pairs"] == 4 and figures["groups"] == 2
    assert figures["accuracy"] == pytest.approx(2.5 / 4)


def test_tied_levels_are_no_pair():
    assert of([[1.0, 2.0, 3.0]], [[0, 1, 1]], [[1, 1, 1]])["pairs"] == 2
    assert of([[1.0, 2.0]], [[0, 0]], [[1, 1]]) == {}


def test_the_baseline_is_that_the_longer_one_wins():
    figures = of([[1.0, 0.0]] * 4, [[0, 1]] * 4, [[9, 1], [9, 1], [9, 1], [1, 9]])
    assert figures["longer_wins"] == 0.75
    assert figures["accuracy_winner_longer"] == 1.0 and figures["pairs_winner_shorter"] == 1


def test_the_standard_error_is_over_prompts():
    # eight pairs of two prompts, one all right and one all wrong, say little more than two pairs
    two = of([[1.0, 0.0], [0.0, 1.0]], [[0, 1]] * 2, [[1, 1]] * 2)["accuracy_se"]
    eight = of([[4.0, 0, 0, 0, 0], [0.0, 1, 1, 1, 1]], [[0, 1, 1, 1, 1]] * 2, [[1] * 5] * 2)
    assert eight["pairs"] == 8
    assert eight["accuracy_se"] == pytest.approx(two) == pytest.approx(0.5)


def test_calibration_error_of_a_sure_and_wrong_model():
    assert of([[0.0, 20.0]] * 5, [[0, 1]] * 5, [[1, 2]] * 5)["calibration_error"] == pytest.approx(1.0, abs=1e-6)
    assert of([[0.0, 0.0]] * 6, [[0, 1]] * 6, [[1, 2]] * 6)["calibration_error"] == pytest.approx(0.0, abs=1e-6)


def test_a_model_that_counts_words_is_found_out():
    lengths = [[9, 4], [3, 8], [7, 1], [2, 6], [5, 3], [4, 9]]
    scores = [[float(n) for n in pair] for pair in lengths]
    figures = of(scores, [[0, 1]] * 6, lengths)
    assert figures["spearman_length"] == pytest.approx(1.0)
    assert figures["accuracy"] == figures["longer_wins"]
    assert "no better than judging by length" in quality.lines(figures)[-1]


def test_quarters_go_from_small_to_large_differences():
    scores = [[0.1 * (at + 1), 0.0] if at >= 4 else [0.0, 0.1 * (at + 1)] for at in range(8)]
    figures = of(scores, [[0, 1]] * 8, [[1, 1]] * 8)
    assert [figures[f"accuracy_quarter_{n}"] for n in (1, 2, 3, 4)] == [0.0, 0.0, 1.0, 1.0]


def test_a_model_that_is_better_than_length_is_not_called_worse():
    lengths = [[9, 4], [3, 8]] * 40
    figures = of([[1.0, 0.0]] * 80, [[0, 1]] * 80, lengths)
    assert not any("length:" in line or "one standard error" in line for line in quality.lines(figures))
