"""The recipe's `zero:` as a DeepSpeed config."""

import json

import pytest

from align_cli.model.zero import deepspeed_config
from align_cli.recipe.check import load
from align_cli.recipe.sections import Zero


def test_nothing_sharded_is_no_deepspeed():
    assert deepspeed_config(Zero()) is None
    assert deepspeed_config(Zero(config={"comms_logger": {}}))["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize(
    ("picked", "expected"),
    [
        ("zero1", {"stage": 1}),
        ("zero2", {"stage": 2}),
        ("zero3", {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}),
        (
            "zero3-offload",
            {
                "stage": 3,
                "stage3_gather_16bit_weights_on_model_save": True,
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "cpu"},
            },
        ),
    ],
)
def test_the_shipped_groups(here, picked, expected):
    config = deepspeed_config(load("sft", ["recipe=demo", f"zero={picked}"])[1].zero)
    assert config["zero_optimization"] == expected
    json.dumps(config)


def test_what_trips_deepspeed_is_set_and_what_trips_a_frozen_model_left_out():
    config = deepspeed_config(Zero(stage=2))
    assert config["zero_force_ds_cpu_optimizer"] is False and config["zero_allow_untested_optimizer"] is True
    assert "train_batch_size" not in config
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == "auto"


def test_keys_of_the_recipe_win_and_leave_the_rest():
    config = deepspeed_config(Zero(stage=2, config={"zero_optimization": {"stage": 1, "x": 2}, "bf16": {"y": 1}}))
    assert config["zero_optimization"] == {"stage": 1, "x": 2}
    assert config["bf16"] == {"enabled": "auto", "y": 1}
    # a mapping is merged, anything else replaced
    assert deepspeed_config(Zero(stage=2, config={"fp16": False}))["fp16"] is False
