"""The tree above a run, from manifests written by hand."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from align_cli.errors import UpstreamError
from align_cli.report import lineage
from align_cli.run import manifest

EMPTY = (2).to_bytes(8, "little") + b"{}"
"""A safetensors file without tensors."""


def run(path, stage, parents=(), data=(), status="complete", **metrics):
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text("name: t\n")
    entries = [manifest.parent(role, above) for role, above in parents]
    made = {"stage": stage, "status": status, "finished": "2026-01-02T03:04:05Z", "parents": entries}
    (folder / "manifest.json").write_text(json.dumps(made | {"data": list(data), "metrics": metrics}))


def model(path):
    Path(path).mkdir(parents=True)
    (Path(path) / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (Path(path) / "model.safetensors").write_bytes(EMPTY)


def drawn(path):
    console = Console(record=True, width=200, file=io.StringIO())
    fresh = lineage.show(path, console)
    return fresh, console.export_text().splitlines()


@pytest.fixture
def chain(here):
    model("models/base")
    rows = {"source": "sft.jsonl", "rows_used": 90, "dropped": {"empty response": 7, "too long": 3}}
    run("runs/t/sft", "sft", [("policy", "models/base")], [rows], loss=1.23456, other=9)
    pairs = {"source": "org/pairs", "rows_used": 50, "dropped": {}}
    above = [("policy", "runs/t/sft"), ("reference", "runs/t/sft"), ("reward", "org/rm")]
    run("runs/t/dpo", "dpo", above, [pairs], loss=0.5, **{"eval_rewards/accuracies": 0.75})


def test_the_tree(chain):
    fresh, lines = drawn("runs/t/dpo")
    assert fresh
    assert [line.rstrip() for line in lines] == [
        "runs/t/dpo  dpo, complete 2026-01-02T03:04:05Z · loss 0.5 · eval_rewards/accuracies 0.75",
        "├── policy    runs/t/sft  sft, complete 2026-01-02T03:04:05Z · loss 1.235",
        "│   ├── policy    models/base  model directory",
        "│   └── data      sft.jsonl  90 rows, 10 dropped",
        "├── reference runs/t/sft  sft, complete 2026-01-02T03:04:05Z · loss 1.235",
        "│   ├── policy    models/base  model directory",
        "│   └── data      sft.jsonl  90 rows, 10 dropped",
        "├── reward    org/rm  hub id",
        "└── data      org/pairs  50 rows, 0 dropped",
    ]


def test_a_parent_that_was_made_anew(chain):
    run("runs/t/sft", "sft", [("policy", "models/base")], loss=9.0)
    fresh, lines = drawn("runs/t/dpo")
    assert not fresh
    (line,) = [line for line in lines if "policy    runs/t/sft" in line]
    assert line.rstrip().endswith("← has changed since")
    assert lines[-2:] == [
        "stale: runs/t/dpo: its policy runs/t/sft has changed since",
        "stale: runs/t/dpo: its reference runs/t/sft has changed since",
    ]


def test_a_change_two_runs_above_is_found(chain):
    Path("models/base/model.safetensors").write_bytes(EMPTY + b"y")
    fresh, lines = drawn("runs/t/dpo")
    assert not fresh and "stale: runs/t/sft: its policy models/base has changed since" in lines


def test_a_parent_that_is_gone(chain):
    Path("runs/t/sft").rename("runs/t/moved")
    fresh, lines = drawn("runs/t/dpo")
    assert not fresh
    assert any("policy    runs/t/sft  gone  ← is gone" in line for line in lines)
    assert "stale: runs/t/dpo: its policy runs/t/sft is gone" in lines


def test_an_unfinished_run_has_no_tree_yet(here):
    Path("runs/t/sft").mkdir(parents=True)
    Path("runs/t/sft/recipe.yaml").write_text("name: t\n")
    assert drawn("runs/t/sft") == (True, ["runs/t/sft  unfinished"])


def test_runs_that_name_each_other_end(here):
    run("a", "sft", [("policy", "b")])
    run("b", "sft", [("policy", "a")])
    assert sum("policy" in line and "──" in line for line in drawn("a")[1]) == 2


@pytest.mark.parametrize(("text", "said"), [('{"sta', "unfinished"), ("[]", "unfinished"), ("{}", "?, ? ?")])
def test_a_manifest_that_is_torn_or_not_ours(here, text, said):
    run("runs/t/sft", "sft")
    Path("runs/t/sft/manifest.json").write_text(text)
    assert drawn("runs/t/sft") == (True, [f"runs/t/sft  {said}"])


def test_what_is_no_run(chain):
    with pytest.raises(UpstreamError, match="runs/none: no such run"):
        drawn("runs/none")
    with pytest.raises(UpstreamError, match="models/base: is not a run"):
        drawn("models/base")


def test_brackets_are_letters(here):
    model("models/x")
    run("runs/t[old]/sft", "sft", [("policy", "models/x")])
    Path("models/x/model.safetensors").write_bytes(EMPTY + b"y")
    lines = drawn("runs/t[old]/sft")[1]
    assert lines[0].startswith("runs/t[old]/sft")
    assert lines[-1] == "stale: runs/t[old]/sft: its policy models/x has changed since"
