"""What a rank is planned to hold, by stage: how many models, trained and frozen."""

import pytest

from align_cli.hardware import Machine
from align_cli.recipe.check import load
from align_cli.run import devices
from align_cli.run.footprint import footprint, storage


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


@pytest.mark.parametrize(
    ("words", "checkpoint", "model", "needed"),
    [
        # weights and two moments in float32; with DeepSpeed the weights twice, and a master copy
        (("zero=none",), 12 * P, 4 * P, 36 * P),
        (("zero=zero3",), 20 * P, 4 * P, 60 * P),
        (("zero=zero3", "model.dtype=bfloat16"), 16 * P, 2 * P, 48 * P),
        (("zero=zero3", "trainer.save_total_limit=4"), 20 * P, 4 * P, 100 * P),
        (("zero=zero3", "trainer.save_total_limit=1"), 20 * P, 4 * P, 60 * P),
        (("zero=zero3", "trainer.save_strategy='no'"), 20 * P, 4 * P, 20 * P),
        (("zero=none", "trainer.save_only_model=true"), 4 * P, 4 * P, 12 * P),
    ],
)
def test_what_a_run_writes_to_its_disk(here, words, checkpoint, model, needed):
    recipe = load("sft", ["recipe=zephyr", "model.dtype=float32", *words])[1]
    planned = storage(recipe, footprint(recipe, 1, 1)[0])
    assert (planned.checkpoint, planned.model, planned.needed) == pytest.approx((checkpoint, model, needed))


def test_rounds_keep_their_models_and_the_value_function_is_saved_too(here):
    loop = load("dpo", ["recipe=online-llama3", "model.dtype=bfloat16"])[1]
    assert storage(loop, footprint(loop, 1, 1)[0]).models == loop.method.rounds == 3
    ppo = load("ppo", ["recipe=instructgpt", *ZERO, "model.dtype=float32"])[1]
    assert storage(ppo, footprint(ppo, 1, 1)[0]).checkpoint == pytest.approx(2 * 12 * P)


def test_what_an_unfinished_run_has_written_is_not_needed_again(here):
    recipe = load("sft", ["recipe=zephyr", *ZERO])[1]
    before = storage(recipe, footprint(recipe, 1, 1)[0])
    folder = here / recipe.run_dir / "checkpoints" / "checkpoint-1"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"\0" * 4096)
    after = storage(recipe, footprint(recipe, 1, 1)[0])
    assert after.needed == before.needed - 4096
