"""align grpo as whole runs, with answers that are checked against a column of the data."""

import project
import pytest
import torch

RECIPE = """name: t
model: { path: models/tiny }
reward: { verify: { kind: regex, column: wanted } }
data: { train: prompts.jsonl, max_length: 96, batch_size: 32 }
generation: { max_new_tokens: 12 }
method: { k: 8, beta: 0.01 }
trainer: { learning_rate: 5.0e-3, max_steps: 24, per_device_train_batch_size: 16, lr_scheduler_type: constant }
"""
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward of 1 for any small letter of the first half of the alphabet."""
    folder = project.build(tmp_path_factory.mktemp("grpo"))
    project.write_rows(folder / "prompts.jsonl", [{"prompt": f"name {n}", "wanted": "[a-m]"} for n in range(64)])
    project.recipe(folder, "grpo", text=RECIPE)
    project.ok("grpo", "recipe=t.yaml", cwd=folder)
    return folder


def logged(run, name):
    return [row[name] for row in project.metrics(run) if name in row]


def test_it_learns_what_is_right(folder):
    rewards = logged(folder / "runs/t/grpo", "reward")
    assert len(rewards) == 24 and all(0 <= reward <= 1 for reward in rewards)
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15
    rows = [row for row in project.metrics(folder / "runs/t/grpo") if "loss" in row]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-3)
    assert {"entropy", "response_length", "eos_rate", "beta", "seconds_rollout"} <= set(rows[0])


def test_prompts_are_shown(folder):
    said = project.ok("show", "grpo", "recipe=t.yaml", "-n", "1", cwd=folder)
    assert "name " in said and "tokens of prompt" in said


@pytest.mark.parametrize("zero", ["zero2", pytest.param("zero3", marks=SLOW), pytest.param("none", marks=SLOW)])
def test_two_ranks_are_one_process(folder, zero):
    words = ["launch.num_gpus=2", f"zero={zero}", "trainer.max_steps=3"]
    project.ok("grpo", "recipe=t.yaml", f"name={zero}", *words, cwd=folder)
    for name in ("reward", "kl", "response_length", "loss"):
        found, expected = (logged(folder / f"runs/{run}/grpo", name)[:3] for run in (zero, "t"))
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["grpo", "dr-grpo", "bnpo"])
def test_every_loss_runs_under_lora(folder, loss):
    words = [f"method.loss={loss}", "method.scale_rewards=none", "lora.r=4", "model.dtype=float32"]
    project.ok("grpo", "recipe=t.yaml", f"name={loss}", *words, "trainer.max_steps=2", cwd=folder)
    weights = project.weights(folder / f"runs/{loss}/grpo")
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert torch.isfinite(torch.tensor(project.losses(folder / f"runs/{loss}/grpo"))).all()


@pytest.mark.slow
def test_killed_and_run_again_it_ends_with_the_same_weights(folder):
    run, words = folder / "runs/killed/grpo", ["recipe=t.yaml", "name=killed", "trainer.save_steps=6"]
    project.kill_after_a_checkpoint("grpo", *words, run=run, cwd=folder)
    assert "resuming from step" in project.ok("grpo", *words, cwd=folder)
    calm = project.weights(folder / "runs/t/grpo")
    assert all(torch.equal(tensor, calm[name]) for name, tensor in project.weights(run).items())


@pytest.mark.slow
def test_a_reward_model_and_a_check_add_up(folder):
    project.recipe(folder, "rm", text=project.recipe(folder, "dpo").read_text())
    project.ok("rm", "recipe=t.yaml", cwd=folder)
    rewards = "reward=[{path: runs/t/rm}, {verify: {kind: regex, column: wanted}, weight: 100}]"
    project.ok("grpo", "recipe=t.yaml", "name=both", rewards, "trainer.max_steps=2", cwd=folder)
    found, alone = (logged(folder / f"runs/{name}/grpo", "reward") for name in ("both", "t"))
    # the first rollout is the same, and the reward model's scores are near 0
    assert found[0] == pytest.approx(100 * alone[0], abs=20)
    assert project.manifest(folder / "runs/both/grpo")["parents"][1]["role"] == "reward"


@pytest.mark.parametrize(
    ("words", "findings"),
    [
        (
            ["reward.verify.column=answer"],
            ["prompts.jsonl: no column 'answer' to compare responses with (has prompt, wanted)"],
        ),
        (["reward.verify.kind=numeric"], ["prompts.jsonl:1: 'wanted' contains no number; correct the row"]),
        (["reward.path=runs/none/rm"], ["set exactly one of path", "runs/none/rm does not exist"]),
        (["method.k=1", "trainer.loss_type=grpo"], ["method.k", "write method.loss"]),
        (
            ["reward.verify.extract=(", "method.beta=0", "reference.path=models/tiny"],
            ["is not a valid pattern", "has no effect at method.beta=0"],
        ),
        (["data.batch_size=12"], ["do not divide by method.k=8"]),
    ],
)
def test_what_cannot_run_is_refused_a_line_a_problem(folder, words, findings):
    done = project.align("grpo", "recipe=t.yaml", "name=bad", *words, cwd=folder)
    assert done.returncode == 2 and all(finding in done.stderr for finding in findings), done.stderr
    assert "Traceback" not in done.stderr
