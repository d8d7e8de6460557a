"""Rows and their places, from every kind of source."""

import csv
import hashlib
import json
import os
import subprocess
import sys

import pytest

from align_cli.data.load import fingerprint, is_local, read_rows
from align_cli.data.rows import CHUNK
from align_cli.errors import DataError
from align_cli.recipe.sections import Source


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()


def source(path, **keys):
    return Source(path=str(path), **keys)


def write(path, text):
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    return str(path)


def collected(what, **keys):
    """(rows, problems) with every problem reported instead of raised."""
    problems = []
    return list(read_rows(what, problems.append, **keys)), problems


def test_json_lines_have_the_places_of_their_lines():
    write("data/a.jsonl", '\ufeff{"a": 1}\n\n  \r\n{"a": "x\u2028y"}\n{"a": 3}')
    assert list(read_rows(source("data/a.jsonl"))) == [
        ("data/a.jsonl:1", {"a": 1}),
        ("data/a.jsonl:4", {"a": "x\u2028y"}),
        ("data/a.jsonl:5", {"a": 3}),
    ]


def test_every_broken_line_is_reported_and_the_others_are_read():
    write("a.jsonl", '{"a": 1}\n{"a": 1 "b": 2}\n[1]\n"x"\n{"a": 2}\n')
    rows, problems = collected(source("a.jsonl"))
    assert [place for place, _ in rows] == ["a.jsonl:1", "a.jsonl:5"]
    assert problems == [
        "a.jsonl:2: not valid JSON (Expecting ',' delimiter at column 9); correct or remove the line",
        'a.jsonl:3: the row is a list, not an object; write {"column": value, …}',
        'a.jsonl:4: the row is a str, not an object; write {"column": value, …}',
    ]


def test_without_a_report_the_first_broken_line_raises():
    write("a.jsonl", '{"a": 1}\n{"a": \n')
    rows = read_rows(source("a.jsonl"))
    assert next(rows)[0] == "a.jsonl:1"
    with pytest.raises(DataError, match=r"^a\.jsonl:2: not valid JSON"):
        next(rows)


def test_bytes_that_are_no_utf8_are_placed():
    with open("a.jsonl", "wb") as file:
        file.write(b'{"a": 1}\n{"a": "\xff"}\n')
    _, problems = collected(source("a.jsonl"))
    remedy = "save the file as UTF-8, e.g. `iconv -f WINDOWS-1252 -t UTF-8`"
    assert problems == [f"a.jsonl:2: not UTF-8 (byte 0xff at column 8); {remedy}"]
    with open("a.csv", "wb") as file:
        file.write(b"a,b\n1,\xe9\n2,\xe9\n")
    assert collected(source("a.csv"))[1] == [f"a.csv:2: not UTF-8 (byte 0xe9 at column 3); {remedy}"]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_counts_from_one_and_may_be_longer_than_a_chunk(indent):
    rows = [{"a": number, "text": "é\n] , [" * 100} for number in range(3000)]
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    assert len(text) > 1.5 * CHUNK
    write("a.json", f" \n {text}\n")
    read = list(read_rows(source("a.json")))
    assert [row for _, row in read] == rows
    assert read[0][0] == "a.json#1" and read[-1][0] == "a.json#3000"


def test_a_row_longer_than_a_chunk_is_read_whole():
    rows = [{"a": "x" * (2 * CHUNK)}, {"a": "y"}]
    write("a.json", json.dumps(rows))
    assert [row for _, row in read_rows(source("a.json"))] == rows


@pytest.mark.parametrize(
    ("text", "read", "fault"),
    [
        ('[{"a": 1} {"a": 2}]', 1, "a.json#2: not valid JSON (Expecting ',' delimiter)"),
        ('[{"a": 1}, ]', 1, "a.json#2: not valid JSON (Expecting value)"),
        ('[{"a": 1}', 1, "a.json#2: not valid JSON"),
        ("[", 0, "a.json#1: not valid JSON"),
    ],
)
def test_a_broken_array_names_the_row_it_breaks_at(text, read, fault):
    write("a.json", text)
    rows, problems = collected(source("a.json"))
    assert len(rows) == read
    assert len(problems) == 1 and problems[0].startswith(fault) and problems[0].endswith("from this row on")


def test_json_without_an_array_is_read_as_lines():
    write("a.json", '{"a": 1}\n{"a": 2}\n')
    assert [place for place, _ in read_rows(source("a.json"))] == ["a.json:1", "a.json:2"]
    write("empty.json", "[]")
    assert list(read_rows(source("empty.json"))) == []


def test_a_csv_record_is_placed_at_its_first_physical_line():
    with open("a.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "n"], ["one\ntwo\nthree", "1"], ["short", "2"]])
        file.write("\r\n")
        writer.writerow(["long " * 40_000, "3"])
    rows = list(read_rows(source("a.csv")))
    assert [(place, row["n"]) for place, row in rows] == [("a.csv:2", "1"), ("a.csv:5", "2"), ("a.csv:7", "3")]
    assert rows[0][1] == {"prompt": "one\ntwo\nthree", "n": "1"}


def test_csv_cells_of_list_columns_are_json():
    write("a.csv", 'prompt,responses\n"[1]","[""a"", ""b""]"\nq,plain\n')
    rows = [row for _, row in read_rows(source("a.csv"))]
    assert rows == [{"prompt": "[1]", "responses": ["a", "b"]}, {"prompt": "q", "responses": "plain"}]


def test_csv_records_that_do_not_fit_the_header_are_reported():
    write("a.csv", "a,b\n1,2\n1,2,3\n1\n4,5\n")
    rows, problems = collected(source("a.csv"))
    assert [place for place, _ in rows] == ["a.csv:2", "a.csv:5"]
    assert problems == [
        "a.csv:3: 3 cells under 2 columns; quote cells that hold commas",
        "a.csv:4: 1 cell under 2 columns; quote cells that hold commas",
    ]
    write("b.csv", "a,b,a\n1,2,3\n")
    assert collected(source("b.csv")) == ([], ["b.csv:1: the column 'a' occurs twice; rename one"])


def test_parquet_rows_and_a_damaged_parquet_file():
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": [{"role": "user", "content": str(number)}], "a": None} for number in range(1000)]
    parquet.write_table(pa.Table.from_pylist(rows), "a.parquet")
    read = list(read_rows(source("a.parquet")))
    assert [row for _, row in read] == rows
    assert read[0][0] == "a.parquet#1" and read[-1][0] == "a.parquet#1000"
    write("b.parquet", "no parquet")
    rows, problems = collected(source("b.parquet"))
    assert not rows and len(problems) == 1 and problems[0].startswith("b.parquet: not a readable Parquet file (")


def test_datasets_directories_with_and_without_splits():
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"prompt": "p"}, {"prompt": "q"}])
    one.save_to_disk("plain")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk("both")
    assert list(read_rows(source("plain"))) == [("plain#1", {"prompt": "p"}), ("plain#2", {"prompt": "q"})]
    assert list(read_rows(source("both", split="test"))) == [("both#1", {"prompt": "q"})]
    assert collected(source("both", split="dev"))[1] == ["both: no split 'dev'; set split to one of train, test"]
    os.truncate("plain/state.json", 3)
    assert collected(source("plain"))[1][0].startswith("plain: not a readable datasets directory (")


def test_hub_ids_are_loaded_by_split_and_their_failures_are_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, **keys):
        asked.append((path, keys))
        return [{"prompt": "p"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows(source("org/name", split="test"))) == [("org/name#1", {"prompt": "p"})]
    list(read_rows(source("org/name"), streaming=True))
    assert asked == [
        ("org/name", {"split": "test", "streaming": False}),
        ("org/name", {"split": "train", "streaming": True}),
    ]

    def fail(path, **keys):
        raise ConnectionError("no route\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    _, problems = collected(source("org/name"))
    assert len(problems) == 1 and problems[0].startswith("org/name: cannot be loaded from the hub (no route); check")


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("org/name", False),
        ("org/name-v1.5", False),
        ("imdb", False),
        ("data/pairs", True),
        ("elsewhere/pairs.jsonl", True),
        ("pairs.txt", True),
        ("./pairs", True),
        ("/pairs", True),
        ("a/b/c", True),
    ],
)
def test_what_is_a_hub_id(path, local):
    assert is_local(source(path)) is local


def test_a_missing_file_names_the_nearest_one():
    write("data/pairs.jsonl", "{}")
    with pytest.raises(DataError) as raised:
        list(read_rows(source("data/pars.jsonl")))
    said = "data/pars.jsonl: no such file (looked in the working directory). Did you mean 'data/pairs.jsonl'?"
    assert raised.value.lines == (said,)
    # the right name in the wrong place, and nothing that is near
    assert "Did you mean 'data/pairs.jsonl'?" in collected(source("some/other/place/pairs.jsonl"))[1][0]
    assert collected(source("zzz.csv"))[1] == [
        "zzz.csv: no such file (looked in the working directory); files found: data/pairs.jsonl"
    ]
    with pytest.raises(DataError, match="Did you mean"):
        fingerprint(source("data/pars.jsonl"))


def test_a_file_of_another_kind_is_refused():
    write("a.txt", "x")
    assert collected(source("a.txt"))[1] == [
        "a.txt: cannot read a '.txt' file; convert it to one of .json, .jsonl, .ndjson, .csv, .tsv, .parquet"
    ]


def test_columns_reach_into_lists_of_objects():
    row = {"ask": {"text": "q"}, "completions": [{"response": "a", "score": 4.5}, {"response": "b", "score": 2}]}
    write("a.jsonl", json.dumps(row) + "\n" + json.dumps({"ask": {}, "completions": "none"}) + "\n")
    columns = {"prompt": "ask.text", "responses": "completions[].response", "scores": "completions[].score"}
    rows, problems = collected(source("a.jsonl", columns=columns))
    ((_, found),) = rows
    assert (found["prompt"], found["responses"], found["scores"]) == ("q", ["a", "b"], [4.5, 2])
    assert problems == [
        "a.jsonl:2: no column 'ask.text' (has ask, completions); correct `columns` of the source or the row"
    ]


def test_columns_are_renamed_and_a_missing_one_is_placed():
    write("a.jsonl", '{"q": 1, "a": 2, "c": 3}\n{"q": 1, "c": 3}\n')
    rows, problems = collected(source("a.jsonl", columns={"prompt": "q", "completion": "a"}))
    assert rows == [("a.jsonl:1", {"c": 3, "prompt": 1, "completion": 2})]
    assert problems == ["a.jsonl:2: no column 'a' (has q, c); correct `columns` of the source or the row"]
    swapped = list(read_rows(source("a.jsonl", columns={"q": "c", "c": "q"})))
    assert swapped[0][1] == {"a": 2, "q": 3, "c": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_max_bytes_reads_the_first_part_without_complaint(name):
    rows = [{"text": f'"{number}"\n' + "x" * 1000} for number in range(3000)]
    match name:
        case "a.jsonl":
            write(name, "".join(json.dumps(row) + "\n" for row in rows))
        case "a.json":
            write(name, json.dumps(rows))
        case "a.csv":
            with open(name, "w", newline="") as file:
                writer = csv.DictWriter(file, ["text"])
                writer.writeheader()
                writer.writerows(rows)
        case "a.parquet":
            pa = pytest.importorskip("pyarrow")
            from pyarrow import parquet

            parquet.write_table(pa.Table.from_pylist(rows), name)
    read, problems = collected(source(name), max_bytes=100_000)
    assert problems == []
    assert 0 < len(read) < 2000
    assert [row for _, row in read] == rows[: len(read)]


def test_max_bytes_never_cuts_a_csv_record():
    with open("a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text"], *[["one\ntwo\nthree"]] * 50])
    for limit in range(100, 300, 7):
        rows, problems = collected(source("a.csv"), max_bytes=limit)
        assert problems == [] and 0 < len(rows) < 50
        assert {row["text"] for _, row in rows} == {"one\ntwo\nthree"}


def test_fingerprints_follow_bytes_and_names(monkeypatch, tmp_path):
    write("a.jsonl", '{"a": 1}\n')
    assert fingerprint(source("a.jsonl")) == hashlib.sha256(b'{"a": 1}\n').hexdigest()
    (tmp_path / "d").mkdir()
    write("d/x.jsonl", "1")
    write("d/y.jsonl", "2")
    before = fingerprint(source("d"))
    os.rename("d/y.jsonl", "d/z.jsonl")
    renamed = fingerprint(source("d"))
    write("d/z.jsonl", "3")
    assert len({before, renamed, fingerprint(source("d"))}) == 3


def test_the_fingerprint_of_a_hub_id_names_the_cached_revision(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert fingerprint(source("org/name", split="test")) == "hub:org/name@unknown:test"
    refs = tmp_path / "cache" / "datasets--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc123\n")
    assert fingerprint(source("org/name")) == "hub:org/name@abc123:train"


def test_local_files_need_no_heavy_import():
    code = (
        "import sys; from align_cli.data import groups; from align_cli.recipe.sections import Data;"
        "groups.check_sources(Data(train='a.jsonl'), 'prompts');"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    write("a.jsonl", '{"prompt": "p"}\n')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_parts_of_a_hub_id_are_what_datasets_is_asked_for(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **keys: asked.append((path, keys)) or [])
    list(read_rows(source("org/name", subset="main", revision="v1")))
    list(read_rows(source("org/name", data_dir="harmless-base", split="test"), streaming=True))
    assert asked == [
        ("org/name", {"split": "train", "streaming": False, "name": "main", "revision": "v1"}),
        ("org/name", {"split": "test", "streaming": True, "data_dir": "harmless-base"}),
    ]


def test_datasets_reads_the_parts_that_are_asked_for():
    """The names of the parameters, against `datasets` itself."""
    datasets = pytest.importorskip("datasets")
    for part in ("one", "two"):
        os.makedirs(f"d/{part}")
        write(f"d/{part}/train.jsonl", json.dumps({"prompt": part}) + "\n")
    write("d/README.md", "---\nconfigs:\n- config_name: b\n  data_files: two/train.jsonl\n---\n")
    for given, expected in ({"data_dir": "one"}, "one"), ({"name": "b"}, "two"):
        rows = datasets.load_dataset("./d", split="train", cache_dir="cache", **given)
        assert [row["prompt"] for row in rows] == [expected]


def test_the_fingerprint_of_a_hub_id_tells_its_parts_and_revisions_apart(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    refs = tmp_path / "cache" / "datasets--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc123")
    (refs / "v1").write_text("def456\n")
    assert fingerprint(source("org/name", revision="v1")) == "hub:org/name@def456:train"
    assert fingerprint(source("org/name", revision="v2")) == "hub:org/name@unknown:train"
    assert fingerprint(source("org/name", revision="f" * 40)) == f"hub:org/name@{'f' * 40}:train"
    assert fingerprint(source("org/name", data_dir="x")) == "hub:org/name@abc123:train:data_dir=x"
    assert fingerprint(source("org/name", subset="x")) == "hub:org/name@abc123:train:subset=x"
