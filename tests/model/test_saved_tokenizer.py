"""A tokenizer read from its files renders what transformers' own renders, and loads no torch."""

import subprocess
import sys

import pytest
import templates

from align_cli.data import refusals
from align_cli.data.format import Group
from align_cli.model import saved_tokenizer
from align_cli.recipe.sections import Model

TEXTS = templates.texts()
TALK = [
    {"role": "user", "content": "Alpha?"},
    {"role": "assistant", "content": "Bravo."},
    {"role": "user", "content": "Charlie?"},
    {"role": "assistant", "content": "Delta."},
]


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_it_renders_what_the_tokenizer_renders(name, tmp_path):
    tok = templates.tokenizer(name, TEXTS[name])
    tok.save_pretrained(tmp_path)
    saved = saved_tokenizer.read(Model(path=str(tmp_path)), str(tmp_path))
    assert saved.eos_token == tok.eos_token
    for messages, asks in ((TALK, False), (TALK[:1], True)):
        try:
            text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        except Exception as error:
            with pytest.raises(type(error)):
                saved.apply_chat_template(messages, add_generation_prompt=asks)
            continue
        assert saved.apply_chat_template(messages, add_generation_prompt=asks) == text


def test_what_would_be_left_out_is_known_without_torch(tmp_path):
    tok = templates.tokenizer("gemma", TEXTS["gemma"])
    tok.save_pretrained(tmp_path)
    code = f"""
import sys
from align_cli.data import refusals
from align_cli.data.format import Group
from align_cli.model import saved_tokenizer
from align_cli.recipe.sections import Model
tokenizer = saved_tokenizer.read(Model(path={str(tmp_path)!r}), {str(tmp_path)!r})
refused = refusals.checker(tokenizer, "demonstrations")
ask, answer = dict(role="user", content="a"), [dict(role="assistant", content="b")]
print(refused(Group([ask], [answer])))
print(refused(Group([dict(role="system", content="s"), ask], [answer])))
print(refused(Group([ask], [[dict(role="assistant", content="cut \\ud83d here")]])))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    fine, system, half, torch = done.stdout.splitlines()
    assert (fine, torch) == ("None", "False"), done.stderr
    assert "refuses it (System role not supported)" in system and "half of a surrogate pair" in half


def test_a_directory_without_a_tokenizer_or_a_template_gives_none(tmp_path):
    assert saved_tokenizer.read(Model(path=str(tmp_path)), str(tmp_path)) is None
    templates.tokenizer("gemma", TEXTS["gemma"]).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert saved_tokenizer.read(Model(path=str(tmp_path)), str(tmp_path)) is None


def test_prompts_alone_are_looked_at_as_they_are_asked(tmp_path):
    templates.tokenizer("gemma", TEXTS["gemma"]).save_pretrained(tmp_path)
    refused = refusals.checker(saved_tokenizer.read(Model(path=str(tmp_path)), str(tmp_path)), "prompts")
    assert refused(Group(TALK[:1], [])) is None
    assert "System role" in refused(Group([{"role": "system", "content": "s"}, *TALK[:1]], []))
