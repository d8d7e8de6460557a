"""YAML and overrides -> a typed recipe, or every problem at once."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from align_cli.errors import RecipeError
from align_cli.recipe import places, trl_config
from align_cli.recipe.check import check, from_tree, json_schema, load, to_tree
from align_cli.recipe.compose import compose
from align_cli.recipe.stages import STAGES

BARE = "model: { path: models/x }\ndata: { train: a.jsonl }\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(file: str, text: str = BARE) -> Path:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)
    return Path(file)


def problems(stage, *arguments):
    with pytest.raises(RecipeError) as caught:
        load(stage, list(arguments))
    return list(caught.value.lines)


# --- which file ---------------------------------------------------------------------------------------------------


def test_a_path_comes_before_the_folder_and_the_folder_before_what_is_shipped(here):
    assert compose("dpo", ["recipe=zephyr.yaml"]).file == places.shipped() / "dpo" / "zephyr.yaml"
    mine = write("recipes/dpo/zephyr.yaml")
    assert compose("dpo", ["recipe=zephyr"]).file == mine
    nearest = write("zephyr.yaml")
    assert compose("dpo", ["recipe=zephyr"]).file == nearest


def test_a_miss_names_the_nearest(here):
    (line,) = problems("dpo", "recipe=zepyr")
    assert "Did you mean 'zephyr'?" in line


def test_no_recipe(here):
    (line,) = problems("dpo")
    assert line == "command line: no recipe; add recipe=NAME.yaml (`align recipes` lists them)"


def test_the_name_is_the_files_unless_given_and_the_run_goes_under_it(here):
    write("mine.yaml")
    _, recipe = load("sft", ["recipe=mine"])
    assert (recipe.name, recipe.run_dir, recipe.seed) == ("mine", "runs/mine/sft", 42)
    assert load("sft", ["recipe=mine", "name=other"])[1].run_dir == "runs/other/sft"


@pytest.mark.parametrize("key", sorted(places.listing()))
def test_every_shipped_recipe_checks(key):
    stage, name = key.split("/")
    composed, recipe = load(stage, [f"recipe={name}"])
    first = composed.file.read_text().splitlines()[0]
    assert first.startswith(f"# align {stage} recipe={name}.yaml"), "a recipe opens with the line that launches it"


def test_zephyr_carries_the_published_settings():
    _, dpo = load("dpo", ["recipe=zephyr"])
    _, sft = load("sft", ["recipe=zephyr"])
    assert dpo.method.beta == 0.01 and dpo.method.loss == ["sigmoid"]
    assert dpo.model.path == "runs/zephyr/sft" and sft.model.path == "mistralai/Mistral-7B-v0.1"
    assert (dpo.data.max_length, dpo.data.max_prompt_length, sft.data.max_length) == (1024, 512, 2048)
    for recipe, rate in ((dpo, 5e-7), (sft, 2e-5)):
        block = recipe.trainer
        assert block["learning_rate"] == rate and block["lr_scheduler_type"] == "cosine"
        assert block["warmup_steps"] == 0.1 and block["num_train_epochs"] == 1
        assert recipe.data.batch_size == 128 and recipe.zero.stage == 3


# --- groups, inheritance, overrides -------------------------------------------------------------------------------


def test_groups_can_be_picked_whether_or_not_the_recipe_names_them(here):
    write("mine.yaml", "defaults: [/zero: zero3, _self_]\n" + BARE)
    assert load("sft", ["recipe=mine"])[1].zero.stage == 3
    assert load("sft", ["recipe=mine", "zero=zero2"])[1].zero.stage == 2
    assert load("sft", ["recipe=mine", "lora=r16"])[1].lora.r == 16
    assert load("sft", ["recipe=mine", "lora=r16", "lora.r=8"])[1].lora.r == 8
    assert load("sft", ["recipe=mine", "zero=zero3-offload"])[1].zero.offload_param


def test_a_group_may_be_named_in_the_body_too(here):
    write("mine.yaml", BARE + "zero: zero2\n")
    assert load("sft", ["recipe=mine"])[1].zero.stage == 2


def test_a_recipe_builds_on_a_shipped_one(here):
    write("recipes/dpo/mine.yaml", "defaults: [zephyr, _self_]\nname: mine\nmethod: { beta: 0.05 }\n")
    _, recipe = load("dpo", ["recipe=mine"])
    assert recipe.method.beta == 0.05 and recipe.trainer["learning_rate"] == 5e-7
    assert recipe.model.path == "runs/mine/sft"


def test_the_working_directory_hides_a_shipped_group(here):
    write("recipes/zero/zero2.yaml", "stage: 1\n")
    write("mine.yaml")
    assert load("sft", ["recipe=mine", "zero=zero2"])[1].zero.stage == 1


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["trainer.learning_rate=2e-5"], ("trainer", "learning_rate"), 2e-5),
        (["+trainer.learning_rate=2e-5"], ("trainer", "learning_rate"), 2e-5),
        (["run_dir=runs/lr=5e-7"], ("run_dir",), "runs/lr=5e-7"),
        (["lora={r: 8}"], ("lora", "r"), 8),
        (["lora=r16", "lora=null"], ("lora",), None),
        (["data.train=[b.jsonl,{path: c.jsonl,weight: 2}]"], ("data", "train", 1, "weight"), 2),
        (["data.train={path: b.csv}"], ("data", "train", 0, "path"), "b.csv"),
        (["data.train=../up/b.jsonl"], ("data", "train", 0, "path"), "../up/b.jsonl"),
        (["~name"], ("name",), "mine"),
        (["model.path=${stage:sft}"], ("model", "path"), "runs/mine/sft"),
        (["model.path=${stage:sft,other}"], ("model", "path"), "runs/other/sft"),
    ],
)
def test_overrides(here, words, path, value):
    write("mine.yaml", "name: mine\n" + BARE)
    tree = to_tree(load("sft", ["recipe=mine", *words])[1])
    for key in path:
        tree = tree[key]
    assert tree == value


def test_a_comma_is_no_list(here):
    write("mine.yaml")
    (line,) = problems("sft", "recipe=mine", "seed=1,2")
    assert "seed=[1,2]" in line


def test_what_looks_like_an_option_is_answered_with_the_setting(here):
    write("mine.yaml")
    assert problems("dpo", "recipe=mine", "--beta=3", "stray") == [
        "command line: --beta=3 is not an option; write beta=3",
        "command line: 'stray' is not a setting; write key=value",
    ]


def test_a_group_name_that_is_none(here):
    write("mine.yaml")
    (line,) = problems("sft", "recipe=mine", "zero=zero4")
    assert "Did you mean 'zero" in line
    (line,) = problems("sft", "recipe=mine", "model=gpt2")
    assert "write model.path=gpt2" in line


# --- what is refused ----------------------------------------------------------------------------------------------


def test_all_problems_come_at_once_each_with_its_place(here):
    write(
        "mine.yaml",
        "model: { path: models/x, dtyp: auto }\ndata:\n  train: a.jsonl\n  max_lenght: 10\nmethod:\n  beta: '0.1'\n",
    )
    lines = problems("dpo", "recipe=mine", "+method.bta=1", "trainer.lerning_rate=1", "lora=None", "seed=true")
    assert sorted(lines) == sorted(
        [
            "mine.yaml:1: model.dtyp: unknown key. Did you mean 'dtype'?",
            "mine.yaml:4: data.max_lenght: unknown key. Did you mean 'max_length'?",
            "mine.yaml:6: method.beta: expected a number, found str '0.1'",
            "command line: method.bta: unknown key. Did you mean 'beta'?",
            "command line: trainer.lerning_rate: unknown key. Did you mean 'learning_rate'?",
            "command line: lora: 'None' is read as text; write null",
            "command line: seed: expected an integer, found bool True",
        ]
    )


def test_a_literal_names_what_is_known_and_what_is_near(here):
    write("mine.yaml")
    (line,) = problems("dpo", "recipe=mine", "method.loss=sigmod")
    assert "'sigmod' is not one of sigmoid, cdpo" in line and "Did you mean 'sigmoid'?" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method.loss=[sigmoid,ipo]", "method.loss_weights=[1]"], "has 1 weights for 2 losses; give one per loss"),
        (["method.loss=exo_pair"], "must be above 0 for exo_pair"),
        (["zero.offload_param=true"], "needs stage 3"),
        (["method.beta=inf"], "give a finite number"),
        (["method.beta=0"], "greater than 0"),
    ],
)
def test_rules(here, words, said):
    write("mine.yaml")
    (line,) = problems("dpo", "recipe=mine", *words)
    assert said in line


def test_missing_sections_are_named(here):
    write("mine.yaml", "name: x\n")
    assert [line.split(": ", 1)[1] for line in problems("sft", "recipe=mine")] == [
        "model: is missing; set model=…",
        "data: is missing; set data=…",
    ]


def test_recipes_are_data(here):
    write("mine.yaml", BARE + "trainer: { optim: { _target_: os.system } }\n")
    (line,) = problems("sft", "recipe=mine")
    assert "recipes are data, never code" in line


def test_a_broken_file_is_named_with_its_line(here):
    write("mine.yaml", "model: { path: x }\ndata: [\n")
    (line,) = problems("sft", "recipe=mine")
    assert line.startswith("mine.yaml:3: not valid YAML")


def test_groups_must_not_win_over_the_file_in_silence(here):
    write("mine.yaml", "defaults: [/zero: zero3]\n" + BARE)
    (line,) = problems("sft", "recipe=mine")
    assert line.startswith("mine.yaml:1: defaults lacks _self_")


def test_a_default_that_is_not_there(here):
    write("mine.yaml", "defaults: [/zero: zero33, _self_]\n" + BARE)
    (line,) = problems("sft", "recipe=mine")
    assert "zero/zero33" in line and "Did you mean 'zero3'?" in line


def test_an_interpolation_that_leads_nowhere(here):
    write("mine.yaml", BARE + "run_dir: runs/${nope}\n")
    (line,) = problems("sft", "recipe=mine")
    assert "run_dir" in line and "nope" in line


def test_a_recipe_of_another_stage(here):
    file = write("recipes/sft/mine.yaml")
    (line,) = problems("dpo", f"recipe={file}")
    assert f"`align sft recipe={file}`" in line
    write("loose.yaml", BARE + "method: { train_on: last-turn }\n")
    assert any("a recipe for `align sft`" in line for line in problems("dpo", "recipe=loose"))


# --- the trainer block --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_the_fields_read_from_source_are_those_of_the_installed_class(stage):
    import transformers
    import trl

    config = STAGES[stage].config
    installed = getattr(trl if config.file else transformers, config.name)
    assert set(trl_config.fields(stage)) == {field.name for field in dataclasses.fields(installed) if field.init}
    for field in dataclasses.fields(installed):
        literal = trl_config.fields(stage)[field.name].default
        if isinstance(literal, (bool, int, float)) and field.default is not dataclasses.MISSING:
            assert literal == field.default, field.name


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"learning_rate": "5e-7"}, "expected float, found str '5e-7'"),
        ({"num_train_epochs": True}, "expected float, found bool True"),
        ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'?"),
        ({"warmup_ratio": 0.1}, "write warmup_steps=0.1"),
        ({"beta": 0.1}, "is set by method.beta"),
        ({"output_dir": "x"}, "is set by run_dir"),
        ({"resume_from_checkpoint": "x"}, "is set by the run itself"),
        ({"max_length": 5}, "is set by data.max_length"),
        ({"per_device_train_batch_sise": 5}, "Did you mean 'per_device_train_batch_size'?"),
    ],
)
def test_trainer_problems(block, said):
    ((place, text),) = trl_config.problems("dpo", block)
    assert place == f"trainer.{next(iter(block))}" and said in text


@pytest.mark.parametrize(
    "block",
    [
        {"learning_rate": 1, "warmup_steps": 0.1, "report_to": ["wandb"], "optim": "rmsprop"},
        {"lr_scheduler_kwargs": {"num_cycles": 2}, "max_steps": 5, "fp16": True, "save_strategy": "epoch"},
    ],
)
def test_what_the_config_takes_is_taken(block):
    assert trl_config.problems("sft", block) == []


# --- what is written out ------------------------------------------------------------------------------------------


WORDS = {"rm": ["lora=r16"], "ppo": ["samples=[hello]"]}
"""What a stage takes of lora and samples, where it does not take both."""


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_resolved_recipe_is_a_recipe(here, stage):
    name = max(key for key in places.listing() if key.startswith(f"{stage}/")).split("/")[1]
    _, recipe = load(stage, [f"recipe={name}", *WORDS.get(stage, ["lora=r16", "samples=[hello]"])])
    text = yaml.safe_dump(to_tree(recipe), sort_keys=False, allow_unicode=True)
    assert from_tree(stage, yaml.safe_load(text)) == recipe
    write(f"runs/zephyr/{stage}/recipe.yaml", text)
    assert check(compose(stage, [f"recipe=runs/zephyr/{stage}/recipe.yaml"])) == recipe


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_the_json_schema_describes_every_key_and_knows_trls(stage):
    schema = json_schema(stage)
    json.dumps(schema)
    for name, section in schema["$defs"].items():
        for key, entry in section.get("properties", {}).items():
            assert entry.get("description") or "$ref" in entry, f"{name}.{key} says nothing"
    block = schema["properties"]["trainer"]
    assert block["additionalProperties"] is False
    assert "cosine" in block["properties"]["lr_scheduler_type"]["enum"]
    assert block["properties"]["learning_rate"]["description"]
    assert "beta" not in block["properties"] and "output_dir" not in block["properties"]
    assert "zero2" in json.dumps(schema["properties"]["zero"])
    assert not schema.get("required")


def test_constitutional_ai_asks_the_red_team_prompts_alone():
    from align_cli.recipe.check import load

    _, recipe = load("cai", ["recipe=mistral-7b"])
    assert (recipe.data.train[0].path, recipe.data.train[0].data_dir) == ("Anthropic/hh-rlhf", "harmless-base")
