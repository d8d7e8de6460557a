"""Which sampled answers make pairs."""

import pytest

from align_cli.preferences.pairing import picked

SCORES = [0.5, 2.0, -1.0, 0.7]


def pick(scores=SCORES, answers="abcd", may_win=(True,) * 4, how="best-worst", min_gap=0.0, draw=0):
    return picked(list(answers), list(scores), list(may_win), how=how, min_gap=min_gap, draw=draw)


def test_best_against_worst():
    assert pick() == [(1, 2)]


def test_equal_scores_make_no_pair():
    assert pick([1.0] * 4) == []
    assert pick([1.0, 1.0, 0.0, 1.0], how="all") == [(0, 2), (1, 2), (3, 2)]


def test_the_other_one_may_be_drawn():
    assert {pick(how="best-random", draw=n)[0] for n in range(12)} == {(1, 0), (1, 2), (1, 3)}


def test_all_and_neighbours():
    assert pick(how="adjacent") == [(1, 3), (3, 0), (0, 2)]
    assert len(pick(how="all")) == 6


@pytest.mark.parametrize(("gap", "pairs"), [(2.9, [(1, 2)]), (3.0, [])])
def test_a_gap_must_be_exceeded(gap, pairs):
    assert pick(min_gap=gap) == pairs


def test_what_did_not_end_never_wins():
    assert pick(may_win=[True, False, True, True]) == [(3, 2)]
    assert pick(may_win=[False] * 4) == []
    assert (1, 0) not in pick(may_win=[True, False, True, True], how="all")


def test_an_answer_given_twice_counts_once():
    # the same text with another score, as numerics may have it, must not be told from itself
    assert pick([1.0, 1.0001, 1.0002, 1.0], answers="aaaa", how="all") == []
