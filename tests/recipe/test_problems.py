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
        ("lora: None", "mine.yaml:3: lora: 'None' is read as text; write null"),
        ("method: 5", "mine.yaml:3: method: expected a section with keys train_on, packing, found 5"),
        ("trainer: null", "mine.yaml:3: trainer: expected an object, found NoneType None"),
        ("launch: { num_nodes: 0 }", "mine.yaml:3: launch.num_nodes: expected greater than or equal to 1, found int 0"),
        (
            "launch: { num_gpus: 0 }",
            "mine.yaml:3: launch.num_gpus: expected greater than or equal to 1 or auto, found int 0",
        ),
        ("launch: { num_gpus: all }", "mine.yaml:3: launch.num_gpus: expected an integer or auto, found str 'all'"),
        ("method: { train_on: turns }", "mine.yaml:3: method.train_on: 'turns' is not one of all-turns, last-turn"),
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
        "data.train[1].pth: unknown key. Did you mean 'path'?",
        "data.train[1].weight: expected greater than 0, found int 0",
    ]


def test_an_unknown_key_that_is_near_to_none_is_told_what_there_is(here):
    write("mine.yaml", BARE + "method: { zzz: 1 }\n")
    assert "mine.yaml:3: method.zzz: unknown key; known here: train_on, packing" in problems("sft", "recipe=mine")


def test_an_unknown_key_at_the_top(here):
    write("mine.yaml", BARE + "modle: {}\n")
    assert problems("sft", "recipe=mine") == ["mine.yaml:3: modle: unknown key. Did you mean 'model'?"]


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


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("trainer: { lr_scheduler_kwargs: { num_cycles: .inf } }", "trainer.lr_scheduler_kwargs.num_cycles: is inf"),
        ("zero: { config: { a: [1, .nan] } }", "zero.config.a[1]: is nan"),
        ("data: { train: { path: a, weight: .inf } }", "data.train.weight: is inf"),
        ("data: { train: a, max_dropped: .nan }", "data.max_dropped: is nan"),
    ],
)
def test_numbers_that_are_none_however_deep(here, text, key):
    write("mine.yaml", ("model: { path: x }\n" if text.startswith("data") else BARE) + text + "\n")
    (line,) = problems("dpo", "recipe=mine")
    assert line == f"mine.yaml:{3 - text.startswith('data')}: {key}; give a finite number"


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
    assert problems("sft", "recipe=mine", "data.eval=true") == [
        "command line: data.eval: expected a number or a list, found bool True"
    ]


@pytest.mark.parametrize(
    ("stage", "word", "said"),
    [
        (
            "sft",
            "data.eval=[true]",
            "data.eval[0]: expected a section with keys path, split, subset, data_dir, revision",
        ),
        ("sft", "data.eval={path: 3}", "data.eval[0].path: expected a string, found int 3"),
        ("sft", "samples=[3]", "samples.prompts[0]: expected a string, found int 3"),
        ("sft", "lora.targets=3", "lora.targets: expected a string or a list, found int 3"),
        ("rm", "method.margin=x", "method.margin: expected a number or scores, found str 'x'"),
        ("sft", "data.train=[]", "data.train: is an empty list; name at least one"),
    ],
)
def test_a_value_that_could_be_of_several_types_is_one_problem(here, stage, word, said):
    write("mine.yaml")
    (line,) = problems(stage, "recipe=mine", word)
    assert line.startswith(f"command line: {said}")


# --- where it was written -----------------------------------------------------------------------------------------


def test_a_key_from_a_group_is_placed_in_the_groups_file(here):
    write("recipes/zero/odd.yaml", "# a comment\nstag: 3\n")
    write("mine.yaml", "defaults: [/zero: odd, _self_]\n" + BARE)
    assert problems("sft", "recipe=mine") == ["recipes/zero/odd.yaml:2: zero.stag: unknown key. Did you mean 'stage'?"]


def test_a_key_from_a_picked_group_is_placed_in_the_picked_file(here):
    write("recipes/zero/good.yaml", "stage: 3\n")
    write("recipes/zero/odd.yaml", "# a comment\nstage: 9\n")
    write("mine.yaml", "defaults: [/zero: good, _self_]\n" + BARE)
    (line,) = problems("sft", "recipe=mine", "zero=odd")
    assert line.startswith("recipes/zero/odd.yaml:2: zero.stage: 9 is not one of")
    write("recipes/sft/kid.yaml", "defaults: [base, override /zero: odd, _self_]\nname: kid\n")
    write("recipes/sft/base.yaml", "defaults: [/zero: good, _self_]\n" + BARE)
    (line,) = problems("sft", "recipe=kid")
    assert line.startswith("recipes/zero/odd.yaml:2: zero.stage")


def test_an_entry_of_a_list_has_a_line_of_its_own(here):
    write("recipes/data/mix.yaml", "train:\n  - path: a.jsonl\n    weight: 0\n  - split: test\n")
    write("mine.yaml", "defaults: [/data: mix, _self_]\nmodel: { path: x }\n")
    assert problems("sft", "recipe=mine") == [
        "recipes/data/mix.yaml:3: data.train[0].weight: expected greater than 0, found int 0",
        "recipes/data/mix.yaml:4: data.train[1].path: is missing; set data.train[1].path=…",
    ]


def test_a_key_from_an_inherited_recipe_is_placed_in_that_recipe(here):
    write("recipes/sft/base.yaml", BARE + "seeds: 1\n")
    write("recipes/sft/kid.yaml", "defaults: [base, _self_]\nname: kid\n")
    assert problems("sft", "recipe=kid") == ["recipes/sft/base.yaml:3: seeds: unknown key. Did you mean 'seed'?"]


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


def test_an_inherited_recipe_with_a_key_written_twice(here):
    write("recipes/sft/base.yaml", BARE + "trainer:\n  max_steps: 1\n  max_steps: 2\n")
    write("recipes/sft/kid.yaml", "defaults: [base, _self_]\nname: kid\n")
    assert problems("sft", "recipe=kid") == ["recipes/sft/base.yaml:5: trainer.max_steps is written twice; keep one"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: !!python/object/apply:os.system [ls]", ":3: seed has the tag tag:yaml.org,2002:python/object/"),
        ("seed: !mine 3", ":3: seed has the tag !mine: recipes are data; remove it"),
        ("seed: !!int abc", ": cannot be composed (invalid literal for int()"),
        ("? [a, b]\n: 3", ":3: a sequence is used as a key in the file; write a word"),
        ("zero: &x { config: { a: *x } }", ": cannot be composed (maximum recursion depth"),
        ("name: '${'", ": name: no viable alternative at input '${'; correct the value or quote it"),
        ("model: *nope", ":3: not valid YAML (found undefined alias 'nope'"),
        ("---\nseed: 1", ":3: not valid YAML"),
    ],
)
def test_yaml_that_is_no_plain_data(here, text, said):
    write("mine.yaml", f"{BARE}{text}\n")
    (line,) = problems("sft", "recipe=mine")
    assert line.startswith(f"mine.yaml{said}")


@pytest.mark.parametrize("defaults", ["zephyr", "{ zero: zero3 }", "[3, _self_]", "[null, _self_]", "[/zero: [a]]"])
def test_defaults_that_are_no_list_of_names(here, defaults):
    write("mine.yaml", f"defaults: {defaults}\n{BARE}")
    assert problems("sft", "recipe=mine") == [
        "mine.yaml:1: defaults must be a list such as [/zero: zero3, zephyr, _self_]"
    ]


def test_recipes_that_build_on_each_other(here):
    write("recipes/sft/a.yaml", "defaults: [b, _self_]\n" + BARE)
    write("recipes/sft/b.yaml", "defaults: [a, _self_]\n" + BARE)
    (line,) = problems("sft", "recipe=a")
    assert line.startswith("recipes/sft/b.yaml:1: defaults names 'a', but recipes/sft/a.yaml inherits this file")
    write("recipes/sft/zephyr.yaml", "defaults: [zephyr, _self_]\n")
    (line,) = problems("sft", "recipe=zephyr")
    assert line.startswith("recipes/sft/zephyr.yaml:1: defaults names 'zephyr'")


def test_a_group_that_is_picked_twice(here):
    write("recipes/sft/base.yaml", "defaults: [/zero: zero3, _self_]\n" + BARE)
    write("kid.yaml", "defaults: [base, /zero: zero2, _self_]\nname: kid\n")
    (line,) = problems("sft", "recipe=kid")
    assert line.startswith("kid.yaml: ") and "pick zero twice" in line and "`override /zero: NAME`" in line
    write("kid.yaml", "defaults: [base, override /zero: zero2, _self_]\nname: kid\n")
    assert load("sft", ["recipe=kid"])[1].zero.stage == 2


@pytest.mark.parametrize("file", ["mine.yml", "mine.txt", "mine", "recipes/sft/mine.yml"])
def test_another_ending_than_yaml(here, file):
    write(file)
    assert problems("sft", f"recipe={Path(file).name}") == [
        f"recipe={Path(file).name}: recipes end in .yaml; rename {file} to {Path(file).with_suffix('.yaml')}"
    ]


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


@pytest.mark.parametrize("words", [[], ["name=${nope}"]])
def test_a_name_that_leads_nowhere(here, words):
    write("mine.yaml", BARE + "name: ${nope}\n")
    assert problems("sft", "recipe=mine", *words) == [
        "mine.yaml: name: Interpolation key 'nope' not found; define it or write the value out"
    ]


def test_a_stage_with_too_many_names(here):
    write("mine.yaml", "model: { path: '${stage:sft,a,b}' }\ndata: { train: a }\n")
    (line,) = problems("dpo", "recipe=mine")
    assert line.startswith("mine.yaml: model.path: ${stage:…} takes a stage and, after a comma, the name of a run;")


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


@pytest.mark.parametrize("text", ['{"stage": "sf', "[1]", "3", "null", '{"stage": ["sft"]}', '{"stage": {}}', "\xff"])
def test_a_recipe_beside_a_torn_manifest_is_still_readable(here, text):
    write("elsewhere/recipe.yaml")
    Path("elsewhere/manifest.json").write_bytes(text.encode("latin-1"))
    assert load("sft", ["recipe=elsewhere/recipe.yaml"])[1].model.path == "models/x"


def test_folders_of_a_working_directory_may_be_called_as_stages_and_groups_are(here):
    for folder in ("sft", "dpo", "zero", "data", "model"):
        write(f"{folder}/mine.yaml")
    write("mine.yaml", "defaults: [/zero: zero3, _self_]\n" + BARE)
    assert load("dpo", ["recipe=mine.yaml"])[1].zero.stage == 3
    assert load("dpo", ["recipe=sft/mine.yaml"])[1].name == "mine"


def test_a_working_directory_may_be_called_as_a_stage_is(here, monkeypatch):
    write("sft/mine.yaml")
    write("o'neil/recipes/dpo/mine.yaml")
    for folder in ("sft", "o'neil"):
        monkeypatch.chdir(here / folder)
        assert load("dpo", ["recipe=mine.yaml"])[1].name == "mine"
