"""`samples`: the file of prompts is read as data files are, and what is wrong with it is found before a run."""

import gzip
import json
import subprocess
import sys
from decimal import Decimal

import project
import pytest
from project import align, ok

from align_cli.data.prompts import sample_prompts
from align_cli.errors import DataError
from align_cli.recipe.sections import Samples

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, text, encoding="utf-8"):
    with open(path, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def rows(prompts):
    return sample_prompts(Samples(prompts=prompts))


def refused(prompts):
    with pytest.raises(DataError) as raised:
        rows(prompts)
    return list(raised.value.lines)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", '[{"prompt": "Hi"}, {"prompt": "é"}]'),
        ("p.jsonl", '\ufeff{"prompt": "Hi"}\n\n{"prompt": "é"}\n'),
        ("p.json", '{"prompt": "Hi"}\n{"prompt": "é"}\n'),
        ("p.csv", "prompt\nHi\né\n"),
        ("p.tsv", "\ufeffprompt\nHi\né\n"),
        ("q.jsonl", '{"question": "Hi"}\n{"question": "é"}\n'),
        ("q.csv", "instruction\nHi\né\n"),
        ("p.jsonl.gz", gzip.compress('{"prompt": "Hi"}\n{"prompt": "é"}\n'.encode(), mtime=0)),
    ],
)
def test_files_of_every_shape(name, text):
    assert rows(write(name, text)) == [{"prompt": "Hi"}, {"prompt": "é"}]


def test_utf_16_directories_and_lists():
    assert rows(write("p.jsonl", '{"prompt": "é"}\n', "utf-16")) == [{"prompt": "é"}]
    assert rows(["Hi", "Ho"]) == [{"prompt": "Hi"}, {"prompt": "Ho"}]
    assert rows("*.jsonl") == rows(".") == [{"prompt": "é"}]


def test_other_columns_go_along_and_prompt_comes_before_question():
    write("p.jsonl", '{"id": 7, "question": "Q", "prompt": "P"}\n{"id": 8, "prompt": "R", "tags": ["a"]}\n')
    assert rows("p.jsonl") == [{"prompt": "P", "id": 7, "question": "Q"}, {"prompt": "R", "id": 8, "tags": ["a"]}]
    write("q.jsonl", '{"instruction": "I", "input": "with this", "id": 1}\n{"instruction": "J", "input": ""}\n')
    assert rows("q.jsonl") == [
        {"prompt": "I\n\nwith this", "input": "with this", "id": 1},
        {"prompt": "J", "input": ""},
    ]


def test_a_prompt_may_be_messages():
    assert rows(write("p.jsonl", json.dumps({"prompt": TURNS}) + "\n")) == [{"prompt": TURNS}]
    cell = json.dumps(TURNS).replace('"', '""')
    assert rows(write("p.csv", f'prompt,n\n"{cell}",1\n"[{{not JSON",2\n')) == [
        {"prompt": TURNS, "n": "1"},
        {"prompt": "[{not JSON", "n": "2"},
    ]
    # in JSON a string is a string
    assert rows(write("p.jsonl", json.dumps({"prompt": json.dumps(TURNS)}))) == [{"prompt": json.dumps(TURNS)}]


def test_parquet_cells_that_json_does_not_know_become_text():
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([{"prompt": TURNS, "price": Decimal("1.5"), "n": 2}]), "p.parquet")
    assert rows("p.parquet") == [{"prompt": TURNS, "price": "1.5", "n": 2}]


def test_columns_that_are_missing_are_named_once():
    write("p.jsonl", '{"promt": "Hi", "id": 1}\n' * 3)
    wanted = "samples.prompts: p.jsonl: no column 'prompt', 'question' or 'instruction'"
    assert refused("p.jsonl") == [f"{wanted}. Did you mean 'promt'? rename the column that holds the prompts"]
    write("p.jsonl", '{"text": "Hi"}\n' * 3)
    assert refused("p.jsonl") == [f"{wanted}; rename the column that holds the prompts"]


def test_every_wrong_prompt_is_named_with_its_place():
    bad = ["", " \n", [], None, 7, [{"role": "user", "content": " "}], [{"role": "nobody", "content": "x"}], ["x"]]
    write("p.jsonl", "".join(json.dumps({"prompt": value}) + "\n" for value in ["good", *bad]) + '{"id": 1}\n{"a"\n')
    lines = refused("p.jsonl")
    assert [line.split(": ")[1] for line in lines] == ["p.jsonl:11", *[f"p.jsonl:{at}" for at in range(2, 11)]]
    empty, missing = "is empty; write a prompt or remove the row", "is missing or null; add it or remove the row"
    said = [line.split(": ", 2)[2] for line in lines[1:]]
    assert said[:4] == [f"'prompt' {empty}"] * 3 + [f"'prompt' {missing}"]
    assert said[4].startswith("'prompt' is a number; it must be a string or a list of")
    assert said[5] == f"'prompt' {empty}"
    assert "'nobody'" in said[6] and said[7].startswith("turn 1 of 'prompt' is a string")
    assert said[8] == f"'prompt' {missing}"
    assert all("\n" not in line for line in lines)


def test_many_wrong_prompts_are_cut_short():
    write("p.csv", "prompt,n\n" + ",1\n" * 50)
    lines = refused("p.csv")
    assert len(lines) == 21 and lines[-1] == "samples.prompts: p.csv: … and 30 more"


def test_files_that_are_not_there_or_are_empty():
    assert refused("none.jsonl") == [
        "samples.prompts: none.jsonl: no such file (looked in the working directory); correct the path"
    ]
    said = "no such file; name one with a `prompt` column, or list prompts"
    assert refused("org/name") == [f"samples.prompts: org/name: {said}"]
    assert refused(write("p.jsonl", "\n")) == ["samples.prompts: holds no prompts; write some, or leave samples out"]
    assert refused([]) == ["samples.prompts: holds no prompts; write some, or leave samples out"]
    assert refused(["Hi", " "]) == ["samples.prompts[1]: the prompt is empty; write one or remove it"]
    write("p.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 8\n")
    assert refused("p.jsonl") == ["samples.prompts: p.jsonl: is a git-lfs pointer; run `git lfs pull` there"]


def test_half_a_character_is_refused():
    write("p.jsonl", '{"prompt": "Cut \\ud83d here"}\n')
    (line,) = refused("p.jsonl")
    assert line == "samples.prompts: p.jsonl:1: holds half of a surrogate pair ('\\ud83d'); correct the row"


def test_torch_is_not_imported():
    write("p.csv", "prompt\nHi\n")
    code = (
        "import sys; from align_cli.data.prompts import sample_prompts; from align_cli.recipe.sections import Samples\n"
        "print(sample_prompts(Samples(prompts='p.csv')), sorted({'torch', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[{'prompt': 'Hi'}] []\n"


def test_check_refuses_and_a_run_answers(tmp_path):
    """Shapes that runs used to fail on after training had begun."""
    home = project.build(tmp_path, rows=8)
    write(home / "prompts.json", '[{"prompt": "Hi"}]')
    write(home / "bom.jsonl", '\ufeff{"prompt": "Hi"}\n')
    write(home / "question.jsonl", '{"question": "Hi", "id": 3}\n')
    write(home / "text.jsonl", '{"text": "Hi"}\n')
    write(home / "shapes.jsonl", '{"prompt": "Hi"}\n{"prompt": {"a": 1}}\n')
    for name in ("prompts.json", "bom.jsonl", "question.jsonl"):
        ok("check", "sft", "recipe=t", f"samples={name}", cwd=home)
    for name, said in (
        ("text.jsonl", "samples.prompts: text.jsonl: no column 'prompt', 'question' or 'instruction'"),
        ("shapes.jsonl", "samples.prompts: shapes.jsonl:2: 'prompt' is an object; it must be a string or a list"),
    ):
        done = align("check", "sft", "recipe=t", f"samples={name}", cwd=home)
        assert done.returncode == 2 and done.stderr.startswith(said) and len(done.stderr.splitlines()) == 1
    ok("sft", "recipe=t", "samples={prompts: question.jsonl, max_new_tokens: 4}", "trainer.max_steps=1", cwd=home)
    (row,) = map(json.loads, (home / "runs" / "t" / "sft" / "samples.jsonl").read_text().splitlines())
    assert (row["prompt"], row["id"]) == ("Hi", 3) and {"before", "after"} <= set(row)
