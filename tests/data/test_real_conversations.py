"""Real conversations of 2 to 20 turns under every template: only the assistant is trained, and no row is lost."""

import json
from pathlib import Path

import pytest
import templates

from align_cli.data import chat, template

DATA = Path(__file__).parents[3] / "shared" / "data" / "oasst_sft.jsonl"
TEXTS = templates.texts()
pytestmark = pytest.mark.skipif(not DATA.is_file(), reason="the real data is not here")


def conversations():
    """Rows put one behind the other until they have so many turns: user and assistant take turns."""
    rows = [json.loads(line)["messages"] for line in DATA.read_text(encoding="utf-8").splitlines()]
    rows = [[turn for turn in talk if turn["role"] != "system"] for talk in rows]
    rows = [talk for talk in rows if [turn["role"] for turn in talk] == ["user", "assistant"] * (len(talk) // 2)]
    made = []
    for turns in range(2, 21, 2):
        for _ in range(2):
            talk = []
            while len(talk) < turns:
                talk += rows.pop(0)
            made.append([{"role": turn["role"], "content": turn["content"]} for turn in talk[:turns]])
    return made


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_no_token_outside_of_an_assistants_turn_is_trained(name):
    tok = templates.tokenizer(name, TEXTS[name])
    specials = template.of(tok).specials
    for talk in conversations():
        turns = chat.conversation(tok, talk[:1], talk[1:])  # raises for a row that cannot be proved
        said, on = [], False
        for token, trained in zip(turns.ids, turns.trained, strict=True):
            if trained and not on:
                said.append([])
            if trained:
                said[-1].append(token)
            on = trained
        answers = [turn["content"].strip() for turn in talk if turn["role"] == "assistant"]
        assert len(said) == len(answers)
        for ids, answer in zip(said, answers, strict=True):
            text = tok.decode(ids)
            before, found, behind = text.partition(answer)
            assert found, text
            # what is trained beside the answer is what the model writes by itself: marks of thoughts and channels, ends
            beside = specials.sub("", before).replace("<think>", "").replace("</think>", "").split()
            assert set(beside) <= {"final", "to=user"} and not specials.sub("", behind).strip(), (before, behind)
