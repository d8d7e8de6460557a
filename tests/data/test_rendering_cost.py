"""The cost of rendering is linear: 20 turns of talk need no more renderings than 4, and a turn of a long exchange with
tools as many rendered turns as one of a short exchange."""

import pytest
import templates

from align_cli.data import chat


@pytest.mark.parametrize("name", ["qwen3", "llama3", "mistral", "gptoss", "command-r"])
def test_the_number_of_renderings_does_not_grow_with_the_turns(name, monkeypatch):
    tok = templates.tokenizer(name, templates.texts()[name])
    rendered = []
    plain = type(tok).apply_chat_template
    monkeypatch.setattr(
        type(tok), "apply_chat_template", lambda self, m, **more: rendered.append(len(m)) or plain(self, m, **more)
    )

    def cost(turns):
        talk = [{"role": ("user", "assistant")[at % 2], "content": f"word {at}."} for at in range(turns)]
        chat.conversation(tok, talk[:1], talk[1:])  # what is kept is asked once
        rendered.clear()
        chat.conversation(tok, talk[:1], talk[1:])
        return len(rendered)

    assert cost(4) == cost(20) <= 4


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_the_turns_rendered_grow_no_faster_than_those_of_an_exchange_with_tools(name, monkeypatch):
    tok = templates.tokenizer(name, templates.texts()[name])
    rendered = []
    plain = type(tok).apply_chat_template
    monkeypatch.setattr(
        type(tok), "apply_chat_template", lambda self, m, **more: rendered.append(len(m)) or plain(self, m, **more)
    )

    def cost(calls):
        talk = [{"role": "user", "content": "look for it"}]
        for at in range(calls):
            call = {"type": "function", "id": f"call{at:05}", "function": {"name": "look", "arguments": {"page": at}}}
            talk.append({"role": "assistant", "content": "", "tool_calls": [call]})
            talk.append({"role": "tool", "name": "look", "tool_call_id": call["id"], "content": f"page {at}"})
        talk.append({"role": "assistant", "content": "found"})
        chat.conversation(tok, talk[:1], talk[1:])
        rendered.clear()
        chat.conversation(tok, talk[:1], talk[1:])
        return sum(rendered)

    assert cost(64) - cost(32) == 2 * (cost(32) - cost(16)), "each call costs the same"
