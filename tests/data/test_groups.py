"""Whole sources: problems, counts, the split, the weights, streaming, and the real files."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from align_cli.data.groups import (
    Count,
    Group,
    check_sources,
    preference_pairs,
    read_groups,
    stream_eval,
    stream_groups,
)
from align_cli.data.load import fingerprint
from align_cli.errors import DataError
from align_cli.recipe.sections import Data, Source

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not on this machine")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def prompts(n, start=0):
    return [{"prompt": f"question {number}"} for number in range(start, start + n)]


def pair(number, chosen="good", rejected="bad"):
    return {"prompt": f"question {number}", "chosen": chosen, "rejected": rejected}


def asked(groups):
    return [group.prompt[0]["content"] for group in groups]


def lines_of(data, need):
    with pytest.raises(DataError) as raised:
        read_groups(data, need, 0)
    return raised.value.lines


def streamed(data, need="prompts", seed=0):
    counts = []
    return list(stream_groups(data, need, seed, counts)), counts


# problems


def test_all_problems_of_all_sources_come_together():
    write("a.jsonl", [pair(1), pair(2, rejected=" "), {"prompt": "q", "chosen": "a"}, pair(3, chosen=[])])
    with open("a.jsonl", "a") as file:
        file.write('{"prompt": \n')
    write("b.jsonl", [{"messages": []}])
    data = Data(train=["a.jsonl", "b.jsonl"], eval="c.jsonl")
    lines = lines_of(data, "preferences")
    assert lines == (
        "a.jsonl:5: not valid JSON (Expecting value at column 11); correct or remove the line",
        "a.jsonl:2: 'rejected' is empty; remove the row or set data.drop_empty=true",
        "a.jsonl:3: 'rejected' is missing or null (has prompt, chosen); add it or remove the row",
        "a.jsonl:4: 'chosen' is empty; remove the row or set data.drop_empty=true",
        "b.jsonl: has messages, but preferences need chosen and rejected, or responses; name another file or rename its"
        " columns with `columns`",
        "c.jsonl: no such file (looked in the working directory). Did you mean 'b.jsonl'?",
    )
    assert tuple(check_sources(data, "preferences")[0]) == lines


def test_twenty_lines_a_source_are_enough():
    write("a.jsonl", [pair(1), *[pair(n, rejected="") for n in range(30)]])
    lines = lines_of(Data(train="a.jsonl"), "preferences")
    assert len(lines) == 21
    assert lines[19].startswith("a.jsonl:21: ")
    assert lines[20] == "a.jsonl: … and 10 more"


def test_an_empty_file():
    write("a.jsonl", [])
    assert lines_of(Data(train="a.jsonl"), "prompts") == (
        "a.jsonl: holds no rows; name another file or write it again",
    )


def test_strings_and_messages_in_one_column():
    write("a.jsonl", [*prompts(2), {"prompt": [{"role": "user", "content": "q"}]}])
    (line,) = lines_of(Data(train="a.jsonl"), "prompts")
    assert line.startswith("a.jsonl:3: 'prompt' holds a list of messages here, but a string at a.jsonl:1;")


@pytest.mark.parametrize("fraction", [0, 1.0, 1, 1.5, -0.1])
def test_a_fraction_that_is_none(fraction):
    write("a.jsonl", prompts(5))
    data = Data(train="a.jsonl", eval=fraction)
    (line,) = lines_of(data, "prompts")
    assert line.startswith(f"data.eval: {fraction:g} is not a fraction between 0 and 1;")
    assert check_sources(data, "prompts")[0] == [line]
    with pytest.raises(DataError, match=r"^data\.eval"):
        streamed(data)
    with pytest.raises(DataError, match=r"^data\.eval"):
        stream_eval(data, "prompts", 0, [])


# counts


def test_counts_add_up_and_name_the_first_example():
    rows = [pair(1), pair(2, "same", "same"), {**pair(3), "prompt": ""}, pair(4, "x " * 60, "x " * 60), pair(5)]
    write("a.jsonl", rows)
    groups = read_groups(Data(train="a.jsonl", max_dropped=0.6), "preferences", 0)
    (count,) = groups.counts
    assert (count.rows_read, count.rows_used) == (5, 2) and len(groups.train) == 2
    assert count.dropped == {"chosen equals rejected": 2, "empty prompt": 1}
    assert count.first == {"chosen equals rejected": "a.jsonl:2: question 2", "empty prompt": "a.jsonl:3"}
    assert count.lines() == [
        "a.jsonl (preference): 5 rows read, 2 used, 3 dropped",
        "  2 chosen equals rejected, first at a.jsonl:2: question 2",
        "  1 empty prompt, first at a.jsonl:3",
    ]
    assert count.as_manifest() == {
        "source": "a.jsonl",
        "rows_read": 5,
        "rows_used": 2,
        "dropped": {"chosen equals rejected": 2, "empty prompt": 1},
        "fingerprint": fingerprint(Source(path="a.jsonl")),
        "format": "preference",
    }
    assert check_sources(Data(train="a.jsonl", max_dropped=0.6), "preferences") == ([], groups.counts)
    assert streamed(Data(train="a.jsonl", max_dropped=0.6), "preferences") == (list(groups.train), groups.counts)


def test_long_examples_are_cut():
    write("a.jsonl", [{"prompt": "word\n" * 100, "chosen": "a", "rejected": "a"}, pair(1)])
    (count,) = read_groups(Data(train="a.jsonl", max_dropped=0.5), "preferences", 0).counts
    (first,) = count.first.values()
    assert first == "a.jsonl:1: " + ("word " * 100)[:60] + "…"


def test_repeated_responses_are_counted_apart_from_rows():
    write("a.jsonl", [{"prompt": "q", "responses": ["a", "b", "a", "a"]}, {"prompt": "r", "responses": ["a", "b"]}])
    (count,) = read_groups(Data(train="a.jsonl"), "preferences", 0).counts
    assert (count.rows_read, count.rows_used, count.dropped, count.repeated) == (2, 2, {}, 2)
    assert count.lines()[1] == "  2 repeated responses left out of rows that are used"
    assert count.as_manifest()["repeated_responses"] == 2


@pytest.mark.parametrize(
    "read", [lambda data: read_groups(data, "preferences", 0), lambda data: streamed(data, "preferences")]
)
def test_more_dropped_rows_than_allowed(read):
    write("a.jsonl", [*[pair(n) for n in range(8)], pair(8, "x", "x"), pair(9, "", ""), pair(10, "x", "x")])
    data = Data(train="a.jsonl", drop_empty=True, max_dropped=0.2)
    with pytest.raises(DataError) as raised:
        read(data)
    line = (
        "a.jsonl: 3 of 11 rows dropped (27.3%), data.max_dropped allows 20.0%; most often: chosen equals rejected (2),"
        " first at a.jsonl:9: question 8; correct the rows or raise data.max_dropped"
    )
    assert raised.value.lines == (line,)
    assert check_sources(data, "preferences")[0] == [line]
    read(Data(train="a.jsonl", drop_empty=True, max_dropped=0.3))


def test_a_source_without_a_usable_row_is_refused_whatever_the_limit():
    write("a.jsonl", [pair(1, "x", "x")])
    (line,) = lines_of(Data(train="a.jsonl", max_dropped=1.0), "preferences")
    assert line.startswith("a.jsonl: 1 of 1 rows dropped") and line.endswith("; correct the rows")


@pytest.mark.parametrize(
    ("drop_empty", "hh", "other"),
    [(None, "dropped", "broken"), (True, "dropped", "dropped"), (False, "broken", "broken")],
)
def test_drop_empty(drop_empty, hh, other):
    dialogue = "\n\nHuman: q{}\n\nAssistant: {}"
    rows = [{"chosen": dialogue.format(n, "a"), "rejected": dialogue.format(n, "b" if n else "")} for n in range(4)]
    write("hh.jsonl", rows)
    write("other.jsonl", [pair(n, rejected="b" if n else "") for n in range(4)])
    for name, expected in (("hh.jsonl", hh), ("other.jsonl", other)):
        data = Data(train=name, drop_empty=drop_empty, max_dropped=0.5)
        if expected == "dropped":
            assert read_groups(data, "preferences", 0).counts[0].dropped == {"empty response": 1}
        else:
            assert lines_of(data, "preferences") == (
                f"{name}:1: 'rejected' is empty; remove the row or set data.drop_empty=true",
            )


def test_check_reads_the_first_part_of_a_large_file_and_says_so():
    write("a.jsonl", prompts(1000))
    with open("a.jsonl", "a") as file:
        file.write("broken\n")
    lines, (count,) = check_sources(Data(train="a.jsonl"), "prompts", max_bytes=2000)
    assert lines == [] and count.partial and 0 < count.rows_read < 200
    assert count.lines()[0].startswith("a.jsonl (prompt, first part only): ")
    assert count.fingerprint == fingerprint(Source(path="a.jsonl"))
    assert len(check_sources(Data(train="a.jsonl"), "prompts")[0]) == 1


def test_check_leaves_hub_ids_alone(monkeypatch):
    def never(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("align_cli.data.load._hub_rows", never)
    assert check_sources(Data(train="org/name"), "prompts") == ([], [])


# the split


def test_a_fraction_splits_prompts_and_keeps_equal_prompts_together():
    write("a.jsonl", prompts(30))
    write("b.jsonl", prompts(30, start=20))
    groups = read_groups(Data(train=["a.jsonl", "b.jsonl"], eval=0.2), "prompts", 7)
    held_out = set(asked(groups.eval))
    assert len(held_out) == 10  # of 50 different prompts
    assert not held_out & set(asked(groups.train))
    assert len(groups.train) + len(groups.eval) == 60
    assert sum(count.rows_used for count in groups.counts) == 60
    other = read_groups(Data(train=["a.jsonl", "b.jsonl"], eval=0.2), "prompts", 8)
    assert set(asked(other.eval)) != held_out


def test_the_split_follows_the_prompts_not_their_order():
    rows = prompts(40)
    write("a.jsonl", rows)
    write("b.jsonl", rows[::-1])
    one, two = (read_groups(Data(train=name, eval=0.25), "prompts", 1) for name in ("a.jsonl", "b.jsonl"))
    assert sorted(asked(one.eval)) == sorted(asked(two.eval)) and len(one.eval) == 10


@pytest.mark.parametrize(
    ("n", "fraction", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.01, 1), (10, 0.37, 4), (10, 0.999, 9)]
)
def test_the_smallest_splits_leave_one_on_each_side(n, fraction, held_out):
    write("a.jsonl", prompts(n))
    groups = read_groups(Data(train="a.jsonl", eval=fraction), "prompts", 0)
    assert (len(groups.train), len(groups.eval)) == (n - held_out, held_out)


def test_a_single_prompt_cannot_be_split():
    write("a.jsonl", [pair(1), pair(1, "better")])
    data = Data(train="a.jsonl", eval=0.5)
    (line,) = lines_of(data, "preferences")
    assert line.startswith("data.eval: 0.5 of a single prompt cannot be held out")
    assert check_sources(data, "preferences")[0] == [line]


def test_eval_sources_that_share_prompts_with_train_are_counted():
    write("a.jsonl", prompts(10))
    write("b.jsonl", prompts(10, start=7))
    groups = read_groups(Data(train="a.jsonl", eval="b.jsonl"), "prompts", 0)
    assert (len(groups.train), len(groups.eval), groups.leaked) == (10, 10, 3)
    assert [count.source for count in groups.counts] == ["a.jsonl", "b.jsonl"]
    assert read_groups(Data(train="a.jsonl", eval=0.5), "prompts", 0).leaked == 0


# weights


@pytest.mark.parametrize(("weight", "times"), [(1, {1: 40}), (2, {2: 40}), (0.25, {1: 10}), (2.5, {2: 20, 3: 20})])
def test_weights_repeat_rows_and_take_a_seeded_part(weight, times):
    write("a.jsonl", prompts(40))
    data = Data(train={"path": "a.jsonl", "weight": weight})
    groups = read_groups(data, "prompts", 3)
    assert Counter(Counter(asked(groups.train)).values()) == times
    assert (groups.counts[0].rows_read, groups.counts[0].rows_used) == (40, 40)
    again, other = read_groups(data, "prompts", 3), read_groups(data, "prompts", 4)
    assert list(again.train) == list(groups.train)
    assert (list(other.train) == list(groups.train)) == (weight == int(weight))


def test_a_tiny_weight_keeps_a_row():
    write("a.jsonl", prompts(5))
    assert len(read_groups(Data(train={"path": "a.jsonl", "weight": 0.001}), "prompts", 0).train) == 1


def test_the_weight_does_not_move_the_split():
    write("a.jsonl", prompts(200))
    full = read_groups(Data(train="a.jsonl", eval=0.3), "prompts", 0)
    half = read_groups(Data(train={"path": "a.jsonl", "weight": 0.5}, eval=0.3), "prompts", 0)
    assert list(half.eval) == list(full.eval)
    assert len(half.train) == 70 and set(asked(half.train)) < set(asked(full.train))
    # one hash for both would take, of the rows that are left, those that follow the held-out ones in its order
    longer = read_groups(Data(train="a.jsonl", eval=0.65), "prompts", 0)
    shared = set(asked(half.train)) & set(asked(longer.eval))
    assert 20 <= len(shared) <= 50  # 35 expected; 70 for one hash


# streaming


def test_streaming_reads_lazily():
    write("a.jsonl", prompts(1000))
    counts = []
    stream = stream_groups(Data(train="a.jsonl", streaming=True), "prompts", 0, counts)
    next(stream)
    assert counts[0].rows_read == 1
    assert len(list(stream)) == 999 and counts[0].rows_read == counts[0].rows_used == 1000


def test_streaming_and_its_eval_share_no_prompt_and_lose_none():
    write("a.jsonl", prompts(600) + prompts(600))
    data = Data(train="a.jsonl", eval=0.25, streaming=True)
    (train, (count,)), held_out = streamed(data, seed=5), stream_eval(data, "prompts", 5, [])
    assert not set(asked(train)) & set(asked(held_out))
    assert len(train) + len(held_out) == 1200 == count.rows_used
    assert 0.2 < len(held_out) / 1200 < 0.3


def test_streaming_holds_at_most_512_rows_for_evaluation():
    write("a.jsonl", prompts(1200))
    data = Data(train="a.jsonl", eval=0.5, streaming=True)
    held_out = stream_eval(data, "prompts", 0, [])
    assert len(held_out) == 512
    assert not set(asked(streamed(data)[0])) & set(asked(held_out))


def test_streaming_eval_from_sources_and_from_a_fraction_too_small():
    write("a.jsonl", prompts(10))
    write("b.jsonl", prompts(4, start=100))
    assert asked(stream_eval(Data(train="a.jsonl", eval="b.jsonl"), "prompts", 0, [])) == [
        f"question {number}" for number in range(100, 104)
    ]
    assert stream_eval(Data(train="a.jsonl"), "prompts", 0, []) == []
    with pytest.raises(DataError, match=r"^data\.eval: a fraction of 1e-09 holds out no prompt; raise it"):
        stream_eval(Data(train="a.jsonl", eval=1e-9), "prompts", 0, [])


def test_streaming_mixes_sources_in_proportion_to_their_weights():
    write("a.jsonl", prompts(300))
    write("b.jsonl", prompts(300, start=1000))
    data = Data(train=[{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl", "weight": 0.5}], streaming=True)
    groups, counts = streamed(data)
    first = Counter(group.place.split(":")[0] for group in groups[:100])
    assert first == {"a.jsonl": 80, "b.jsonl": 20}
    times = Counter(asked(groups))
    assert all(times[f"question {number}"] == 2 for number in range(300))
    part = sum(times[f"question {number}"] for number in range(1000, 1300))
    assert 120 < part < 180 and max(times.values()) == 2
    assert [(count.rows_read, count.rows_used) for count in counts] == [(300, 300), (300, 300)]


def test_streaming_stops_at_a_broken_row_and_before_a_missing_file():
    write("a.jsonl", [pair(1), pair(2, rejected=""), pair(3)])
    stream = stream_groups(Data(train="a.jsonl", streaming=True), "preferences", 0, [])
    assert next(stream).place == "a.jsonl:1"
    with pytest.raises(DataError, match="^a.jsonl:2: 'rejected' is empty"):
        next(stream)
    with pytest.raises(DataError, match="no such file"):
        streamed(Data(train=["a.jsonl", "b.jsonl"]), "preferences")


# the same on every rank


def test_choices_are_the_same_in_every_process():
    write("a.jsonl", [pair(number) for number in range(60)])
    code = """if True:
        import hashlib
        from align_cli.data.groups import read_groups, stream_eval, stream_groups
        from align_cli.recipe.sections import Data
        data = Data(train={"path": "a.jsonl", "weight": 1.5}, eval=0.2)
        groups = read_groups(data, "preferences", 11)
        streams = list(stream_groups(data, "preferences", 11, [])), stream_eval(data, "preferences", 11, [])
        print(hashlib.sha256(repr((list(groups.train), list(groups.eval), streams)).encode()).hexdigest())
    """
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "random")
    ]
    assert len(set(said)) == 1 and len(said[0]) == 65


def test_the_hash_itself_does_not_move():
    # a changed hash would move prompts from one side to the other in everybody's half-finished runs
    write("a.jsonl", prompts(10))

    def key(text):
        said = f'42\nsplit\n[{{"content":"{text}","role":"user"}}]'
        return hashlib.sha256(said.encode()).hexdigest()

    smallest = sorted((row["prompt"] for row in prompts(10)), key=key)[:3]
    assert set(asked(read_groups(Data(train="a.jsonl", eval=0.3), "prompts", 42).eval)) == set(smallest)


# pairs


@pytest.mark.parametrize(
    ("how", "scores", "pairs"),
    [
        ("best-worst", None, [(0, 3)]),
        ("adjacent", None, [(0, 1), (1, 2), (2, 3)]),
        ("all", None, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
        ("best-worst", [2, 2, 1, 1], [(0, 3)]),
        ("adjacent", [2, 2, 1, 1], [(1, 2)]),
        ("all", [2, 2, 1, 1], [(0, 2), (0, 3), (1, 2), (1, 3)]),
        ("best-worst", [1, 1, 1, 1], []),
    ],
)
def test_preference_pairs(how, scores, pairs):
    responses = [[{"role": "assistant", "content": text}] for text in "abcd"]
    assert preference_pairs(Group([], responses, scores), how) == pairs


@pytest.mark.parametrize("how", ["best-worst", "adjacent", "all"])
def test_a_single_response_has_no_pairs(how):
    assert preference_pairs(Group([], [[{"role": "assistant", "content": "a"}]]), how) == []


# the real files


@real
def test_hh_harmless_pairs():
    path = str(SHARED / "hh_harmless_pairs.jsonl")
    groups = read_groups(Data(train=path), "preferences", 0)
    (count,) = groups.counts
    # Lines 87 and 517 have an empty chosen reply. No pair of this file differs before its last turn, once the
    # dialogues are split at paragraphs that begin with a mark only; `Human:` inside a reply is text.
    assert (count.format, count.rows_read, count.rows_used) == ("hh", 800, 798)
    assert count.dropped == {"empty response": 2}
    assert count.first["empty response"].startswith(f"{path}:87: 'chosen'")
    assert all(group.prompt[0]["role"] == "user" and group.prompt[-1]["role"] == "user" for group in groups.train)
    assert all([len(response) for response in group.responses] == [1, 1] for group in groups.train)
    assert not any(turn["content"] != turn["content"].strip() for group in groups.train for turn in group.prompt)
    assert len(read_groups(Data(train=path), "demonstrations", 0).train) == 798
    assert lines_of(Data(train=path, drop_empty=False), "preferences")[0].startswith(f"{path}:87: 'chosen' is empty")


@real
@pytest.mark.parametrize(
    ("name", "need", "form", "rows"),
    [
        ("oasst_sft.jsonl", "demonstrations", "messages", 207),
        ("oasst_rankings.jsonl", "preferences", "ranking", 207),
        ("oasst_rankings.jsonl", "prompts", "prompt", 207),
        ("xstest_prompts.csv", "prompts", "prompt", 450),
        ("hh_harmless_pairs.jsonl", "prompts", "hh", 800),
    ],
)
def test_real_files_need_no_format(name, need, form, rows):
    (count,) = read_groups(Data(train=str(SHARED / name), eval=0.1), need, 0).counts
    assert (count.format, count.rows_read, count.rows_used, count.dropped) == (form, rows, rows, {})


@real
def test_rankings_keep_all_their_responses():
    groups = read_groups(Data(train=str(SHARED / "oasst_rankings.jsonl")), "preferences", 0).train
    sizes = Counter(len(group.responses) for group in groups)
    assert sizes == {3: 116, 2: 56, 4: 24, 6: 6, 5: 3, 9: 1, 8: 1}
    assert sum(len(preference_pairs(group, "all")) for group in groups) == sum(
        k * (k - 1) // 2 * n for k, n in sizes.items()
    )


def test_a_count_begins_empty():
    assert Count("x").lines() == ["x (): 0 rows read, 0 used, 0 dropped"]
