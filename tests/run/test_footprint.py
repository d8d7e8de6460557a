"""What a rank is planned to hold, by stage: how many models, trained and frozen."""

import pytest

from align_cli.hardware import Machine
from align_cli.recipe.check import load
from align_cli.run import devices
from align_cli.run.footprint import footprint


def planned(stage, *words):
    """Bytes by part, in parameters of 4 bytes where nothing else is said."""
    recipe = load(stage, [*words, "model.dtype=float32"])[1]
    return {part.name: part.bytes / 4 for part in footprint(recipe, 1, 1)[1]}


P = 7.24e9
ZERO = ("zero=none",)
SIZED = "model.parameters=7.24e9"


@pytest.mark.parametrize(
    ("stage", "recipe", "words", "weights", "frozen"),
    [
        ("sft", "zephyr", (), 1, {}),
        ("rm", "instructgpt", (), 1, {}),
        ("dpo", "zephyr", (), 1, {"reference": 1}),
        ("dpo", "zephyr", ("lora=r16",), 1, {}),
        ("ppo", "instructgpt", (), 2, {"reference": 1, "reward": 1}),
        ("ppo", "instructgpt", ("gold={path: runs/g/rm}",), 2, {"reference": 1, "reward": 2}),
        ("ppo", "instructgpt", ("lora=r16",), 1, {}),
        ("rloo", "hh", (), 1, {"reference": 1, "reward": 1}),
        ("rloo", "hh", ("lora=r16",), 1, {"reward": 1}),
        ("rloo", "hh", ("method.beta=0",), 1, {"reward": 1}),
        ("orpo", "mistral-7b", (), 1, {}),
        ("simpo", "mistral-7b-base", (), 1, {}),
        ("simpo", "mistral-7b-base", ("method.also=[{loss: dpo}]",), 1, {"reference": 1}),
        ("simpo", "mistral-7b-base", ("method.also=[{loss: dpo}]", "lora=r16"), 1, {}),
        ("kto", "demo", (SIZED,), 1, {"reference": 1}),
        ("kto", "demo", (SIZED, "lora=r16"), 1, {}),
        ("grpo", "demo", (SIZED,), 1, {"reference": 1, "reward": 1}),
        ("grpo", "demo", (SIZED, "method.beta=0", "reward=[{verify: {kind: exact, column: a}}]"), 1, {}),
    ],
)
def test_models_held(here, stage, recipe, words, weights, frozen):
    parts = planned(stage, f"recipe={recipe}", *ZERO, *words)
    assert parts["weights"] == pytest.approx(weights * P)
    assert {name: parts[name] / P for name in ("reference", "reward") if name in parts} == pytest.approx(frozen)


def test_one_backbone_trains_two_adapters(here):
    alone = planned("rloo", "recipe=hh", *ZERO, "lora=r16")["gradients"]
    assert planned("ppo", "recipe=instructgpt", *ZERO, "lora=r16")["gradients"] == pytest.approx(2 * alone)


@pytest.mark.parametrize(("gpus", "dtype", "width"), [(0, "bfloat16", 4), (1, "float32", 2)])
def test_reward_models_are_planned_in_the_type_that_they_score_in(here, monkeypatch, gpus, dtype, width):
    monkeypatch.setattr(devices, "machine", lambda launch: Machine(gpu=gpus > 0, bf16=gpus > 0))
    recipe = load("rloo", ["recipe=hh", *ZERO, "lora=r16", f"model.dtype={dtype}"])[1]
    parts = {part.name: part.bytes for part in footprint(recipe, 1, 1)[1]}
    assert parts["reward"] == pytest.approx(width * P)
    assert parts["weights"] == pytest.approx({"bfloat16": 2, "float32": 4}[dtype] * P)
