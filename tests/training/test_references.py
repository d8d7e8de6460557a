"""The reference that a trainer compares with: loaded once, by us, with the policy's settings, and equal to it."""

import importlib
from pathlib import Path

import project
import pytest
import tiny
import torch

from align_cli.compat.libraries import attention

PAIRS = """name: t
model: { path: models/base, chat_template: chatml, revision: abc, attention: eager }
data: { train: dpo.jsonl, max_length: 128, batch_size: 4 }
trainer: { max_steps: 1, per_device_train_batch_size: 4 }
"""
PROMPTS = """name: t
model: { path: models/base, chat_template: chatml, revision: abc, attention: eager }
reward: { python: "ones:rewards" }
data: { train: prompts.jsonl, max_length: 96, batch_size: 4 }
generation: { max_new_tokens: 6 }
trainer: { max_steps: 1, per_device_train_batch_size: 4 }
"""
STAGES = {"dpo": PAIRS, "kto": PAIRS, "orpo": PAIRS, "ppo": PROMPTS, "rloo": PROMPTS, "grpo": PROMPTS}
METHOD = {"orpo": ["method={also: [{loss: dpo}]}"], "rloo": ["method={k: 4}"], "grpo": ["method={k: 4}"]}
ENDS = {"orpo": "align_cli.preferences.run"} | dict.fromkeys(("ppo", "rloo", "grpo"), "align_cli.rl.run")
PLAIN = ["model.path=models/tiny", "model.chat_template=null"]
LORA = [*PLAIN, "lora={r: 4}", "model.dtype=float32"]


@pytest.fixture
def folder(here, monkeypatch):
    project.build(here, rows=8)
    tiny.without_markers(here / "models" / "base")
    tiny.model(here / "models" / "other", seed=5)
    (here / "ones.py").write_text("def rewards(prompts, responses):\n    return [1.0] * len(responses)\n")
    monkeypatch.setenv("ALIGN_ALLOW_CODE", "1")
    project.write_rows(here / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(8)])
    return here


@pytest.fixture
def loads(monkeypatch):
    """(path, settings) of every causal language model that any library loads."""
    from transformers import PreTrainedModel

    found, plain = [], PreTrainedModel.from_pretrained.__func__

    def recorded(cls, path, *args, **kwargs):
        if cls.__name__.endswith("ForCausalLM"):
            names = ("dtype", "revision", "trust_remote_code")
            found.append((str(path), {name: kwargs.get(name) for name in names}))
        return plain(cls, path, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(recorded))
    return found


def built(stage, monkeypatch, *words):
    """The trainer that a stage builds, before it trains."""
    project.recipe(Path(), stage, "t", STAGES[stage])
    made = []
    place = importlib.import_module(ENDS.get(stage, f"align_cli.stages.{stage}"))
    monkeypatch.setattr(place, "run_to_end", lambda trainer, *rest, **more: made.append(trainer))
    job = project.job(stage, *METHOD.get(stage, []), *words)
    job.reference = job.recipe.reference_path()
    importlib.import_module(f"align_cli.stages.{stage}").run(job)
    return made[0]


def reference_of(stage, trainer):
    return trainer.reference if stage in ("orpo", "ppo") else trainer.ref_model


@pytest.mark.parametrize("stage", STAGES)
def test_one_reference_is_loaded_and_as_the_policy(folder, monkeypatch, loads, stage):
    trainer = built(stage, monkeypatch)
    # the policy and its reference; TRL's own load would name neither revision nor attention
    assert len(loads) == 2 and loads[0] == loads[1]
    assert loads[0][1]["revision"] == "abc"
    reference, policy = reference_of(stage, trainer), trainer.accelerator.unwrap_model(trainer.model)
    assert attention(reference.config) == attention(policy.config) == "eager"
    # chatml adds two markers to this vocabulary of 259, and a padding token
    assert policy.config.vocab_size % 64 == 0 and policy.config.vocab_size >= 262
    own = {name: tensor for name, tensor in policy.state_dict().items() if not name.startswith("value_model.")}
    theirs = reference.state_dict()
    assert set(own) == set(theirs) and all(torch.equal(tensor, theirs[name]) for name, tensor in own.items())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    if stage in ("rloo", "grpo"):
        assert trainer.beta > 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_named_reference_is_the_only_other_model(folder, monkeypatch, loads, stage):
    trainer = built(stage, monkeypatch, *PLAIN, "reference.path=models/other")
    assert [path for path, _ in loads] in (["models/tiny", "models/other"], ["models/other", "models/tiny"])
    # a revision is of the repository that the recipe names it for
    assert {path: given["revision"] for path, given in loads} == {"models/tiny": "abc", "models/other": "main"}
    other = project.weights(folder / "models" / "other")["lm_head.weight"]
    assert torch.equal(reference_of(stage, trainer).state_dict()["lm_head.weight"], other)


@pytest.mark.parametrize("stage", STAGES)
def test_under_lora_the_base_is_the_reference_and_a_named_one_is_used(folder, monkeypatch, loads, stage):
    trainer = built(stage, monkeypatch, *LORA)
    assert len(loads) == 1 and reference_of(stage, trainer) is None
    if stage == "ppo":
        # its reference is always the shared backbone
        return
    trainer = built(stage, monkeypatch, *LORA, "reference.path=models/other")
    assert len(loads) == 3 and reference_of(stage, trainer) is not None


@pytest.mark.parametrize("stage", ["rloo", "grpo"])
def test_without_a_price_on_the_kl_there_is_no_reference(folder, monkeypatch, loads, stage):
    k = "method={k: 4, beta: 0.0}"
    assert reference_of(stage, built(stage, monkeypatch, k)) is None and len(loads) == 1
