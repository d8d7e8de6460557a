"""Counts of labels, also where the judge named no letter."""

from align_cli.constitutional import summary


def test_a_pair_without_a_letter_is_counted_and_left_out():
    label = {"probability": 0.8, "orders": [{"p": 0.9}, {"p": 0.3}]}
    silent = {"why": "the judge named no letter", "orders": [{"p": 0.9}, {}]}
    made = summary.of_labels([label], [silent, silent])
    assert made["judged"] == 1 and made["rows"] == 1
    assert made["left_out"] == {"the judge named no letter": 2}
    assert summary.of_labels([], [silent])["left_out"] == {"the judge named no letter": 1}
