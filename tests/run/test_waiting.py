"""Phases that take much longer on one rank than the libraries' collectives may."""

import os

import project
import pytest

PPO = """name: t
model: { path: models/tiny }
reward: { python: "mine:brevity" }
gold: { python: "mine:brevity" }
data: { train: prompts.jsonl, max_length: 64, batch_size: 8 }
generation: { max_new_tokens: 8 }
method: { epochs: 1, minibatches: 2 }
trainer: { learning_rate: 1.0e-3, max_steps: 2, per_device_train_batch_size: 2, logging_steps: 1 }
launch: { num_gpus: 2 }
"""
MINE = """
import os, time

calls = [0]


def brevity(prompts, responses):
    calls[0] += 1
    if os.environ["RANK"] == "1" and calls[0] < 3:
        time.sleep(90)
    return [-float(len(response)) for response in responses]
"""
SHORT = """
import os

if "RANK" in os.environ:
    from datetime import timedelta

    from align_cli import distributed

    distributed.COLLECTIVE = timedelta(seconds=60)
"""


@pytest.mark.slow
def test_a_reward_that_is_slow_on_one_rank_runs_into_no_time_out(tmp_path):
    home = project.build(tmp_path / "home", rows=4)
    project.write_rows(home / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(16)])
    (home / "mine.py").write_text(MINE)
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "sitecustomize.py").write_text(SHORT)
    project.recipe(home, "ppo", "t", PPO)
    path = f"{tmp_path / 'short'}:{os.environ.get('PYTHONPATH', '')}"
    done = project.align("ppo", "recipe=t", "--allow-code", cwd=home, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
