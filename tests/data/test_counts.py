"""Counts of rows that are dropped during tokenization, and of sources that share a path."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from align_cli.data import chat
from align_cli.data.groups import check_sources, read_groups, stream_eval, stream_groups
from align_cli.errors import DataError
from align_cli.recipe.sections import Data
from align_cli.training import datasets as training

LIMIT = 40
"""Tokens of a prompt; `fits` are shorter, `long` ones longer."""
OVER = f"prompt over {LIMIT} tokens"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def fits(*numbers):
    return [{"prompt": f"a {number}", "chosen": "good", "rejected": "bad"} for number in numbers]


def long(*numbers):
    return [{**row, "prompt": row["prompt"] + " b c d e f" * 20} for row in fits(*numbers)]


def datasets(tok, data, how="best-worst"):
    """(training rows, held-out rows, counts, what was said) as `align dpo` makes them."""
    said = []
    job = SimpleNamespace(recipe=SimpleNamespace(data=data, seed=0), say=said.append, cache=Path("cache"))

    def tokenized(groups, tally):
        return chat.dpo_rows(tok, groups, how=how, max_length=200, max_prompt_length=LIMIT, tally=tally)

    return *training.datasets(job, "preferences", tok, {"pairs": how}, tokenized)[:3], said


# rows that tokens cost


def test_what_tokens_cost_is_said_and_written_beside_what_was_dropped_before(tok):
    same = {"prompt": "a", "chosen": "x", "rejected": "x"}
    write("a.jsonl", [*fits(*range(6)), same, *long(7, 8, 9)])
    train, held_out, (count,), said = datasets(tok, Data(train="a.jsonl", max_dropped=0.4))
    assert len(train) == 6 and held_out is None
    assert (count.rows_read, count.rows_used) == (10, 6)
    assert count.as_manifest()["dropped"] == {"chosen equals rejected": 1, OVER: 3}
    assert said[0] == "a.jsonl (preference): 10 rows read, 6 used, 4 dropped"
    assert said[1].startswith(f"  3 {OVER}, first at a.jsonl:8: a 7 b c d")


def test_what_tokens_cost_counts_towards_the_limit(tok):
    same = {"prompt": "a", "chosen": "x", "rejected": "x"}
    write("a.jsonl", [*fits(*range(6)), same, *long(7, 8, 9)])
    with pytest.raises(DataError) as raised:
        datasets(tok, Data(train="a.jsonl", max_dropped=0.39))
    (line,) = raised.value.lines
    assert line.startswith("a.jsonl: 4 of 10 rows dropped (40.0%), data.max_dropped allows 39.0%; most often: " + OVER)
    assert "first at a.jsonl:8: " in line and line.endswith("correct the rows or raise data.max_dropped")


def test_a_source_of_which_nothing_is_left_is_refused_whatever_the_limit(tok):
    write("a.jsonl", fits(*range(5)))
    write("b.jsonl", long(6, 7))
    with pytest.raises(DataError) as raised:
        datasets(tok, Data(train=["a.jsonl", "b.jsonl"], max_dropped=1.0))
    (line,) = raised.value.lines
    assert line.startswith("b.jsonl: 2 of 2 rows dropped")


@pytest.mark.parametrize(("weight", "made"), [(2, 10), (0.5, 3), (2.5, 12)])
def test_a_weight_does_not_multiply_what_is_dropped(tok, weight, made):
    write("a.jsonl", [*fits(*range(5)), *long(6)])
    data = Data(train={"path": "a.jsonl", "weight": weight}, max_dropped=0.5)
    train, _, (count,), _ = datasets(tok, data)
    assert count.rows_used + sum(count.dropped.values()) == count.rows_read == 6
    assert sum(count.dropped.values()) <= 1 and len(train) <= made + 1


def test_held_out_rows_are_counted_too(tok):
    write("a.jsonl", fits(*range(20)))
    write("b.jsonl", [*fits(30, 31, 32), *long(33)])
    _, held_out, counts, said = datasets(tok, Data(train="a.jsonl", eval="b.jsonl", max_dropped=0.25))
    assert len(held_out) == 3 and [count.rows_used for count in counts] == [20, 3]
    assert "b.jsonl (preference): 4 rows read, 3 used, 1 dropped" in said
    with pytest.raises(DataError, match=r"^b\.jsonl: 1 of 4 rows dropped"):
        datasets(tok, Data(train="a.jsonl", eval="b.jsonl", max_dropped=0.2))
    write("c.jsonl", [*fits(*range(30)), *long(*range(30, 40))])
    train, held_out, (count,), _ = datasets(tok, Data(train="c.jsonl", eval=0.5, max_dropped=0.25))
    assert (count.rows_used, count.dropped) == (30, {OVER: 10}) and len(train) + len(held_out) == 30


def test_a_held_out_part_of_which_nothing_is_left_is_refused(tok):
    write("a.jsonl", [*fits(0), *long(*range(1, 30))])
    for streaming in (False, True):
        data = Data(train="a.jsonl", eval=0.2, max_dropped=1.0, streaming=streaming)
        groups = stream_eval(data, "preferences", 0, []) if streaming else read_groups(data, "preferences", 0).eval
        assert not any(group.prompt[-1]["content"] == "a 0" for group in groups), "the seed must hold out long ones"
        with pytest.raises(DataError) as raised:
            datasets(tok, data)
        (line,) = raised.value.lines
        start = f"data.eval: every row was dropped; most often: {OVER} ({len(groups)}), first at a.jsonl"
        assert line.startswith(start)


def test_a_stream_counts_what_tokens_cost_and_holds_it_against_the_limit(tok):
    write("a.jsonl", [*fits(*range(6)), *long(7, 8, 9)])
    write("b.jsonl", [*fits(30, 31, 32), *long(33)])
    data = Data(train={"path": "a.jsonl", "weight": 2}, eval="b.jsonl", max_dropped=0.4, streaming=True)
    train, held_out, counts, said = datasets(tok, data)
    assert len(list(train)) == 12 and len(held_out) == 3
    assert said == ["b.jsonl (preference): 4 rows read, 3 used, 1 dropped", said[1]]
    assert [(count.source, count.rows_read, count.rows_used, count.dropped) for count in counts] == [
        ("a.jsonl", 9, 6, {OVER: 3}),
        ("b.jsonl", 4, 3, {OVER: 1}),
    ]
    list(train)
    assert counts[0].rows_read == 9, "a second epoch reads the same rows"
    train, *_ = datasets(tok, Data(train="a.jsonl", max_dropped=0.3, streaming=True))
    with pytest.raises(DataError, match=r"^a\.jsonl: 3 of 9 rows dropped"):
        list(train)


# one path, several sources


def test_sources_that_share_a_path_are_told_apart(tok):
    renamed = {"prompt": "ask", "chosen": "one", "rejected": "two"}
    rows = [{**row, "ask": f"c {at}", "one": "yes", "two": "no"} for at, row in enumerate(fits(*range(6)))]
    rows[2]["ask"], rows[5]["prompt"] = long(2)[0]["prompt"], long(5)[0]["prompt"]
    rows[3]["one"] = "no"
    write("a.jsonl", rows)
    data = Data(train=["a.jsonl", {"path": "a.jsonl", "columns": renamed}], eval="a.jsonl", max_dropped=0.5)
    train, held_out, counts, said = datasets(tok, data)
    assert [count.dropped for count in counts] == [{OVER: 1}, {"chosen equals rejected": 1, OVER: 1}, {OVER: 1}]
    assert (len(train), len(held_out)) == (5 + 4, 5)
    assert [line for line in said if "rows read" in line] == [
        "a.jsonl as data.train[0] (preference): 6 rows read, 5 used, 1 dropped",
        "a.jsonl as data.train[1] (preference): 6 rows read, 4 used, 2 dropped",
        "a.jsonl as data.eval[0] (preference): 6 rows read, 5 used, 1 dropped",
    ]
    entries = [count.as_manifest() for count in counts]
    assert [(entry["source"], entry["key"], entry["split"]) for entry in entries] == [
        ("a.jsonl", "data.train[0]", "train"),
        ("a.jsonl", "data.train[1]", "train"),
        ("a.jsonl", "data.eval[0]", "train"),
    ]
    with pytest.raises(DataError, match=r"^a\.jsonl as data\.train\[1\]: 2 of 6 rows dropped"):
        datasets(tok, data.__class__(train=data.train, eval=data.eval, max_dropped=0.2))


def test_splits_of_one_directory_are_told_apart():
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(fits(1, 2)), "test": Dataset.from_list(fits(3))}).save_to_disk("saved")
    data = Data(train="saved", eval={"path": "saved", "split": "test"})
    counts = read_groups(data, "preferences", 0).counts
    assert [(count.name, count.split, count.rows_read) for count in counts] == [
        ("saved as data.train[0]", "train", 2),
        ("saved as data.eval[0]", "test", 1),
    ]
    assert check_sources(data, "preferences") == ([], counts)
    streamed = []
    stream_eval(data, "preferences", 0, streamed)
    list(stream_groups(data, "preferences", 0, streamed))
    assert streamed == counts


def test_a_path_of_its_own_is_named_alone():
    write("a.jsonl", fits(1))
    write("b#1.jsonl", fits(2))
    first, second = read_groups(Data(train=["a.jsonl", "b#1.jsonl"]), "preferences", 0).counts
    assert (first.name, second.name) == ("a.jsonl", "b#1.jsonl") and "key" not in first.as_manifest()


def test_a_place_with_marks_in_its_name_loses_no_row(tok):
    write("b#1:x.jsonl", [*fits(1, 2, 3), *long(4)])
    _, _, (count,), _ = datasets(tok, Data(train="b#1:x.jsonl", max_dropped=0.5))
    assert (count.rows_used, count.dropped) == (3, {OVER: 1})
