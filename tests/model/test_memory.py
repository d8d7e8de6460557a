"""Bytes a rank, against numbers worked out by hand from the ZeRO paper's accounting."""

import pytest

from align_cli.model import memory

# Zephyr: 7.24e9 parameters in bfloat16 on 8 ranks, Adam, mixed precision
ZEPHYR = memory.Sizes(parameters=7_240_000_000)


def plan(size=ZEPHYR, **more):
    given = {"dtype": "bfloat16", "mixed": True, "trainable": size.parameters, "zero_stage": 0, "world_size": 8}
    given |= {"offload_optimizer": False, "offload_param": False, "frozen": {}}
    given |= {"rows": 1, "tokens": 1, "checkpointing": True} | more
    return {part.name: part.bytes for part in memory.plan(size, **given)}


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        (0, 14.48e9, 14.48e9, 86.88e9),  # 2Ψ + 2Ψ + 12Ψ
        (1, 14.48e9, 14.48e9, 10.86e9),  # 12Ψ/8
        (2, 14.48e9, 1.81e9, 10.86e9),  # 2Ψ/8
        (3, 1.81e9, 1.81e9, 10.86e9),
    ],
)
def test_the_stages_of_the_paper(stage, weights, gradients, optimizer):
    assert plan(zero_stage=stage) == {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def test_float32_needs_no_master_copy():
    assert plan(dtype="float32", mixed=False) == {"weights": 28.96e9, "gradients": 28.96e9, "optimizer": 57.92e9}
    assert plan(dtype="float32", mixed=True)["optimizer"] == 57.92e9
    assert plan(mixed=False)["optimizer"] == 57.92e9


def test_adapters_train_little_and_freeze_the_rest():
    parts = plan(trainable=1_000_000)
    assert parts == {"weights": 14.48e9, "gradients": 2e6, "optimizer": 12e6}


def test_the_reference_is_whole_below_stage_3():
    one = {"reference": (1, "bfloat16")}
    assert [plan(zero_stage=stage, frozen=one)["reference"] for stage in (0, 2, 3)] == [14.48e9, 14.48e9, 1.81e9]
    assert plan(zero_stage=3, frozen={"reward": (3, "bfloat16")})["reward"] == 3 * 1.81e9


def test_a_value_function_is_trained_like_the_policy():
    alone, both = plan(), plan(trained_copies=2)
    assert {both[name] / alone[name] for name in ("weights", "gradients", "optimizer")} == {2}


def test_what_is_offloaded_is_not_on_the_device():
    parts = plan(zero_stage=3, offload_optimizer=True, offload_param=True)
    assert parts == {"weights": 0, "gradients": 1.81e9, "optimizer": 0}


def test_activations_are_an_estimate_that_checkpointing_shrinks():
    size = memory.sizes(1e6, {"hidden_size": 10, "num_hidden_layers": 4, "vocab_size": 7})
    assert size == memory.Sizes(1_000_000, 10, 4, 7)
    # 2 rows × 3 tokens × 10 hidden × 2 bytes = 120 a layer; 34 bytes an element without checkpointing
    assert plan(size, rows=2, tokens=3, checkpointing=False)["activations"] == 17 * 120 * 4
    assert plan(size, rows=2, tokens=3)["activations"] == 120 * 4 + 17 * 120
    assert [part.name for part in memory.plan(size, **ESTIMATE) if part.estimated] == ["activations"]


ESTIMATE = {
    "dtype": "float32",
    "mixed": False,
    "trainable": 1,
    "zero_stage": 0,
    "world_size": 1,
    "rows": 1,
    "tokens": 1,
}
ESTIMATE |= {"offload_optimizer": False, "offload_param": False, "frozen": {}, "checkpointing": False}


def test_unknown_sizes():
    assert memory.sizes(None, {"hidden_size": 1}) is None
    assert memory.sizes(5, None) == memory.Sizes(5)


def test_lora_parameters_of_mistral():
    # q, o: 2·4096 each; k, v: 4096 + 1024 each; gate, up, down: 4096 + 14336 each = 81 920 · r a layer, times 32
    size = memory.Sizes(7_240_000_000, hidden=4096, layers=32)
    exact = 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert exact == 41_943_040
    assert memory.lora_parameters(size, 16) == pytest.approx(exact, rel=0.15)
    assert memory.lora_parameters(size, 128) == 8 * memory.lora_parameters(size, 16)
    assert memory.lora_parameters(memory.Sizes(7_240_000_000), 16) == pytest.approx(exact, rel=1)
