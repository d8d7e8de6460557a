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


def built(stage, method, monkeypatch, *words):
    """The trainer that a stage builds, before it trains."""
    from align_cli.rl import run

    project.recipe(Path(), stage, "t", RECIPE + f"method: {{ {method}, missing_eos: null }}\n")
    made = []
    monkeypatch.setattr(run, "run_to_end", lambda trainer, *rest: made.append(trainer))
    importlib.import_module(f"align_cli.stages.{stage}").run(project.job(stage, *words))
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


# --- the weights that sample ----------------------------------------------------------------------------------------

LORA = ("lora={r: 4}", "model.dtype=float32")


@pytest.mark.parametrize(("stage", "words"), [("ppo", ()), ("ppo", LORA), ("rloo", ()), ("grpo", LORA)])
def test_vllm_gets_the_policys_weights_and_no_others(folder, monkeypatch, stage, words):
    from types import SimpleNamespace

    from trl.generation.vllm_generation import VLLMGeneration

    trainer = built(stage, "vf_coef: 0.1" if stage == "ppo" else "k: 4", monkeypatch, *words)
    names, whole = [], [name for name, _ in trainer.model.named_parameters()]
    engine = VLLMGeneration.__new__(VLLMGeneration)
    inner = SimpleNamespace(load_weights=lambda pairs: names.extend(name for name, _ in pairs))
    for part in ("model", "model_runner", "driver_worker", "model_executor", "llm_engine"):
        inner = SimpleNamespace(**{part: inner})
    engine.llm = SimpleNamespace(**vars(inner), reset_prefix_cache=lambda: None)
    engine.model, engine.accelerator, engine._dist = trainer.model, trainer.accelerator, trainer._dist
    engine.mode, engine.enable_sleep_mode = "colocate", False
    engine.generate = lambda prompts, **_: (prompts, [[5]] * len(prompts), [[[0.0]]] * len(prompts), None)
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, engine, -1
    made = trainer._generate_single_turn([[5, 9]], *([None, {}, 1] if stage != "rloo" else [None, {}]))
    assert made == ([[5]], [[0.0]]) or made == [[5]]
    # what a plain engine has read from the model's own files
    assert sorted(names) == sorted(project.weights(folder / "models/tiny"))
    assert [name for name, _ in trainer.model.named_parameters()] == whole


@pytest.mark.parametrize(("stage", "words"), [("ppo", ()), ("rloo", ()), ("grpo", LORA)])
def test_continuous_batching_leaves_the_trained_weights_as_they_are(folder, monkeypatch, stage, words):
    half = ("generation={max_new_tokens: 6, engine: batched}", "trainer.bf16=true")
    trainer = built(stage, "vf_coef: 0.1" if stage == "ppo" else "k: 4", monkeypatch, *half, *words)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    base = policy.get_base_model() if words else policy
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in trainer.model.named_parameters()}
    tensors, plain = [], type(base).generate_batch

    def generate_batch(self, *args, **kwargs):
        tensors.extend((name, parameter.dtype) for name, parameter in trainer.model.named_parameters())
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(base), "generate_batch", generate_batch)
    trainer.model.train()
    made = trainer.sample([[5, 9, 33], [70, 2]], None)[0]
    assert len(made) == 2 and all(0 < len(row) <= 6 for row in made)
    assert {dtype for _, dtype in tensors} == {torch.bfloat16} and "value_model" not in str(tensors)
    assert trainer.model.training
    after = dict(trainer.model.named_parameters())
    assert list(after) == list(before)
    for name, (parameter, data) in before.items():
        assert after[name] is parameter and parameter.dtype == torch.float32 and torch.equal(parameter, data), name


def test_no_unused_row_is_sampled_by_any_engine(folder, monkeypatch):
    project.tiny.without_markers(folder / "models" / "base")
    base = ("model={path: models/base, chat_template: chatml}", "generation={max_new_tokens: 6, engine: batched}")
    trainer = built("rloo", "k: 4", monkeypatch, *base)
    unused = list(range(262, 320))
    assert trainer.generation_config.suppress_tokens[-58:] == unused
    with torch.no_grad():
        trainer.model.lm_head.weight[262:] = 20 * trainer.model.lm_head.weight[:58]
    made = trainer.sample([[5, 9, 33], [70, 2]], None)[0]
    assert made and all(token < 262 for row in made for token in row)


# --- figures --------------------------------------------------------------------------------------------------------


def reads(monkeypatch, run):
    """Number of times that `run` reads a tensor's value, for which the host would wait for a device."""
    found = []

    def counted(plain):
        return lambda self, *args, **kwargs: found.append(1) or plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
        run()
    return len(found)


def test_ppos_loss_reads_no_figure_besides_trls(ppo, monkeypatch):
    from trl import GRPOTrainer

    inputs = rollout(ppo)
    # transformers reads each mask that it is given, once per forward pass
    monkeypatch.setattr(ppo.critic, "values", lambda ids, seen, t: torch.zeros(len(ids), t, requires_grad=True))
    trls = reads(monkeypatch, lambda: GRPOTrainer._compute_loss(ppo, ppo.model, inputs))
    ours = reads(monkeypatch, lambda: ppo.policy_loss(ppo.model, inputs))
    assert ours == trls
    for _ in range(3):
        ppo.policy_loss(ppo.model, inputs)
    noted = [value.item() for value in ppo.figures["value_loss"]]
    assert reads(monkeypatch, ppo.settle) == 1
    assert ppo.figures["value_loss"] == pytest.approx(noted) and len(noted) == 4
    assert ppo.latest["value_loss"] == pytest.approx(noted[-1])


def test_a_rollouts_own_figures_are_read_at_once(ppo, monkeypatch):
    inputs = rollout(ppo)
    mask = inputs["completion_mask"].float()
    assert reads(monkeypatch, lambda: ppo._figures(mask * 0.1, mask, mask * 0.5, mask)) == 1
