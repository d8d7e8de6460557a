"""Rows on disk: what a kill may leave, and what a resumed run makes of it."""

import json
from concurrent.futures import ThreadPoolExecutor

import project
import pytest

from align_cli.errors import AlignError
from align_cli.training.journal import RowJournal

ROWS = 10
UNITS = [range(0, 4), range(4, 8), range(8, 10)]


class Counted:
    """Makes rows, and remembers which units it made."""

    def __init__(self, fails_at: int | None = None):
        self.units, self.fails_at = [], fails_at

    def __call__(self, unit):
        if self.fails_at in unit:
            raise AlignError(f"row {self.fails_at} cannot be made")
        self.units.append(list(unit))
        return [{"row": row, "text": "é" * row, "score": row / 3} for row in unit]


@pytest.fixture
def journal(here):
    project.build(here)
    return RowJournal(project.job("sft"))


@pytest.fixture
def whole(journal):
    """The rows of an undisturbed run, and the bytes of their file."""
    rows = journal.fill("whole", UNITS, Counted())
    assert [row["row"] for row in rows] == list(range(ROWS))
    return rows, journal.file("whole").read_bytes()


@pytest.mark.parametrize("part", [".torn.part-0.jsonl", ".torn.part-3.jsonl", "torn.jsonl"])
@pytest.mark.parametrize("kept", [0, 1, 40, 170, 300, 10_000])
def test_a_torn_file_is_completed_to_the_very_bytes(journal, whole, part, kept):
    rows, expected = whole
    (journal.folder / part).write_bytes(expected[:kept])
    make = Counted()
    assert journal.fill("torn", UNITS, make) == rows
    assert journal.file("torn").read_bytes() == expected
    # only whole units, the same as in an undisturbed run
    lines = expected[:kept].count(b"\n")
    assert make.units == [list(unit) for unit in UNITS if unit[-1] >= lines]
    assert [file.name for file in journal.folder.glob(".*")] == []


def test_a_broken_line_costs_its_unit_and_no_other(journal, whole):
    rows, expected = whole
    lines = expected.splitlines(keepends=True)
    (journal.folder / ".broken.part-0.jsonl").write_bytes(b"".join([*lines[:5], b"{\n", *lines[6:]]))
    make = Counted()
    assert journal.fill("broken", UNITS, make) == rows and make.units == [[4, 5, 6, 7]]
    assert [json.loads(line)["row"] for line in journal.file("broken").read_text().splitlines()] == list(range(ROWS))


def test_a_finished_phase_is_not_made_again(journal, whole):
    make = Counted()
    assert journal.fill("whole", UNITS, make) == whole[0] and make.units == []


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_made_before_an_error_are_kept(journal, whole, workers):
    with pytest.raises(AlignError, match="row 5 cannot be made"):
        journal.fill("late", UNITS, Counted(fails_at=5), workers=workers)
    assert not journal.file("late").exists()
    make = Counted()
    assert journal.fill("late", UNITS, make) == whole[0]
    assert [0, 1, 2, 3] not in make.units


def test_usage_is_added_up_over_threads_and_attempts(journal):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: journal.spend("judge", {"requests": 1, "prompt_tokens": 7}), range(50)))
    (journal.folder / ".usage-1.jsonl").write_text('{"who": "judge", "requests": 2}\n{"who": "writer", "req')
    assert RowJournal(journal.job).spent() == {"judge": {"prompt_tokens": 350, "requests": 52}}
