"""What a recipe is refused for, with the place where it was written."""

from pathlib import Path

import pytest

from align_cli.errors import RecipeError
from align_cli.recipe.check import load

BARE = "model: { path: models/x }\ndata: { train: a.jsonl }\n"


def write(file, text=BARE):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)
    return Path(file)


def problems(stage, *arguments):
    with pytest.raises(RecipeError) as caught:
        load(stage, list(arguments))
    lines = list(caught.value.lines)
    assert lines and not any("\n" in line for line in lines), "one line a problem"
    return lines


# --- types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: '3'", "mine.yaml:3: seed: expected an integer, found str '3'"),
        ("seed: true", "mine.yaml:3: seed: expected an integer, found bool True"),
        ("seed: 1.5", "mine.yaml:3: seed: expected an integer, found float 1.5"),
        ("seed: -1", "mine.yaml:3: seed: expected greater than or equal to 0, found int -1"),
        ("force: 1", "mine.yaml:3: force: expected a boolean, found int 1"),
        ("force: 'no'", "mine.yaml:3: force: expected a boolean, found str 'no'"),
        ("name: 2024", "mine.yaml:3: name: expected a string, found int 2024"),
        ("lora: None", "mine.yaml:3: lora: 'None' is text here; write null for nothing"),
        ("method: 5", "mine.yaml:3: method: expected a section with keys train_on, packing, found 5"),
        ("trainer: null", "mine.yaml:3: trainer: expected an object, found NoneType None"),
        ("launch: { num_gpus: 0 }", "mine.yaml:3: launch.num_gpus: expected greater than or equal to 1, found int 0"),
        ("method: { train_on: turns }", "mine.yaml:3: method.train_on: 'turns' is none of all-turns, last-turn"),
    ],
)
def test_a_wrong_value(here, text, line):
    write("mine.yaml", f"{BARE}{text}\n")
    (said,) = problems("sft", "recipe=mine")
    assert said.startswith(line)


def test_null_is_nothing_and_takes_a_default_away(here):
    write("mine.yaml", "defaults: [/lora: r16, _self_]\n" + BARE + "data: null\n".replace("data", "samples"))
    assert load("sft", ["recipe=mine"])[1].lora.r == 16
    recipe = load("sft", ["recipe=mine", "lora=null"])[1]
    assert recipe.lora is None and recipe.samples is None


def test_every_entry_of_a_list_of_sources_is_checked(here):
    write("mine.yaml", "model: { path: x }\ndata:\n  train:\n    - a.jsonl\n    - { pth: b, weight: 0 }\n")
    assert sorted(line.split(": ", 1)[1] for line in problems("sft", "recipe=mine")) == [
        "data.train[1].path: is missing; set data.train[1].path=…",
        "data.train[1].pth: unknown key, did you mean 'path'?",
        "data.train[1].weight: expected greater than 0, found int 0",
    ]


def test_an_unknown_key_that_is_near_to_none_is_told_what_there_is(here):
    write("mine.yaml", BARE + "method: { zzz: 1 }\n")
    assert "mine.yaml:3: method.zzz: unknown key; known here: train_on, packing" in problems("sft", "recipe=mine")


def test_an_unknown_key_at_the_top(here):
    write("mine.yaml", BARE + "modle: {}\n")
    assert problems("sft", "recipe=mine") == ["mine.yaml:3: modle: unknown key, did you mean 'model'?"]


def test_a_setting_of_another_stage_is_unknown_here(here):
    write("mine.yaml", BARE)
    (line,) = problems("sft", "recipe=mine", "reference.path=x")
    assert ": reference: unknown key; known here: name, model, data" in line


def test_a_section_that_only_the_command_line_names_is_placed_there(here):
    write("mine.yaml", BARE)
    (line,) = problems("sft", "recipe=mine", "reference.path=x")
    assert line.startswith("command line: ")


def test_numbers_that_are_none(here):
    write("mine.yaml", BARE + "method: { beta: .nan }\n")
    assert any("method.beta" in line for line in problems("dpo", "recipe=mine"))


def test_numbers_that_are_none_in_a_list(here):
    write("more.yaml", BARE + "method: { loss_weights: [.inf] }\n")
    assert any("method.loss_weights" in line for line in problems("dpo", "recipe=more"))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_none_in_the_trainer_block(here, value):
    write("mine.yaml")
    (line,) = problems("sft", "recipe=mine", f"trainer.learning_rate={value}")
    assert line.startswith("command line: trainer.learning_rate:") and "finite" in line


def test_a_boolean_where_a_fraction_is_wanted_is_one_problem(here):
    write("mine.yaml")
    (line,) = problems("sft", "recipe=mine", "data.eval=true")
    assert line.startswith("command line: data.eval:")


# --- where it was written -----------------------------------------------------------------------------------------


def test_a_key_from_a_group_is_placed_in_the_groups_file(here):
    write("recipes/zero/odd.yaml", "# a comment\nstag: 3\n")
    write("mine.yaml", "defaults: [/zero: odd, _self_]\n" + BARE)
    assert problems("sft", "recipe=mine") == ["recipes/zero/odd.yaml:2: zero.stag: unknown key, did you mean 'stage'?"]


def test_a_key_from_an_inherited_recipe_is_placed_in_that_recipe(here):
    write("recipes/sft/base.yaml", BARE + "seeds: 1\n")
    write("recipes/sft/kid.yaml", "defaults: [base, _self_]\nname: kid\n")
    assert problems("sft", "recipe=kid") == ["recipes/sft/base.yaml:3: seeds: unknown key, did you mean 'seed'?"]


def test_the_command_line_is_the_place_of_what_was_set_there(here):
    write("mine.yaml", BARE + "seed: 1\n")
    assert problems("sft", "recipe=mine", "seed=x", "+lora.rank=3") == [
        "command line: seed: expected an integer, found str 'x'",
        "command line: lora.rank: unknown key; known here: r, alpha, dropout, targets",
    ]


# --- files that cannot be read ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected keys such as model: and data:, found nothing"),
        ("- a\n- b\n", "found no mapping"),
        ("model: { path: x }\ndata:\n\ttrain: a\n", "mine.yaml:3: not valid YAML"),
        ("model: { path: x }\ndata: { train: 'a }\n", "not valid YAML"),
    ],
)
def test_what_is_no_recipe(here, text, said):
    write("mine.yaml", text)
    (line,) = problems("sft", "recipe=mine")
    assert line.startswith("mine.yaml") and said in line


def test_text_that_is_not_utf8(here):
    Path("mine.yaml").write_bytes(b"name: \xff\n")
    (line,) = problems("sft", "recipe=mine")
    assert line.startswith("mine.yaml: not UTF-8")


def test_a_key_written_twice(here):
    write("mine.yaml", BARE + "seed: 1\nseed: 2\n")
    (line,) = problems("sft", "recipe=mine")
    assert line.startswith("mine.yaml:4: ") and "seed" in line


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["zero=bad"], BARE),
        ([], "defaults: [/zero: bad, _self_]\n" + BARE),
        ([], BARE + "zero: bad\n"),
    ],
    ids=["picked", "in defaults", "in the body"],
)
def test_a_group_file_with_broken_yaml_is_named_with_its_line(here, words, text):
    write("recipes/zero/bad.yaml", "stage: 3\nconfig: [\n")
    write("mine.yaml", text)
    (line,) = problems("sft", "recipe=mine", *words)
    assert "recipes/zero/bad.yaml:3: not valid YAML" in line


def test_an_inherited_recipe_with_broken_yaml_is_named_with_its_line(here):
    write("recipes/sft/base.yaml", "model: [\n")
    write("recipes/sft/kid.yaml", "defaults: [base, _self_]\nname: kid\n")
    (line,) = problems("sft", "recipe=kid")
    assert "recipes/sft/base.yaml:2: not valid YAML" in line


def test_another_ending_than_yaml(here):
    write("mine.yml")
    (line,) = problems("sft", "recipe=mine.yml")
    assert "mine.yml" in line and ".yaml" in line and "defaults" not in line


# --- interpolation, code ------------------------------------------------------------------------------------------


def test_every_interpolation_that_leads_nowhere_is_named(here):
    write("mine.yaml", "model: { path: 'runs/${nope}' }\ndata: { train: '${data.path}' }\n")
    first, second = problems("sft", "recipe=mine")
    assert first.startswith("mine.yaml: model.path: ") and "'nope'" in first
    assert second.startswith("mine.yaml: data.train: ") and "data.path" in second


def test_interpolations_that_go_in_a_circle(here):
    write("mine.yaml", "model: { path: '${name}' }\ndata: { train: '${model.path}' }\nname: x\n")
    assert load("sft", ["recipe=mine"])[1].data.train[0].path == "x"
    write("round.yaml", "model: { path: '${data.train}' }\ndata: { train: '${model.path}' }\n")
    assert all("Recursive" in line for line in problems("sft", "recipe=round"))


def test_a_name_that_leads_nowhere(here):
    write("mine.yaml", BARE + "name: ${nope}\n")
    (line,) = problems("sft", "recipe=mine")
    assert "name" in line and "nope" in line


@pytest.mark.parametrize(
    "text",
    [
        "_target_: os.system\n",
        "trainer: { optim: { _target_: torch.optim.SGD } }\n",
        "trainer: { x: [1, { _partial_: true }] }\n",
    ],
)
def test_code_is_refused_however_deep(here, text):
    write("mine.yaml", BARE + text)
    assert all("recipes are data, never code; remove it" in line for line in problems("sft", "recipe=mine"))


def test_code_is_refused_on_the_command_line(here):
    write("mine.yaml")
    (line,) = problems("sft", "recipe=mine", "+model._target_=os.system")
    assert "model._target_: recipes are data" in line


def test_a_mapping_that_a_group_brings_is_data_too(here):
    write("recipes/zero/odd.yaml", "stage: 1\nconfig: { _target_: os.system }\n")
    write("mine.yaml")
    (line,) = problems("sft", "recipe=mine", "zero=odd")
    assert "zero.config._target_" in line


# --- recipes of another stage -------------------------------------------------------------------------------------


def test_the_recipe_of_a_run_is_for_the_stage_of_its_manifest(here):
    write("elsewhere/recipe.yaml")
    write("elsewhere/manifest.json", '{"stage": "sft", "status": "complete"}')
    (line,) = problems("dpo", "recipe=elsewhere/recipe.yaml")
    assert line.startswith("elsewhere/recipe.yaml: is a recipe for `align sft`")


def test_a_recipe_beside_a_torn_manifest_is_still_readable(here):
    write("elsewhere/recipe.yaml")
    write("elsewhere/manifest.json", '{"stage": "sf')
    assert load("sft", ["recipe=elsewhere/recipe.yaml"])[1].model.path == "models/x"
