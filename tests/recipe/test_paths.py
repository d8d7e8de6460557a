"""A path in a recipe means the same everywhere, and a run is found by its name."""

import project
import pytest
from project import align, ok


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = project.build(tmp_path / "project")
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


@pytest.mark.parametrize("key", ["model.path", "data.train", "run_dir", "samples.prompts"])
def test_the_home_directory_is_found_in_every_path(home, key):
    (home / "asks.jsonl").write_text('{"prompt": "name colours"}\n')
    path = {
        "model.path": "models/tiny",
        "data.train": "sft.jsonl",
        "run_dir": "runs/x",
        "samples.prompts": "asks.jsonl",
    }
    said = ok("check", "sft", "recipe=t", f"{key}=~/project/{path[key]}", cwd=home)
    assert key == "samples.prompts" or str(home / path[key]) in "".join(said.split())


def test_a_user_who_does_not_exist_is_one_line_each(home):
    words = ("model.path=~nobody-here/x", "data.train=~nobody-here/y.jsonl")
    done = align("check", "sft", "recipe=t", *words, cwd=home)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for key in ("model.path", "data.train"):
        (line,) = [line for line in done.stderr.splitlines() if f"{key}:" in line]
        assert "the user 'nobody-here' does not exist" in line


def test_a_prompt_that_begins_with_a_tilde_stays_a_prompt(home):
    from align_cli.recipe.check import load

    _, recipe = load("sft", [f"recipe={home / 'recipes/sft/t.yaml'}", "samples.prompts=['~/5 apples are how many?']"])
    assert recipe.samples.prompts == ["~/5 apples are how many?"]


@pytest.mark.parametrize("form", ["sft.jsonl", "[sft.jsonl]", "{path: sft.jsonl}", "[{path: sft.jsonl, weight: 2.0}]"])
def test_a_part_of_a_source_is_set_from_the_command_line(home, form):
    from align_cli.recipe.check import load

    recipe = f"recipe={home / 'recipes/sft/t.yaml'}"
    _, made = load("sft", [recipe, f"data.train={form}", "data.train[0].weight=0.5"])
    (source,) = made.data.train
    assert (source.path, source.weight) == ("sft.jsonl", 0.5)
    _, made = load("sft", [recipe, f"data.train={form}", "data.train[0].path=other.jsonl"])
    assert made.data.train[0].path == "other.jsonl"


def test_a_part_that_is_not_there_is_one_line(home):
    done = align("check", "sft", "recipe=t", "data.train[3].path=x.jsonl", cwd=home)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("command line: data.train[3].path=x.jsonl: cannot be set here")


def test_a_name_with_a_slash_is_a_run_like_any_other(home):
    for stage in ("sft", "dpo"):
        text = (home / f"recipes/{stage}/t.yaml").read_text().replace("name: t", "name: team/exp")
        project.recipe(
            home, stage, name="slashed", text=text.replace("models/tiny", '"${stage:sft}"') if stage == "dpo" else text
        )
    said = ok("check", "dpo", "recipe=slashed", cwd=home)
    assert "align sft recipe=slashed.yaml" in said
    ok("sft", "recipe=slashed", "trainer.max_steps=1", cwd=home)
    assert "needs" not in ok("check", "dpo", "recipe=slashed", cwd=home)
    assert (home / "runs/team/exp/sft/manifest.json").is_file()


def test_the_recipe_that_makes_a_run_is_found_by_the_name_it_sets(home):
    text = (home / "recipes/sft/t.yaml").read_text().replace("name: t", "name: other")
    project.recipe(home, "sft", name="some-file", text=text)
    said = ok("check", "dpo", "recipe=t", "model.path=runs/other/sft", cwd=home)
    assert "align sft recipe=some-file.yaml" in said
    done = align("dpo", "recipe=t", "model.path=runs/other/sft", cwd=home)
    assert done.returncode == 2 and "align sft recipe=some-file.yaml" in done.stderr
