"""The numbers of PPO, RLOO and GRPO as the trainers that train compute them, on a real tiny model.

Golden values: ratios and advantages of PPO's clipped loss (arXiv 1707.06347, eq. 7), RLOO's leave-one-out advantages
(arXiv 2402.14740, eq. 8); GRPO's are (R - mean) / standard deviation of a prompt's rewards (arXiv 2402.03300, §4.1.2),
worked out by hand.
"""

import importlib
import math
from pathlib import Path

import project
import pytest
import torch

RATIO, ADVANTAGE, LOSS = [1.5, 0.5, 1.1, 0.9], [1.0, 1.0, -1.0, -1.0], [-1.2, -0.5, 1.1, 0.9]
REWARDS = [1.0, 2.0, 3.0, 6.0]
RECIPE = """name: t
model: { path: models/tiny }
reward: { python: "golden:rewards" }
data: { train: prompts.jsonl, max_length: 96, batch_size: 4 }
generation: { max_new_tokens: 6 }
trainer: { per_device_train_batch_size: 4, max_steps: 1, gradient_checkpointing: false, bf16: false }
"""


@pytest.fixture
def folder(here, monkeypatch):
    project.build(here)
    (here / "golden.py").write_text(f"def rewards(prompts, responses):\n    return {REWARDS}\n")
    monkeypatch.setenv("ALIGN_ALLOW_CODE", "1")
    project.write_rows(here / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(8)])
    return here


def built(stage, method, monkeypatch):
    """The trainer that a stage builds, before it trains."""
    from align_cli.rl import run

    project.recipe(Path(), stage, "t", RECIPE + f"method: {{ {method}, missing_eos: null }}\n")
    made = []
    monkeypatch.setattr(run, "run_to_end", lambda trainer, *rest: made.append(trainer))
    importlib.import_module(f"align_cli.stages.{stage}").run(project.job(stage))
    # set by `train` at the beginning of each step
    made[0].current_gradient_accumulation_steps = 1
    return made[0]


def rollout(trainer):
    trainer.model.train()
    return trainer.rollout([trainer.train_dataset[0]] * 4)


def test_rloo_compares_with_the_other_samples_of_the_prompt(folder, monkeypatch):
    trainer = built("rloo", "k: 4, beta: 0.0", monkeypatch)
    assert rollout(trainer)["advantages"].tolist() == pytest.approx([-2.666667, -1.333333, 0, 4], abs=1e-5)


def test_grpo_divides_by_the_spread_of_the_prompts_rewards(folder, monkeypatch):
    trainer = built("grpo", "k: 4, beta: 0.0", monkeypatch)
    spread = math.sqrt((4 + 1 + 0 + 9) / 3)
    assert rollout(trainer)["advantages"].tolist() == pytest.approx([(r - 3) / spread for r in REWARDS], abs=1e-3)


@pytest.fixture
def ppo(folder, monkeypatch):
    """PPO's trainer as its stage builds it, without a value loss."""
    return built("ppo", "vf_coef: 1.0e-9, whiten: false", monkeypatch)


def test_ppo_clips_the_ratio_of_each_token(ppo):
    inputs = rollout(ppo)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    t = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        now = ppo.token_log_probs(ppo.model, ids, seen, t, batch_size=4)
    first = torch.zeros_like(now)
    first[:, 0] = 1.0
    for row, (ratio, advantage, loss) in enumerate(zip(RATIO, ADVANTAGE, LOSS, strict=True)):
        # one token of one response is trained on, whose ratio to the rollout's policy is the golden one
        mask = torch.zeros_like(now)
        mask[row, 0] = 1.0
        one = inputs | {
            "completion_mask": mask.long(),
            "advantages": advantage * first,
            "old_per_token_logps": now - math.log(ratio) * first,
            "num_items_in_batch": torch.tensor(1.0),
        }
        found = ppo.policy_loss(ppo.model, one)
        assert found.item() == pytest.approx(loss, abs=1e-5)


def test_a_ratio_beyond_the_clip_moves_nothing(ppo):
    inputs = rollout(ppo)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        now = ppo.token_log_probs(ppo.model, ids, seen, inputs["completion_ids"].shape[1], batch_size=4)
    for ratio, moves in ((1.5, False), (1.1, True)):
        ppo.model.zero_grad()
        ones = torch.ones_like(now)
        ppo.policy_loss(
            ppo.model, inputs | {"advantages": ones, "old_per_token_logps": now - math.log(ratio)}
        ).backward()
        weight = ppo.accelerator.unwrap_model(ppo.model).model.layers[0].mlp.down_proj.weight
        # what is left beyond the clip is the value function's, at 1e-9, which shares no weight with the policy
        assert bool(weight.grad.abs().max() > 1e-6) is moves


def test_ppos_rollout_holds_gae_of_the_scores_on_the_last_token(ppo):
    """Against a loop written out here: r_t = -β·KL_t, + score at the end; A_t = Σ (γλ)^l δ_{t+l}."""
    inputs = rollout(ppo)
    beta, lam = ppo.kl_coefficient, ppo.settings.lam
    mask, values = inputs["completion_mask"].tolist(), inputs["old_values"].tolist()
    for row, score in enumerate(REWARDS):
        n = sum(mask[row])
        # at the first rollout the policy is the reference
        rewards = [0.0] * (n - 1) + [score]
        running, expected = 0.0, []
        for t in range(n - 1, -1, -1):
            following = values[row][t + 1] if t + 1 < n else 0.0
            running = rewards[t] + following - values[row][t] + lam * running
            expected.insert(0, running)
        assert beta > 0
        assert inputs["advantages"][row, :n].tolist() == pytest.approx(expected, abs=1e-4)
        returns = [a + v for a, v in zip(expected, values[row], strict=False)]
        assert inputs["returns"][row, :n].tolist() == pytest.approx(returns, abs=1e-4)
