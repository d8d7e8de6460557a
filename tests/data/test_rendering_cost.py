"""The number of renderings does not depend on a conversation's length: 20 turns cost no more than 4."""

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
