"""`key=value` on the command line."""

from pathlib import Path

import pytest

from align_cli.errors import RecipeError
from align_cli.recipe.check import load

BARE = "model: { path: models/x }\ndata: { train: a.jsonl }\n"


@pytest.fixture
def mine(here):
    Path("mine.yaml").write_text(BARE)
    Path("three.yaml").write_text("defaults: [/zero: zero3, /lora: r128, _self_]\n" + BARE + "seed: 7\n")


def recipe(*words, stage="sft", file="mine"):
    return load(stage, [f"recipe={file}", *words])[1]


def refused(*words, stage="sft", file="mine"):
    with pytest.raises(RecipeError) as caught:
        recipe(*words, stage=stage, file=file)
    (line,) = caught.value.lines
    return line


def test_what_is_said_last_holds(mine):
    assert recipe("seed=1", "seed=2").seed == 2
    assert recipe("zero=zero1", "zero=zero2").zero.stage == 2
    assert recipe("zero=zero3-offload", "zero.stage=2", "zero.offload_param=false").zero.stage == 2


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_sign_changes_nothing(mine, sign):
    assert recipe(f"{sign}seed=3").seed == 3
    assert recipe(f"{sign}trainer.max_steps=3").trainer == {"max_steps": 3}
    assert recipe(f"{sign}seed=3", file="three").seed == 3


@pytest.mark.parametrize("file", ["mine", "three"])
@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_sign_changes_nothing_for_groups(mine, file, sign):
    assert recipe(f"{sign}zero=zero2", file=file).zero.stage == 2


def test_a_tilde_takes_away_what_the_file_says(mine):
    assert recipe(file="three").seed == 7
    assert recipe("~seed", file="three").seed == 42
    assert recipe("~zero", "~lora", file="three").zero.stage == 0
    assert "~seed: cannot be set here" in refused("~seed")
    assert "~method.nope: cannot be set here" in refused("~method.nope")


def test_a_mapping_is_merged_and_a_list_replaced(mine):
    lora = recipe("lora={r: 8}", file="three").lora
    assert (lora.r, lora.alpha, lora.dropout) == (8, 128, 0.05)
    lora = recipe("lora={r: 8, alpha: 2}").lora
    assert (lora.r, lora.alpha, lora.dropout) == (8, 2, 0)
    words = ("data.train=[a,b]", "data.train=[c]")
    assert [source.path for source in recipe(*words).data.train] == ["c"]
    assert recipe("method.loss=[sigmoid,sft]", stage="dpo").method.loss == ["sigmoid", "sft"]


@pytest.mark.parametrize(
    ("word", "name"),
    [("name=a=b", "a=b"), ('name="a,b"', "a,b"), ("name='1'", "1"), ("name=a b", "a b"), ("name=é", "é")],
)
def test_text_is_text(mine, word, name):
    assert recipe(word).name == name


def test_a_pick_wins_over_the_name_in_the_files_body(mine):
    Path("body.yaml").write_text("defaults: [/zero: zero1, _self_]\n" + BARE + "zero: zero3\n")
    assert recipe(file="body").zero.stage == 3
    assert recipe("zero=zero2", file="body").zero.stage == 2


def test_a_pick_of_nothing(mine):
    assert refused("lora=") == "command line: lora=: no such group file; known: r128, r16"


@pytest.mark.parametrize("value", ["range(1,3)", "choice(1,2)", "interval(1,2)", "sort(3,2,1)"])
def test_a_sweep_by_function_is_refused_with_one_value(mine, value):
    function = value.split("(")[0]
    assert refused(f"seed={value}") == (
        f"command line: seed={value}: {function}(…) is a sweep, but a run needs a single value; write one, or quote "
        "the text"
    )


def test_a_sweep_over_groups_is_refused_with_one_group(mine):
    assert refused("zero=zero1,zero2").endswith("a comma is a sweep, but a run needs a single value; write zero=zero1")


def test_a_comma_is_a_sweep_and_refused_with_the_list_it_may_have_meant(mine):
    assert "write data.train=[a.jsonl,b.jsonl]" in refused("data.train=a.jsonl,b.jsonl")


def test_a_setting_inside_what_is_no_section(mine):
    assert "seed" in refused("seed.x=1") and "model.path" in refused("model.path.x=1")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--beta=3", "write beta=3"),
        ("--beta", "write beta=VALUE"),
        ("-beta=3", "write beta=3"),
        ("beta", "write key=value"),
        ("zephyr.yaml", "write recipe=zephyr.yaml"),
        ("recipe=other", "recipe= is given twice (mine, other); keep one"),
    ],
)
def test_what_is_no_setting(mine, word, said):
    Path("other.yaml").write_text(BARE)
    line = refused(word)
    assert line.startswith("command line: ") and line.endswith(said)


def test_a_group_that_is_not_there(mine):
    assert "Did you mean 'r16'?" in refused("lora=r1")
    assert "known: r128, r16" in refused("lora=zzz")
    assert "write data.train=my.jsonl" in refused("data=my.jsonl")


def test_group_names_may_come_from_the_working_directory(mine):
    Path("recipes/lora").mkdir(parents=True)
    Path("recipes/lora/tiny.yaml").write_text("r: 2\n")
    assert recipe("lora=tiny").lora.r == 2


def test_a_stage_of_the_same_or_of_another_name(mine):
    assert recipe("model.path=${stage:sft}", "name=n", stage="dpo").model.path == "runs/n/sft"
    assert recipe("model.path=${stage:sft}", stage="dpo").model.path == "runs/mine/sft"
    assert recipe("reference.path=${stage:sft,other}", stage="dpo").reference.path == "runs/other/sft"


def test_a_run_keeps_its_name_when_its_recipe_is_run_again(here):
    run = Path("runs/old/sft")
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(BARE)
    again = load("sft", ["recipe=runs/old/sft/recipe.yaml"])[1]
    assert (again.name, again.run_dir) == ("old", "runs/old/sft")
