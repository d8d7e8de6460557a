"""Prompts that are prepared once: the rows that trainers got from lists, and the order in which rounds take them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from datasets import Dataset

from align_cli.data import chat
from align_cli.data.groups import read_groups
from align_cli.data.split import canonical, hashed
from align_cli.data.template import packed
from align_cli.errors import DataError
from align_cli.recipe.sections import Data
from align_cli.rewards import prompts

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
TEMPLATE = (
    "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] }}"
    "{{ m['tool_calls'] if m['tool_calls'] else '' }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


@pytest.fixture
def tok():
    return tiny.tokenizer(TEMPLATE)


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asks = [[{"role": "user", "content": f"sum {n % 7} and {n % 5}"}] for n in range(60)]
    rows = [{"prompt": ask, "answer": n, "tools": None} for n, ask in enumerate(asks)]
    call = {"type": "function", "function": {"name": "look", "arguments": {"page": 1}}}
    turns = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "page 1", "name": "look"},
    ]
    rows[11] |= {"prompt": turns, "tools": [TOOL]}
    rows[20]["prompt"] = [{"role": "user", "content": "too long " * 60}]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    recipe = SimpleNamespace(
        data=Data(train="a.jsonl", max_length=430, max_dropped=0.5),
        seed=9,
        generation=SimpleNamespace(max_new_tokens=30),
        compared_columns=lambda: ["answer"],
        reward_sources=lambda: [],
    )
    return SimpleNamespace(recipe=recipe, say=said.append, said=said, cache=Path("cache"), rank=0)


def in_lists(job, tok):
    """The kept groups, as a list of all of them gave them."""
    read = read_groups(job.recipe.data, "prompts", 9, ["answer"])
    return [group for group in read.train if len(chat.prompt_ids(tok, group.prompt, group.tools)) <= 400]


def test_a_trainer_gets_the_rows_that_a_list_gave(job, tok):
    made, counts = prompts.dataset(job, tok)
    rows = [
        {"prompt": packed(g.prompt, g.tools), "cell_answer": json.dumps(g.cells["answer"])} for g in in_lists(job, tok)
    ]
    listed = Dataset.from_list(rows)
    assert len(made) == 59 and list(made) == list(listed) and made.column_names == listed.column_names
    assert made.features["prompt"] == listed.features["prompt"]
    assert counts[0].dropped == {"prompt over 400 tokens": 1}


def test_prompts_are_the_groups_and_are_read_again(job, tok, monkeypatch):
    made, _ = prompts.groups(job, tok, job.recipe.data)
    groups = in_lists(job, tok)
    assert list(made) == groups and [one.cells for one in made] == [one.cells for one in groups]
    assert list(made[3:14:2]) == groups[3:14:2] and made[11].tools == [TOOL]
    lines = list(job.said)
    monkeypatch.setattr(prompts, "read_groups", None)
    again, counts = prompts.groups(job, tok, job.recipe.data)
    assert list(again) == groups and job.said == lines * 2 and counts[0].rows_used == 59


def test_rounds_take_each_prompt_once_in_the_seeded_order(job, tok):
    made, _ = prompts.groups(job, tok, job.recipe.data)
    seen, expected, taken, same = set(), [], [], set()
    for group in sorted(in_lists(job, tok), key=lambda group: hashed(9, "round", group.prompt)):
        if canonical(group.prompt) not in seen:
            seen.add(canonical(group.prompt))
            expected.append(group.place)
    for number, key in made.fresh:
        if key not in same:
            same.add(key)
            taken.append(made[number].place)
    assert taken == expected and len(taken) == 36


def test_cells_that_cannot_be_compared_are_refused_each_time(job, tok):
    verify = SimpleNamespace(kind="numeric", column="answer")
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    rows[4]["answer"] = "none"
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job.recipe.reward_sources = lambda: [("reward", SimpleNamespace(verify=verify))]
    for _ in range(2):
        with pytest.raises(DataError, match=r"^a\.jsonl:5: 'answer' "):
            prompts.dataset(job, tok)
