"""Source files: compressed, sharded, in other encodings, and files that do not hold rows."""

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align_cli.data.files import by_split
from align_cli.data.load import files, fingerprint, is_local, read_rows
from align_cli.errors import DataError
from align_cli.recipe.sections import Source

ROWS = [{"prompt": f"é {number}", "chosen": "a\u2028b", "n": number} for number in range(40)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 875191\n"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def source(path, **keys):
    return Source(path=str(path), **keys)


def write(path, text, encoding="utf-8"):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def collected(path, *, max_bytes=None, **keys):
    """(rows, problems) with every problem reported instead of raised."""
    problems = []
    return list(read_rows(source(path, **keys), problems.append, max_bytes=max_bytes)), problems


def read(path, **keys):
    """Rows of a source without problems."""
    rows, problems = collected(path, **keys)
    assert problems == []
    return [row for _, row in rows]


def problem(path, **keys):
    """The only problem of a source."""
    _, problems = collected(path, **keys)
    assert len(problems) == 1, problems
    return problems[0]


def zstd(data):
    return pytest.importorskip("pyarrow").Codec("zstd").compress(data, asbytes=True)


PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


def parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


# compressed


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv"])
def test_a_compressed_file_is_read_as_the_file_in_it(kind, packed):
    text = {
        "jsonl": LINES,
        "ndjson": LINES,
        "json": json.dumps(ROWS, indent=1),
        "csv": 'prompt,n\n"one, two",1\n',
        "tsv": "prompt\tn\none, two\t1\n",
    }[kind]
    write(f"rows.{kind}", text)
    name = write(f"rows.{kind}.{packed}", PACK[packed](text.encode()))
    plain, packed = collected(f"rows.{kind}"), collected(name)
    assert packed[1] == plain[1] == []
    assert [row for _, row in packed[0]] == [row for _, row in plain[0]]
    assert [row for _, row in packed[0]] == (ROWS if "js" in kind else [{"prompt": "one, two", "n": "1"}])
    assert [place.replace(name, f"rows.{kind}") for place, _ in packed[0]] == [place for place, _ in plain[0]]


@pytest.mark.parametrize("packed", PACK)
def test_archives_in_pieces_and_under_other_names(packed):
    half = len(LINES.encode()) // 2
    pieces = PACK[packed](LINES.encode()[:half]) + PACK[packed](LINES.encode()[half:])
    assert read(write(f"rows.jsonl.{packed}", pieces)) == ROWS
    assert read(write("rows.jsonl", PACK[packed](LINES.encode()))) == ROWS  # a download that lost its suffix
    assert read(write(f"plain.jsonl.{packed}", LINES)) == ROWS  # and one that was unpacked on the way


@pytest.mark.parametrize("packed", PACK)
def test_a_damaged_archive_is_one_line(packed):
    whole = PACK[packed](os.urandom(200_000).hex().encode())
    name = write(f"rows.jsonl.{packed}", whole[: len(whole) // 2])
    assert problem(name).startswith(f"{name}: a damaged .{packed} (")
    assert problem(name).endswith("; fetch or write it again")
    write(name, whole[:8] + b"\xff" * 50 + whole[58:])
    assert problem(name).startswith(f"{name}: a damaged .{packed} (")
    write(name, b"\x80\x81\x82")
    assert problem(name) == f"{name}: is not a .{packed} archive, although its name says so; fetch or write it again"


def test_a_compressed_file_is_streamed():
    """A thousandth of a file costs a small part of the memory that the whole would."""
    with gzip.open("rows.jsonl.gz", "wt", compresslevel=1) as file:
        for number in range(200_000):
            file.write(json.dumps({"prompt": str(number) + "x" * 1000}) + "\n")
    code = (
        "import resource; from align_cli.data.load import read_rows; from align_cli.recipe.sections import Source\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(sum(1 for _ in read_rows(Source(path='rows.jsonl.gz'))))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows, kilobytes = map(int, done.stdout.split())
    assert rows == 200_000 and kilobytes < 60_000  # the text has 200 MB


def test_suffixes_that_do_not_tell_what_is_inside():
    for name in ("a.zip", "a.jsonl.tar.gz", "a.tgz"):
        suffix = os.path.splitext(name)[1]
        said = f"{name}: cannot read a '{suffix}' archive; unpack it and name the files or the directory"
        assert problem(write(name, "x")) == said
    assert problem(write("a.gz", "x")) == (
        "a.gz: the format of the compressed file is unknown; add it to the name, e.g. a.jsonl.gz"
    )
    assert problem(write("a", "x")).startswith("a: cannot read a file without a suffix; convert it to one of .json, ")
    parquet("a.parquet", ROWS)
    with open("a.parquet", "rb") as file:
        whole = file.read()
    write("b.parquet.gz", gzip.compress(whole))
    assert problem("b.parquet.gz") == (
        "b.parquet.gz: a Parquet file inside of a .gz file; unpack it, since Parquet is already compressed"
    )
    assert read(write("b.jsonl", whole)) == ROWS  # told by its first bytes


@pytest.mark.parametrize("packed", PACK)
def test_max_bytes_of_a_compressed_file_count_what_is_unpacked(packed):
    rows = [{"text": "x" * 1000, "n": number} for number in range(3000)]
    name = write(f"a.jsonl.{packed}", PACK[packed]("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert read(name, max_bytes=100_000) == rows[: len(read(name, max_bytes=100_000))]
    assert 90 < len(read(name, max_bytes=100_000)) < 110


# directories and globs


def tree(root, *names):
    for name in names:
        write(f"{root}/{name}", json.dumps({"file": name}) + "\n")
    return root


def read_from(path, **keys):
    return [row["file"] for row in read(path, **keys)]


def test_the_shards_of_a_hub_download():
    names = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
    for name in names:
        parquet(f"hub/{name}", [{"file": name}, {"file": name}])
    parquet("hub/data/test-00000-of-00001.parquet", [{"file": "test"}])
    write("hub/README.md", "# rows")
    write("hub/.gitattributes", "*.parquet filter=lfs")
    write("hub/.cache/huggingface/download/data/train-00000-of-00002.parquet.metadata", "1")
    write("hub/dataset_infos.json", "{}")
    rows, problems = collected("hub")
    assert problems == []
    assert [place for place, _ in rows] == [f"hub/{name}#{at}" for name in names for at in (1, 2)]
    assert read_from("hub", split="test") == ["test"]
    assert read_from("hub/data") == [names[0]] * 2 + [names[1]] * 2
    assert problem("hub", split="dev") == "hub: no split 'dev'; set split to one of train, test"


def test_a_directory_that_names_the_wanted_split_in_one_shard():
    write("data/train-00000-of-00002.jsonl", json.dumps({"messages": TURNS}) + "\n")
    assert collected("data") == ([("data/train-00000-of-00002.jsonl:1", {"messages": TURNS})], [])


LAYOUTS = [
    ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"),
    ("data/train_prefs-00000-of-00001.jsonl", "data/train_sft-00000-of-00001.jsonl", "data/b.jsonl"),
    ("default/train/0000.jsonl", "default/train/0001.jsonl", "default/validation/0000.jsonl"),
    ("train.jsonl", "valid.jsonl", "test.jsonl", "notes/other.jsonl"),
    ("harmless-base/train.jsonl", "harmless-base/test.jsonl", "helpful-base/train.jsonl", "red-team/attempts.jsonl"),
    ("my-train-file.jsonl", "my_dev_file.jsonl", "eval.jsonl", "trainer.jsonl"),
    ("training/a.jsonl", "testing/b.jsonl", "train.jsonl"),
    ("part-1.jsonl", "part-2.jsonl", "more/part-3.jsonl"),
    ("train2.jsonl", "val 3.jsonl", "retrain.jsonl"),
    ("split_train_en/a.jsonl", "split_test_en/a.jsonl"),
    ("test.jsonl", "part.jsonl"),
]


@pytest.mark.parametrize("names", LAYOUTS)
def test_splits_are_found_as_datasets_finds_them(names):
    data_files = pytest.importorskip("datasets.data_files")
    root = os.path.abspath(tree("d", *names))
    patterns = data_files.get_data_patterns(root)
    theirs = {
        str(split): sorted({os.path.relpath(str(file), root) for file in listed})
        for split, listed in data_files.DataFilesDict.from_patterns(patterns, root).items()
    }
    assert {split: sorted(listed) for split, listed in by_split(sorted(names)).items()} == theirs
    for split, listed in theirs.items():
        assert read_from("d", split=split) == listed
    assert files(source("d", split=next(iter(theirs)))) == [Path("d", name) for name in next(iter(theirs.values()))]


def test_other_words_for_a_split():
    tree("d", "train.jsonl", "dev.jsonl", "TEST.jsonl")
    for word in ("dev", "valid", "val", "validation"):
        assert read_from("d", split=word) == ["dev.jsonl"]
    assert read_from("d", split="test") == read_from("d", split="eval") == ["TEST.jsonl"]


def test_shards_of_several_kinds_of_rows_are_not_mixed():
    tree("d", "train_prefs-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl", "test_sft-00000-of-00001.jsonl")
    assert problem("d") == "d: no split 'train'; set split to one of test_sft, train_prefs, train_sft"
    assert read_from("d", split="train_prefs") == ["train_prefs-00000-of-00001.jsonl"]


def test_only_other_splits_are_there():
    tree("d", "test.jsonl", "dev/a.jsonl")
    assert problem("d") == "d: no split 'train'; set split to one of validation"
    tree("e", "test.jsonl", "dev.jsonl")
    assert problem("e") == "e: no split 'train'; set split to one of validation, test"
    assert files(source("e")) == []
    with pytest.raises(DataError, match="^e: no split 'train'; set split to one of validation, test$"):
        fingerprint(source("e"))


def test_files_of_several_formats_are_read_in_the_order_of_their_names():
    write("d/c.csv", "file\nc.csv\n")
    write("d/b.jsonl.gz", gzip.compress(b'{"file": "b"}\n'))
    write("d/a.json", '[{"file": "a"}]')
    parquet("d/d.parquet", [{"file": "d"}])
    write("d/notes.txt", "x")
    rows, problems = collected("d")
    assert problems == []
    assert [(place, row["file"]) for place, row in rows] == [
        ("d/a.json#1", "a"),
        ("d/b.jsonl.gz:1", "b"),
        ("d/c.csv:2", "c.csv"),
        ("d/d.parquet#1", "d"),
    ]


def test_a_broken_line_of_a_shard_is_placed_in_its_file():
    write("d/a.jsonl", '{"a": 1}\n{"a": \n{"a": 2}\n')
    write("d/b.jsonl", '{"a": 3}\n')
    rows, problems = collected("d")
    assert [place for place, _ in rows] == ["d/a.jsonl:1", "d/a.jsonl:3", "d/b.jsonl:1"]
    assert problems == ["d/a.jsonl:2: not valid JSON (Expecting value at column 6); correct or remove the line"]


def test_directories_without_rows():
    os.makedirs("empty")
    one_of = "name one of .json, .jsonl, .ndjson, .csv, .tsv, .parquet, or a directory of them"
    assert problem("empty") == f"empty: the directory has no data file (is empty); {one_of}"
    write("d/README.md", "x")
    write("d/sub/notes.txt", "x")
    assert problem("d") == f"d: the directory has no data file (has README.md, sub/notes.txt); {one_of}"
    for name in ("recipe.yaml", "manifest.json", "preferences.jsonl", "metrics.jsonl"):
        write(f"run/{name}", "{}")
    assert problem("run") == (
        "run: is a run; name the file in it that holds the rows: run/metrics.jsonl, run/preferences.jsonl"
    )


def test_links_of_a_hub_cache_are_followed():
    write("cache/blobs/ab", '{"file": "new"}\n')
    write("cache/refs/main", "r2")
    for revision in ("r1", "r2"):
        os.makedirs(f"cache/snapshots/{revision}")
        os.symlink("../../blobs/ab", f"cache/snapshots/{revision}/train.jsonl")
    assert collected("cache") == ([("cache/snapshots/r2/train.jsonl:1", {"file": "new"})], [])
    assert read_from("cache/snapshots/r1") == ["new"]
    os.remove("cache/blobs/ab")
    said = "is a link to ../../blobs/ab, which does not exist; fetch the file again"
    assert problem("cache") == f"cache/snapshots/r2/train.jsonl: {said}"
    assert problem("cache/snapshots/r1/train.jsonl") == f"cache/snapshots/r1/train.jsonl: {said}"


def test_globs_are_expanded_and_sorted():
    tree("d", "b.jsonl", "a.jsonl", "sub/c.jsonl", "sub/test.jsonl", "d.md")
    assert is_local(source("d/*.jsonl"))
    rows, problems = collected("d/*.jsonl")
    assert [place for place, _ in rows] == ["d/a.jsonl:1", "d/b.jsonl:1"] and problems == []
    assert read_from("d/**/*.jsonl") == ["a.jsonl", "b.jsonl", "sub/c.jsonl", "sub/test.jsonl"]
    assert read_from("d/*") == ["a.jsonl", "b.jsonl"]
    assert read_from("d/[b-z].jsonl") == ["b.jsonl"]
    assert read_from("d/**/*.jsonl", split="test") == ["sub/test.jsonl"]
    assert problem("d/*.jsonl", split="test") == "d/*.jsonl: no split 'test'; set split to one of train"
    assert problem("d/x*.jsonl") == (
        "d/x*.jsonl: no file matches (looked in the working directory). Did you mean 'd/b.jsonl'?"
    )
    assert (
        problem("none/*.parquet")
        == "none/*.parquet: no file matches (looked in the working directory); correct the path"
    )
    assert problem("d/*.md").startswith("d/*.md: matches d/d.md, but no readable file; name one of .json,")
    # a file whose name looks like a glob is that file
    write("e[1].jsonl", '{"file": "e"}\n')
    assert read_from("e[1].jsonl") == ["e"]


def test_fingerprints_and_sizes_of_what_is_read():
    tree("d", "train/a.jsonl", "train/b.jsonl", "test/a.jsonl", "README.md")
    listed = [hashlib.sha256(Path(f"d/train/{name}.jsonl").read_bytes()).hexdigest() for name in "ab"]
    expected = hashlib.sha256(f"train/a.jsonl\n{listed[0]}\ntrain/b.jsonl\n{listed[1]}\n".encode()).hexdigest()
    assert fingerprint(source("d")) == expected
    assert [str(file) for file in files(source("d"))] == ["d/train/a.jsonl", "d/train/b.jsonl"]
    write("d/README.md", "another")
    write("d/test/a.jsonl", "another")
    assert fingerprint(source("d")) == expected
    before = fingerprint(source("d/train/*.jsonl"))
    assert before != fingerprint(source("d/train/a*.jsonl"))
    os.rename("d/train/b.jsonl", "d/train/c.jsonl")
    assert fingerprint(source("d")) != expected and fingerprint(source("d/train/*.jsonl")) != before
    packed = write("a.jsonl.gz", gzip.compress(b"{}\n"))
    assert fingerprint(source(packed)) == hashlib.sha256(Path(packed).read_bytes()).hexdigest()
    assert [str(file) for file in files(source(packed))] == [packed]
    assert files(source("org/name")) == files(source("none.jsonl")) == files(source("none/*.jsonl")) == []


def test_max_bytes_of_a_directory_are_shared_by_its_files():
    for number in range(4):
        write(f"d/{number}.jsonl", (json.dumps({"file": number, "text": "x" * 980}) + "\n") * 500)
    taken = read_from("d", max_bytes=100_000)
    assert set(taken) == {0, 1, 2, 3} and 80 < len(taken) < 120


# git-lfs


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv", "rows.json", "rows.jsonl.gz"])
def test_a_git_lfs_pointer_is_named(name):
    assert problem(write(name, POINTER)) == f"{name}: is a git-lfs pointer; run `git lfs pull` there"


def test_git_lfs_pointers_in_a_directory_are_one_line():
    tree("d", "c.jsonl")
    write("d/a.parquet", POINTER)
    assert problem("d") == "d/a.parquet: is a git-lfs pointer; run `git lfs pull` there"
    write("d/b.jsonl", POINTER)
    assert problem("d") == ("d: 2 of 3 files are git-lfs pointers, the first d/a.parquet; run `git lfs pull` there")


# JSON of another shape than the suffix says


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.ndjson"])
def test_an_array_is_read_under_each_suffix(name, indent):
    write(name, json.dumps([{"messages": TURNS}, {"messages": TURNS}], indent=indent))
    rows, problems = collected(name)
    assert problems == []
    assert rows == [(f"{name}#1", {"messages": TURNS}), (f"{name}#2", {"messages": TURNS})]


def test_datasets_reads_the_same_rows_from_arrays_and_lines(tmp_path):
    datasets = pytest.importorskip("datasets")
    write("array.jsonl", json.dumps(ROWS, indent=1))
    write("lines.json", LINES)
    write("packed.jsonl.gz", gzip.compress(LINES.encode()))
    for name in ("array.jsonl", "lines.json", "packed.jsonl.gz"):
        theirs = datasets.load_dataset("json", data_files=name, split="train", cache_dir=str(tmp_path / "cache"))
        assert read(name) == theirs.to_list() == ROWS


@pytest.mark.parametrize("name", ["object.json", "object.jsonl"])
def test_a_single_object_over_several_lines_is_one_line(name):
    write(name, json.dumps({"data": [{"messages": TURNS}], "version": "1"}, indent=1))
    assert problem(name) == (f"{name}: it is a single object; its rows are under 'data': write that list into the file")
    rows = "it is a single object, but rows are expected; write a list of objects, or one object a line"
    write(name, json.dumps({"messages": TURNS}, indent=1))  # a list of turns is not a list of rows
    assert problem(name) == f"{name}: {rows}"
    write(name, json.dumps({"train": [{"a": 1}], "test": [{"a": 1}]}, indent=1))
    assert problem(name) == f"{name}: {rows}"
    write(name, (json.dumps({"a": 1}, indent=1) + "\n") * 3)
    assert problem(name) == f"{name}: its objects are spread over several lines; write one a line, e.g. with `jq -c .`"
    # on one line it is a row
    write(name, json.dumps({"messages": TURNS}))
    assert read(name) == [{"messages": TURNS}]


def test_a_list_has_nothing_behind_it():
    write("a.json", '[{"a": 1}\n]\n{"a": 2}\n')
    assert problem("a.json") == "a.json#2: text after the end of the list; correct the file from there on"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<!DOCTYPE html>\n<html>\n<body>\n</body>\n</html>\n", "'<!DOCTYPE html>' is not valid JSON"),
        ("- a: 1\n- a: 2\n", "'- a: 1' is not valid JSON"),
        ("{'a': 1}\n{'a': 2}\n{'a': 3}\n" * 9, "'{'a': 1}' is not valid JSON"),
        ("\n\n" + "word " * 20 + "\nword\n" * 40, "'word word word word word word word word…' is not valid JSON"),
    ],
)
def test_a_file_of_another_kind_is_one_line(text, shown):
    said = problem(write("a.jsonl", text))
    assert said.startswith("a.jsonl: none of its first ") and said.endswith('; write one {"column": value, …} a line')
    assert shown in said and "\n" not in said


def test_rows_that_are_all_lists_are_one_line():
    write("a.jsonl", (json.dumps(TURNS) + "\n") * 30)
    assert problem("a.jsonl") == (
        'a.jsonl: none of its first 5 rows can be read (the row is a list, not an object); write {"column": value, …}'
    )
    write("a.json", json.dumps(["text"] * 30))
    assert problem("a.json") == (
        'a.json: none of its first 5 rows can be read (the row is a str, not an object); write {"column": value, …}'
    )


def test_broken_lines_keep_their_own_where_a_row_can_be_read():
    write("a.jsonl", "x\n" * 4 + '{"a": 1}\n' + "x\n" * 7)
    rows, problems = collected("a.jsonl")
    assert rows == [("a.jsonl:5", {"a": 1})]
    assert [line.split(": ")[0] for line in problems] == [f"a.jsonl:{at}" for at in (1, 2, 3, 4, *range(6, 13))]
    write("a.jsonl", "x\n")
    assert problem("a.jsonl").startswith("a.jsonl:1: not valid JSON (Expecting value at column 1)")


def test_csv_records_that_all_miss_their_header_are_one_line():
    write("a.csv", "a,b\n" + "one, two, three\n" * 20)
    assert problem("a.csv") == (
        "a.csv: none of its first 5 rows can be read (3 cells under 2 columns); quote cells that hold commas"
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("[" * 100_000, "not valid JSON (nested too deeply)"),
        ("1" * 5000, "not valid JSON (Exceeds the limit (4300 digits) for integer string conversion"),
        ("NaN", "not valid JSON (NaN is not allowed in JSON, null is)"),
        ("-Infinity", "not valid JSON (-Infinity is not allowed in JSON, null is)"),
    ],
)
def test_json_that_python_stumbles_over_is_one_line(name, value, found):
    good = '{"a": 1}'
    broken = f'{{"a": {value}}}'
    array = name == "a.json"
    write(name, f"[{good},\n{broken}]" if array else f"{good}\n{broken}\n")
    said = problem(name)
    assert said.startswith(f"{name}{'#' if array else ':'}2: {found}")
    assert (
        said.endswith("correct the file from this row on" if array else "correct or remove the line")
        and len(said) < 200
    )


def test_a_broken_array_is_not_read_to_its_end(monkeypatch):
    """What comes after a broken row cannot correct it, unless it is cut."""
    from align_cli.data import rows as module

    monkeypatch.setattr(module, "CHUNK", 64)
    write("a.json", json.dumps([{"text": 'a "b" \\ é ☃' * n, "n": -1.5e3, "null": None} for n in range(60)]))
    assert len(read("a.json")) == 60
    write("a.json", '[{"a": 1}, {"a" 2}, ' + '{"a": 3}, ' * 10_000)
    assert problem("a.json").startswith("a.json#2: not valid JSON (Expecting ':' delimiter)")


# encodings and line ends


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_encodings_by_their_byte_order_mark(kind, encoding):
    text = {"jsonl": LINES + "\r\n \r\n" + LINES, "json": json.dumps(ROWS, ensure_ascii=False, indent=1)}.get(
        kind, 'prompt,n\r\n"é\nü",1\r\n☃,2\r\n'
    )
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    rows, problems = collected(write(f"a.{kind}", mark + text, encoding))
    assert problems == []
    if kind == "jsonl":
        assert [row for _, row in rows] == ROWS * 2
        assert rows[0][0] == "a.jsonl:1" and rows[40][0] == "a.jsonl:43"
    elif kind == "json":
        assert [row for _, row in rows] == ROWS
    else:
        assert rows == [("a.csv:2", {"prompt": "é\nü", "n": "1"}), ("a.csv:4", {"prompt": "☃", "n": "2"})]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_another_encoding_is_one_line(kind):
    rows = [{"a": "plain"}] + [{"a": "é"}] * 50
    text = "a\n" + "plain\n" * 8 + "é\n" * 50
    if kind != "csv":
        text = json.dumps(rows, ensure_ascii=False, indent=0).replace("\n", "")
    if kind == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    said = problem(write(f"a.{kind}", text, "latin-1"))
    line, column = {"jsonl": (2, 8), "json": (1, 24), "csv": (10, 1)}[kind]
    assert said == (
        f"a.{kind}:{line}: not UTF-8 (byte 0xe9 at column {column}); save the file as UTF-8, e.g. "
        "`iconv -f WINDOWS-1252 -t UTF-8`"
    )
    said = problem(write(f"a.{kind}", text, "utf-16-le"))
    assert said.startswith(f"a.{kind}: not UTF-8 text, it holds zero bytes (UTF-16 without")
    said = problem(write(f"a.{kind}", text.encode("utf-16")[:-1]))
    assert said.startswith(f"a.{kind}: not UTF-16") and said.endswith("; save it as UTF-8")


def test_windows_line_ends():
    write("a.jsonl", '{"a": "x\\r\\ny"}\r\n\r\n{"a": 2}\r\n')
    assert collected("a.jsonl") == ([("a.jsonl:1", {"a": "x\r\ny"}), ("a.jsonl:3", {"a": 2})], [])
    write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2')
    assert collected("a.jsonl")[1] == [
        "a.jsonl:2: not valid JSON (Expecting ',' delimiter at column 8); correct or remove the line"
    ]


# CSV


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_the_delimiter_is_told_by_the_header(delimiter, suffix, tmp_path):
    rows = [["a, b", "b;c", "c"], ["1,2;3\t4", 'say "hi"', "two\nlines; or, three"], ["", "é", "x"]]
    opened = gzip.open if suffix.endswith("gz") else open
    with opened(f"a.{suffix}", "wt", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(rows)
    found, problems = collected(f"a.{suffix}")
    assert problems == []
    assert [row for _, row in found] == [dict(zip(rows[0], cells, strict=True)) for cells in rows[1:]]
    assert [place for place, _ in found] == [f"a.{suffix}:2", f"a.{suffix}:4"]
    pandas = pytest.importorskip("pandas")
    theirs = pandas.read_csv(f"a.{suffix}", sep=delimiter, keep_default_na=False, dtype=str)
    assert [row for _, row in found] == theirs.to_dict("records")


def test_of_equal_delimiters_the_comma_wins():
    write("a.csv", "a,b;c\n1,2\n")
    assert read("a.csv") == [{"a": "1", "b;c": "2"}]
    write("a.csv", "prompt\n1;2\n")
    assert read("a.csv") == [{"prompt": "1;2"}]
    write("a.csv", '"a,b,c";d\n1;2,3,4,5\n')
    assert read("a.csv") == [{"a,b,c": "1", "d": "2,3,4,5"}]


def test_tsv_is_split_at_tabs_alone():
    write("a.tsv", "a, b, c\tn\none, two\t1\n\nthree\n")
    rows, problems = collected("a.tsv")
    assert rows == [("a.tsv:2", {"a, b, c": "one, two", "n": "1"})]
    assert problems == ["a.tsv:4: 1 cell under 2 columns; quote cells that hold tabs"]
    write("a.csv", "a;b\n1;2\n1;2;3\n")
    assert problem("a.csv") == "a.csv:3: 3 cells under 2 columns; quote cells that hold semicolons"


def test_blank_lines_before_a_csv_header():
    write("a.csv", "\n\r\na;b\n1;2\n")
    assert collected("a.csv") == ([("a.csv:4", {"a": "1", "b": "2"})], [])


def test_a_quote_that_never_closes_is_no_silent_loss():
    write("a.csv", 'a,b\n1,2\n3,"four\n5,6\n7,8\n')
    rows, problems = collected("a.csv")
    assert rows == [("a.csv:2", {"a": "1", "b": "2"})]
    assert problems == ["a.csv:3: a quote opens a cell and never closes; close it, or double quotes inside of cells"]
    write("a.csv", 'a,b\n1,5" wide\n3,"four"')
    assert read("a.csv") == [{"a": "1", "b": '5" wide'}, {"a": "3", "b": "four"}]


# paths


def test_paths_that_cannot_be_opened_are_one_line():
    os.mkdir("data")
    long = "n" * 300 + ".jsonl"
    for path in (long, f"data/{long}"):
        assert problem(path) == f"{path}: cannot be read (File name too long); correct the path or its permissions"
    assert problem("a\0b.jsonl").startswith("a\0b.jsonl: no such file")
    write("a.jsonl", "{}")
    assert problem("a.jsonl/b.jsonl").startswith("a.jsonl/b.jsonl: no such file")
    assert problem("~nobody-of-this-name/a.jsonl").startswith("~nobody-of-this-name/a.jsonl: no such file")
    os.mkfifo("pipe.jsonl")
    said = "is a pipe or a device, but rows are read twice; save them to a file"
    assert problem("pipe.jsonl") == f"pipe.jsonl: {said}"
    assert problem("/dev/null") == f"/dev/null: {said}"
    assert problem("/proc/self/mem").startswith("/proc/self/mem: cannot read a file without a suffix; convert it to")
    os.symlink("/proc/self/mem", "mem.jsonl")
    assert problem("mem.jsonl") == "mem.jsonl: cannot be read (Input/output error); correct the file or its permissions"
    os.symlink("loop.jsonl", "loop.jsonl")
    assert "\n" not in problem("loop.jsonl")
    os.symlink("gone.jsonl", "link.jsonl")
    assert problem("link.jsonl") == ("link.jsonl: is a link to gone.jsonl, which does not exist; fetch the file again")
    for path in (long, "pipe.jsonl", "loop.jsonl"):
        with pytest.raises(DataError):
            fingerprint(source(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_one_line():
    write("a.jsonl", "{}")
    os.chmod("a.jsonl", 0)
    assert problem("a.jsonl") == "a.jsonl: cannot be read (Permission denied); correct the file or its permissions"


def test_nothing_heavy_is_imported_for_files_of_text():
    tree("d", "train.jsonl", "test.jsonl")
    write("d/more/train.csv", "file\nx\n")
    write("p.jsonl.xz", lzma.compress(b'{"file": 1}\n'))
    code = (
        "import sys; from align_cli.data.load import files, fingerprint, read_rows\n"
        "from align_cli.recipe.sections import Source\n"
        "for path in ('d', 'd/*.jsonl', 'p.jsonl.xz'):\n"
        "    source = Source(path=path); list(read_rows(source)), files(source), fingerprint(source)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_folder_of_a_directory_is_read_alone():
    for part in ("harmless", "helpful"):
        for split in ("train", "test"):
            write(f"d/{part}/{split}.jsonl", json.dumps({"file": f"{part} {split}"}) + "\n")
    assert read_from("d", data_dir="harmless") == ["harmless train"]
    assert read_from("d", data_dir="helpful", split="test") == ["helpful test"]
    assert fingerprint(source("d", data_dir="harmless")) != fingerprint(source("d", data_dir="helpful"))
    refs = {"refs/main": "abc", "snapshots/abc/harmless/train.jsonl": '{"file": "cached"}\n'}
    for name, text in refs.items():
        write(f"cache/{name}", text)
    assert read_from("cache", data_dir="harmless") == ["cached"]


@pytest.mark.parametrize(
    ("path", "keys", "said"),
    [
        ("d", {"data_dir": "b"}, "d: no directory 'b' (has a); correct data_dir"),
        ("d", {"data_dir": "../e"}, "d: data_dir '../e' leads out of it; name a folder below it"),
        ("d", {"data_dir": "/e"}, "d: data_dir '/e' leads out of it; name a folder below it"),
        ("d/*.jsonl", {"data_dir": "a"}, "d/*.jsonl: is a glob, so it has no data_dir; write the folder into the glob"),
        ("d/x.jsonl", {"data_dir": "a"}, "d/x.jsonl: is not a directory, so it has no data_dir; remove data_dir"),
        ("d", {"subset": "s"}, "d: subset 's' is for hub ids; name the subset's folder with data_dir, or its files"),
        ("d/x.jsonl", {"revision": "v1"}, "d/x.jsonl: revision 'v1' is for hub ids; remove it"),
    ],
)
def test_parts_that_a_local_source_cannot_have(path, keys, said):
    write("d/x.jsonl", '{"prompt": "p"}\n')
    write("d/a/x.jsonl", '{"prompt": "p"}\n')
    assert problem(path, **keys) == said
