"""What goes wrong on one rank alone, or in a user's own function, is shown once, with its rank."""

import project
import pytest
from project import align

RECIPE = """name: t
model: {{ path: models/tiny }}
reward: {{ python: "mine:{function}" }}
data: {{ train: prompts.jsonl, max_length: 64, batch_size: 8 }}
generation: {{ max_new_tokens: 8 }}
method: {{ k: 2 }}
trainer: {{ learning_rate: 1.0e-3, max_steps: 2, per_device_train_batch_size: 4 }}
"""
MINE = """
import os
import sys

import torch

PLAIN = [0.0, 1.0, 2.0, 3.0]


def on_rank_1(prompts, responses):
    if os.environ.get("RANK") == "1":
        raise ValueError("the second rank lacks its file")
    return [float(len(response)) for response in responses]


def everywhere(prompts, responses):
    raise ValueError("no rank has the file")


def exits(prompts, responses):
    sys.exit(3)


def with_gradient(prompts, responses):
    return torch.nn.Parameter(torch.arange(len(responses)).float())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = project.build(tmp_path_factory.mktemp("one"), rows=4)
    project.write_rows(folder / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(32)])
    (folder / "mine.py").write_text(MINE)
    for function in ("on_rank_1", "everywhere", "exits", "with_gradient"):
        project.recipe(folder, "rloo", function, RECIPE.format(function=function))
    return folder


def called(folder, function, *more):
    return align("rloo", f"recipe={function}.yaml", f"name={function}", "--allow-code", *more, cwd=folder)


def test_an_error_of_the_second_rank_is_shown_with_its_rank(folder):
    done = called(folder, "on_rank_1", "launch.num_gpus=2")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if "the second rank lacks its file" in line]
    assert len(lines) == 1 and lines[0].startswith("rank 1: mine:on_rank_1: raised ValueError")


def test_an_error_of_all_ranks_is_shown_once(folder):
    done = called(folder, "everywhere", "launch.num_gpus=2")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if "no rank has the file" in line]
    assert len(lines) == 1 and lines[0].startswith("mine:everywhere: raised ValueError")


def test_a_function_that_exits_is_an_error_of_the_function(folder):
    done = called(folder, "exits")
    assert done.returncode == 2 and "mine:exits: raised SystemExit: 3" in done.stderr


def test_a_tensor_with_a_gradient_is_a_score(folder):
    done = called(folder, "with_gradient")
    assert done.returncode == 0, done.stderr
