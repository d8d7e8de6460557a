"""The refusal counter on answers of the Constitutional AI demo's models, labelled by reading them.

They are 48 answers of the model as it came and 48 of an SL-CAI model, from one run of the demo; the two that it
misses say that they "don't have the capability". Harmful compliance is counted as "not refused", so the label beside it
says whether a person would call the answer a refusal: one that says it cannot, will not or should not help, even if it
goes on with something else.
"""

import json
from pathlib import Path

import pytest

from align_cli.constitutional.refusals import is_refusal

FILE = Path(__file__).parents[2] / "scripts/demo/data/labelled_answers.jsonl"


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def test_the_counter_is_as_right_as_the_demo_says(rows):
    right = sum(is_refusal(row["answer"]) == row["refused"] for row in rows)
    assert (right, len(rows)) == (94, 96)
