"""Chat templates: the built-in ones and the lines about missing ones."""

import json
from pathlib import Path

import pytest

from align_cli.model import templates

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def render(name, messages, **more):
    from jinja2 import Environment

    given = {"messages": messages, "eos_token": "</s>", "bos_token": "<s>"} | more
    return Environment().from_string(templates.text(name)).render(**given)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "zephyr",
            "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
        ),
        ("plain", "<s>Be brief.\n\nHuman: Hi\n\nAssistant: Hello</s>\n\nHuman: Bye\n\nAssistant:"),
    ],
)
def test_the_built_in_ones_written_out(name, expected):
    assert render(name, TALK, add_generation_prompt=True) == expected


def test_plain_does_without_a_first_token():
    assert render("plain", TALK[1:2], bos_token=None) == "\n\nHuman: Hi"


def test_a_file_is_its_text(here):
    Path("mine.jinja").write_text("{{ messages|length }}")
    assert render("mine.jinja", TALK) == "4"


@pytest.fixture
def model(here):
    Path("m").mkdir()
    Path("m/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    Path("m/model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return "m"


def test_a_named_template_must_be_there(model):
    Path("mine.jinja").write_text("x")
    assert [templates.problems(model, name) for name in ("chatml", "zephyr", "plain", "mine.jinja")] == [[]] * 4
    assert templates.problems(model, "zephir") == [
        "model.chat_template: zephir: no such template. Did you mean 'zephyr'?"
    ]
    (line,) = templates.problems(model, "mine.jinga")
    assert "known: chatml, zephyr, plain, raw, or the path of a Jinja file" in line


def test_a_model_without_one_must_be_given_one(model):
    (line,) = templates.problems(model, None)
    assert line.startswith("model.path: m: its tokenizer has no chat template; set model.chat_template= to chatml")
    Path("m/tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert templates.problems(model, None) == []


def test_what_is_not_at_hand_is_not_asked(here):
    assert templates.problems("org/name", None) == [] and templates.problems("models/none", None) == []
