"""What a judge chose, from the odd answers that servers give."""

import math

import pytest

from align_cli.generation import choice


def entry(token, logprob=-0.1, **others):
    return {
        "token": token,
        "logprob": logprob,
        "top_logprobs": [{"token": name, "logprob": value} for name, value in others.items()],
    }


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(A)", "A"), ("B", "B"), ("The answer is (B).", "B"), ("A", "A"), ("A.", "A"), ("", None),
        ("A good answer would be shorter", None), ("Both (A) and (B)", None),
        ("<think>(A) seems kind, but (B) is true.</think>\n(B)", "B"),
        ("<think>Perhaps (A)", "A"), ("<think>A</think>", None),
    ],
)  # fmt: skip
def test_letters_in_texts(text, letter):
    assert choice.read_choice(text) == letter


def test_plain_log_probabilities():
    a, b = choice.read_log_probabilities(
        [entry("(", -0.01), entry("A", math.log(0.7), A=math.log(0.7), B=math.log(0.2))]
    )
    assert (a, b) == pytest.approx((math.log(0.7), math.log(0.2)))


def test_several_spellings_of_a_letter_are_summed():
    a, _ = choice.read_log_probabilities(
        [entry("A", math.log(0.4), **{"A": math.log(0.4), " A": math.log(0.3), "B": -3})]
    )
    assert a == pytest.approx(math.log(0.7))


@pytest.mark.parametrize("none", [-9999, -math.inf, None, "low"])
def test_numbers_that_stand_for_nothing(none):
    a, b = choice.read_log_probabilities([entry("A", -0.1, A=-0.1, B=none)])
    assert math.isfinite(a) and math.isfinite(b) and a >= b
    both = choice.read_log_probabilities([entry("A", none, A=none, B=none)])
    assert both is None or all(map(math.isfinite, both))


def test_alternatives_as_a_mapping():
    given = {"token": "B", "logprob": -0.2, "top_logprobs": {"A": -2.0, "B": -0.2}}
    assert choice.read_log_probabilities([given]) == pytest.approx((-2.0, -0.2))


@pytest.mark.parametrize("given", [None, {}, "A", [None], [{"token": None}], [{"logprob": -1}], [[]], {"A": -1}])
def test_what_is_no_list_of_tokens_chooses_nothing(given):
    assert choice.read_log_probabilities(given) is None


def test_the_article_at_a_sentences_start_is_not_the_letter():
    tokens = [
        entry("A"),
        entry(" better"),
        entry(" answer"),
        entry(" is"),
        entry(" ("),
        entry("B", -0.3, A=-1.5, B=-0.3),
        entry(")"),
    ]
    assert choice.read_log_probabilities(tokens) == pytest.approx((-1.5, -0.3))
    assert choice.read_log_probabilities(tokens[:3]) is None


def test_letters_of_reasoning_choose_nothing():
    tokens = [entry("<think>"), entry("("), entry("A"), entry(")"), entry("</think>"), entry("B", -0.3, A=-1.5, B=-0.3)]
    assert choice.read_log_probabilities(tokens) == pytest.approx((-1.5, -0.3))
