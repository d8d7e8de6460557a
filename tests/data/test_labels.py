"""Labels from labelled rows and from rankings, as groups and as KTO rows; columns that rewards compare with."""

import json
from pathlib import Path

import pytest
import tiny

from align_cli.data import chat, labels
from align_cli.data.groups import check_sources, labelled, read_groups
from align_cli.errors import DataError
from align_cli.recipe.sections import Data

ROWS = {
    "kto": [{"prompt": "q", "completion": "good", "label": True}, {"prompt": "p", "completion": "bad", "label": False}],
    "preference": [{"prompt": "q", "chosen": "good", "rejected": "bad"}],
    "ranking": [{"prompt": "q", "responses": ["best", "fair", "poor"]}],
    "scored": [{"prompt": "q", "responses": ["fair", "best", "good", "poor"], "scores": [1, 2, 2, 0]}],
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


def groups(name):
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
    return read_groups(Data(train="a.jsonl"), "labels", 0)


@pytest.mark.parametrize(
    ("name", "how", "found"),
    [
        ("kto", "best-worst", [("good", True), ("bad", False)]),
        ("preference", "best-worst", [("good", True), ("bad", False)]),
        ("ranking", "best-worst", [("best", True), ("poor", False)]),
        ("ranking", "best-rest", [("best", True), ("fair", False), ("poor", False)]),
        # what ties with the best is neither good nor bad
        ("scored", "best-rest", [("best", True), ("fair", False), ("poor", False)]),
        ("scored", "best-worst", [("best", True), ("poor", False)]),
    ],
)
def test_what_is_good_and_what_is_bad(name, how, found):
    read = groups(name)
    said = [(group.responses[at][0]["content"], good) for group in read.train for at, good in labelled(group, how)]
    assert said == found
    assert read.counts[0].format == name and read.counts[0].elements(how) == len(found)


def test_rows_hold_the_tokens_of_a_response_and_its_label(tok):
    (group,) = groups("ranking").train
    limits = {"max_length": 64, "max_prompt_length": None}
    rows = list(labels.kto_rows(tok, [group], split="best-rest", **limits, tally=chat.Tally()))
    prompt, answers = chat.responses(tok, group)
    assert [(row["prompt_ids"], row["completion_ids"]) for row in rows] == [(prompt, answer) for answer in answers]
    assert [row["label"] for row in rows] == [True, False, False]


def test_good_and_bad_that_are_cut_to_the_same_are_dropped(tok):
    read = groups("preference")
    (group,) = read.train
    group.responses[1][0]["content"] = "good but long"
    room, tally = len(chat.responses(tok, group)[0]) + 3, chat.Tally()
    limits = {"max_length": room, "max_prompt_length": None}
    assert not list(labels.kto_rows(tok, [group], split="best-worst", **limits, tally=tally))
    assert tally.dropped == {f"responses alike within {room} tokens": 1} and read.counts[0].rows_used == 0


def test_asked_for_cells_come_along_with_a_prompt():
    rows = [{"prompt": f"q{n}", "answer": n, "other": "x"} for n in range(3)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_groups(Data(train="p.jsonl"), "prompts", 0, ["answer"])
    assert [group.cells for group in read.train] == [{"answer": 0}, {"answer": 1}, {"answer": 2}]


def test_a_missing_cell_is_said_once_a_file_or_at_its_row():
    Path("p.jsonl").write_text('{"prompt": "q", "answer": 1}\n{"prompt": "r"}\n')
    data = Data(train="p.jsonl")
    (line,) = check_sources(data, "prompts", cells=["anser"])[0]
    assert line == "p.jsonl: no column 'anser' to compare responses with (has prompt, answer). Did you mean 'answer'?"
    with pytest.raises(DataError, match=r"p.jsonl:2: 'answer' is missing"):
        read_groups(data, "prompts", 0, ["answer"])
