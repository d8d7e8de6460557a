"""What a finished run says about itself, and what it still finds true."""

import hashlib
import json
from pathlib import Path

import pytest

from align_cli.run import manifest
from align_cli.run.directory import RunDirectory


@pytest.fixture
def run(here):
    made = RunDirectory("runs/t/dpo")
    made.path.mkdir(parents=True)
    made.recipe.write_text("name: t\n")
    (made.path / "model.safetensors").write_bytes(b"weights")
    (made.path / ".lock").write_text("1")
    made.checkpoints.mkdir()
    return made


def write(run, **more):
    given = {"stage": "dpo", "name": "t", "seed": 7, "parents": [], "data": [], "metrics": {"loss": 0.5}}
    return manifest.write(run, **given | {"world_size": 2, "zero_stage": 3, "started": "2026-01-01T00:00:00Z"} | more)


def weights(path, values=b"\0" * 16):
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    head = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + values)
    (folder / "config.json").write_text("{}")
    return str(folder)


def test_every_key_of_the_contract_is_there(run):
    made = write(run, extra={"base": "x"})
    assert json.loads(run.manifest.read_text()) == made == manifest.read(run.path)
    promised = "stage name status recipe_sha256 parents data files metrics world_size zero_stage seed versions"
    assert set(made) == {*promised.split(), "started", "finished", "base"}
    assert made["status"] == "complete" and run.state() == "finished"
    assert (made["world_size"], made["zero_stage"], made["seed"]) == (2, 3, 7)
    assert {"torch", "transformers", "trl", "deepspeed"} <= set(made["versions"])
    assert made["started"] < made["finished"]


def test_hashes_are_those_of_the_files(run):
    made = write(run)
    assert made["recipe_sha256"] == hashlib.sha256(b"name: t\n").hexdigest()
    assert made["files"] == {
        "model.safetensors": {"sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 7},
        "recipe.yaml": {"sha256": made["recipe_sha256"], "bytes": 8},
    }


def test_files_of_subdirectories_count_but_for_checkpoints_hidden_ones_and_runs_of_their_own(run):
    for name in ("value/model.safetensors", "base/a/b.json", "checkpoints/checkpoint-1/x", ".cache/x", "value/.part"):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_bytes(b"x")
    for name in ("recipe.yaml", "manifest.json", "model.safetensors"):
        (run.path / "round-1").mkdir(exist_ok=True)
        (run.path / "round-1" / name).write_text("{}")
    made = write(run)
    assert set(made["files"]) == {"recipe.yaml", "model.safetensors", "value/model.safetensors", "base/a/b.json"}
    assert made["files"]["value/model.safetensors"] == {"sha256": hashlib.sha256(b"x").hexdigest(), "bytes": 1}
    assert manifest.missing_files(run, made) == []
    (run.path / "value/model.safetensors").unlink()
    assert manifest.missing_files(run, made) == ["value/model.safetensors is gone or was changed"]


def test_inputs_are_those_of_the_start_once_the_run_has_begun(run):
    run.checkpoints.rmdir()
    assert manifest.inputs(run) is None
    # an attempt that ended before anything rests on its inputs does not bind the next one
    assert manifest.keep_inputs(run, {"parents": [1]}) == {"parents": [1]}
    assert manifest.keep_inputs(run, {"parents": [2]}) == {"parents": [2]}
    run.checkpoints.mkdir()
    assert manifest.keep_inputs(run, {"parents": [3]}) == {"parents": [2]} == manifest.inputs(run)
    write(run)
    assert manifest.inputs(run) is None and not list(run.path.glob(".inputs*"))


def test_what_cannot_be_read_is_none(here):
    assert manifest.read("nowhere") is None
    Path("manifest.json").write_text('{"stage": ')
    assert manifest.read(".") is None


def test_a_parent_is_a_run_a_directory_or_a_name(run):
    made = write(run)
    assert manifest.parent("policy", "runs/t/dpo") == {
        "role": "policy",
        "path": "runs/t/dpo",
        "manifest_sha256": hashlib.sha256(run.manifest.read_bytes()).hexdigest(),
    }
    plain = manifest.parent("reference", weights("models/x"))
    assert plain["manifest_sha256"] is None and len(plain["fingerprint"]) == 64
    assert manifest.parent("policy", "org/name")["fingerprint"] is None
    assert manifest.changed_parents(made) == []


def test_a_parent_directory_that_changed_or_went(run):
    made = write(run, parents=[manifest.parent("policy", weights("models/x")), manifest.parent("reference", "org/m")])
    assert manifest.changed_parents(made) == []
    weights("models/x", b"\0" * 15 + b"\1")
    assert manifest.changed_parents(made) == ["policy models/x has changed since"]
    Path("models/x").rename("models/y")
    assert manifest.changed_parents(made) == ["policy models/x is gone"]


def test_the_run_in_whose_directory_data_lies(run):
    write(run)
    (run.path / "samples.jsonl").write_text("")
    assert manifest.run_of("runs/t/dpo/samples.jsonl") == "runs/t/dpo"
    assert manifest.run_of("runs/t/other.jsonl") is None


def test_files_that_went_or_grew(run):
    made = write(run)
    assert manifest.missing_files(run, made) == []
    (run.path / "model.safetensors").write_bytes(b"weights and more")
    run.recipe.unlink()
    assert manifest.missing_files(run, made) == [
        "model.safetensors is gone or was changed",
        "recipe.yaml is gone or was changed",
    ]


def test_what_two_recipes_differ_in():
    old = {"a": {"b": 1, "c": [1, 2]}, "launch": {"num_gpus": 1}, "force": True, "gone": None, "lora": None}
    new = {"a": {"b": 1, "c": [2, 1]}, "launch": {"num_gpus": 2}, "force": False, "lora": {"r": 8}, "new": "é"}
    assert manifest.differing_keys(old, new) == [
        "a.c [1, 2] → [2, 1]",
        'lora null → {"r": 8}',
        'new null → "\\u00e9"',
    ]
    assert manifest.differing_keys(old, old) == []
    # only the keys at the top are loose
    assert manifest.differing_keys({"zero": {"force": 1}}, {"zero": {"force": 2}}) == ["zero.force 1 → 2"]
