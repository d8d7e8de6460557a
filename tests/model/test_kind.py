"""What a path holds, read from small files only."""

import json
from pathlib import Path

import pytest

from align_cli.model import kind


def safetensors(file, values=b"\0" * 24, **shapes):
    """A safetensors file of float32 tensors, written by hand."""
    shapes = shapes or {"a": [2, 3]}
    head, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head).encode()
    Path(file).write_bytes(len(text).to_bytes(8, "little") + text + values.ljust(at, b"\0"))


@pytest.fixture
def folder(here):
    def make(name, architecture=None, adapter=None, files=(), weights=False, **json_files):
        path = here / name
        path.mkdir(parents=True)
        if architecture:
            (path / "config.json").write_text(json.dumps({"architectures": [architecture], "hidden_size": 8}))
        if adapter is not None:
            (path / "adapter_config.json").write_text(json.dumps(adapter))
        for file, tree in json_files.items():
            (path / f"{file}.json").write_text(json.dumps(tree))
        for file in files:
            (path / file).write_text("")
        if weights:
            safetensors(path / "model.safetensors")
        return name

    return make


def test_a_causal_model_brings_its_config(folder):
    held = kind.look(folder("lm", "MistralForCausalLM", weights=True))
    assert (held.kind, held.config["hidden_size"], held.base, held.reward) == ("causal-lm", 8, None, False)


def test_a_reward_model(folder):
    assert kind.look(folder("rm", "MistralForSequenceClassification", weights=True)).kind == "reward-model"


def test_an_adapter_with_a_base_and_without(folder):
    held = kind.look(folder("a", adapter={"base_model_name_or_path": "models/x", "task_type": "CAUSAL_LM"}))
    assert (held.kind, held.base, held.reward) == ("adapter", "models/x", False)
    held = kind.look(folder("b", adapter={}))
    assert (held.kind, held.base) == ("adapter", None)


def test_a_reward_adapter(folder):
    held = kind.look(folder("a", adapter={"base_model_name_or_path": "x", "task_type": "SEQ_CLS"}))
    assert held.kind == "adapter" and held.reward


def test_an_adapter_in_a_model_directory_is_an_adapter(folder):
    assert kind.look(folder("a", "LlamaForCausalLM", adapter={}, weights=True)).kind == "adapter"


@pytest.mark.parametrize(("manifest", "expected"), [({"status": "running"}, "unfinished"), (None, "unfinished")])
def test_a_run_without_its_last_word(folder, manifest, expected):
    more = {"manifest": manifest} if manifest else {}
    name = folder("runs/a/sft", "LlamaForCausalLM", files=["recipe.yaml"], weights=True, **more)
    assert kind.look(name).kind == expected


def test_a_finished_run_is_the_model_in_it(folder):
    done = {"manifest": {"status": "complete"}}
    assert kind.look(folder("a", "LlamaForCausalLM", files=["recipe.yaml"], weights=True, **done)).kind == "causal-lm"
    assert kind.look(folder("b", adapter={}, files=["recipe.yaml"], **done)).kind == "adapter"


def test_an_unfinished_run_of_an_adapter(folder):
    assert kind.look(folder("runs/a/sft", adapter={}, files=["recipe.yaml"])).kind == "unfinished"


@pytest.mark.parametrize(
    ("given", "finding"),
    [
        ({"architecture": "X", "files": ["pytorch_model.bin"]}, "holds pytorch_model.bin but no safetensors"),
        ({"architecture": "X"}, "holds no weights"),
        ({"weights": True}, "holds no config.json"),
        ({}, "holds no config.json"),
    ],
)
def test_what_cannot_serve_says_why(folder, given, finding):
    held = kind.look(folder("odd", **given))
    assert (held.kind, held.finding) == ("other", finding)


def test_a_file_is_no_model(here):
    Path("model.gguf").write_text("")
    held = kind.look("model.gguf")
    assert (held.kind, held.finding) == ("other", "is a file, not a model directory")


def test_a_config_that_is_no_mapping(folder):
    held = kind.look(folder("odd", weights=True, config=[1]))
    assert (held.kind, held.finding) == ("other", "its config.json is not a JSON object")


@pytest.mark.parametrize("architectures", [None, [], [1], "LlamaForCausalLM", {}])
def test_a_config_that_names_no_architecture(folder, architectures):
    assert kind.look(folder("odd", weights=True, config={"architectures": architectures})).kind == "causal-lm"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "adapter_model.safetensors", "config.json", "adapter_config.json"]
)
def test_a_git_lfs_pointer(folder, file):
    adapter = {"base_model_name_or_path": "x"} if file.startswith("adapter") else None
    name = folder("lm", "LlamaForCausalLM", weights=True, adapter=adapter)
    (Path(name) / file).write_bytes(POINTER)
    held = kind.look(name)
    assert (held.kind, held.finding) == ("other", f"{file} is a git-lfs pointer")
    assert held.remedy == "run `git lfs pull` there"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\1\0\0",
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"[]",
        (8).to_bytes(8, "little") + b"{",
        (8).to_bytes(8, "little") + b'{"a": 1}',
    ],
)
def test_weights_that_were_not_written_whole(folder, text):
    name = folder("lm", "LlamaForCausalLM")
    (Path(name) / "model.safetensors").write_bytes(text)
    held = kind.look(name)
    assert (held.kind, held.finding) == ("other", "model.safetensors is not a complete safetensors file")
    with pytest.raises(ValueError, match=r"header|Expecting"):
        kind.header(Path(name) / "model.safetensors")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("gpt2", "hub"),
        ("mistralai/Mistral-7B-v0.1", "hub"),
        ("org/name.with-dots_1", "hub"),
        ("./gpt2", "missing"),
        ("../x/y", "missing"),
        ("/abs/x", "missing"),
        ("runs/zephyr", "missing"),
        ("models/x", "missing"),
        ("mine/x", "missing"),
        ("a/b/c", "missing"),
        ("no such thing", "missing"),
    ],
)
def test_what_is_not_here_is_a_hub_id_or_missing(here, path, expected):
    Path("mine").mkdir()
    assert kind.look(path).kind == expected


def test_parameters_are_counted_over_all_files_and_scalars_are_one(here):
    Path("m").mkdir()
    safetensors("m/model-1.safetensors", a=[3, 4], b=[5])
    safetensors("m/model-2.safetensors", c=[2, 2, 2], d=[])
    assert kind.parameters("m") == 12 + 5 + 8 + 1
    assert set(kind.header(Path("m/model-1.safetensors"))) == {"__metadata__", "a", "b"}
    assert kind.parameters("nowhere") is None


def test_a_fingerprint_knows_one_changed_value_and_the_config(here):
    Path("m").mkdir()
    safetensors("m/model.safetensors")
    first = kind.fingerprint("m")
    safetensors("m/model.safetensors", b"\0" * 20 + b"\0\0\x80\x3f")
    second = kind.fingerprint("m")
    Path("m/config.json").write_text("{}")
    third = kind.fingerprint("m")
    assert len({first, second, third}) == 3
    Path("m/notes.txt").write_text("not the model")
    assert kind.fingerprint("m") == third
    Path("m").rename("n")
    assert kind.fingerprint("n") == third, "the place is not part of it"
    assert kind.fingerprint("org/name") is None


@pytest.mark.parametrize("at", [0, 70_000, 199_999])
def test_a_fingerprint_reads_a_file_beyond_its_beginning(here, at):
    Path("m").mkdir()
    values = bytearray(200_000)
    safetensors("m/model.safetensors", bytes(values), a=[50_000])
    before = kind.fingerprint("m")
    values[at] = 1
    safetensors("m/model.safetensors", bytes(values), a=[50_000])
    assert kind.fingerprint("m") != before


@pytest.mark.parametrize(
    ("file", "text", "has"),
    [
        ("chat_template.jinja", "x", True),
        ("tokenizer_config.json", '{"chat_template": "x"}', True),
        ("tokenizer_config.json", '{"chat_template": null}', False),
        ("tokenizer_config.json", "{", False),
        ("other.json", "{}", False),
    ],
)
def test_chat_templates(here, file, text, has):
    Path(file).write_text(text)
    assert kind.has_chat_template(".") is has
