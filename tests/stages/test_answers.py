"""Answers on disk: what a kill may leave, and what a resumed run makes of it."""

import json
from types import SimpleNamespace

import pytest

from align_cli.stages.answers import collect

JOB = SimpleNamespace(ranks=1, rank=0, main=True, say=lambda text: None)
ROWS = 10


class Counted:
    """Makes rows, and remembers which it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, at):
        self.asked.append(list(at))
        return [{"row": row, "text": "é" * row, "score": row / 3} for row in at]


@pytest.fixture
def whole(tmp_path):
    file = tmp_path / "whole.jsonl"
    rows, stopped = collect(JOB, file, ROWS, 4, Counted(), "t")
    assert stopped is None and [row["row"] for row in rows] == list(range(ROWS))
    return rows, file.read_bytes()


@pytest.mark.parametrize("kept", [0, 1, 40, 170, 300, 10_000])
def test_a_torn_file_is_mended_to_the_very_bytes(whole, tmp_path, kept):
    rows, wanted = whole
    file = tmp_path / "torn.jsonl"
    file.write_bytes(wanted[:kept])
    make = Counted()
    found, _ = collect(JOB, file, ROWS, 4, make, "t")
    assert found == rows and file.read_bytes() == wanted
    # only whole chunks, the same as in an undisturbed run
    assert all(chunk in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9]) for chunk in make.asked)
    whole_lines = wanted[:kept].count(b"\n")
    assert sum(map(len, make.asked)) == (0 if whole_lines == ROWS else ROWS - whole_lines // 4 * 4)


def test_what_is_no_json_goes_with_all_that_follows(whole, tmp_path):
    rows, wanted = whole
    lines = wanted.splitlines(keepends=True)
    file = tmp_path / "broken.jsonl"
    file.write_bytes(b"".join([*lines[:5], b"{\n", *lines[6:]]))
    assert collect(JOB, file, ROWS, 4, Counted(), "t")[0] == rows
    assert [json.loads(line)["row"] for line in file.read_text().splitlines()] == list(range(ROWS))
