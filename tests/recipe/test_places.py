"""Which file `recipe=NAME` and a group's name mean."""

from pathlib import Path

import pytest

from align_cli.errors import RecipeError
from align_cli.recipe import places

BARE = "model: { path: models/x }\ndata: { train: a.jsonl }\n"


def write(file, text=BARE):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)
    return Path(file)


def missed(stage, named):
    with pytest.raises(RecipeError) as caught:
        places.find(stage, named)
    (line,) = caught.value.lines
    return line


@pytest.mark.parametrize("named", ["zephyr", "zephyr.yaml"])
def test_path_then_folder_then_shipped_with_or_without_the_ending(here, named):
    assert places.find("sft", named) == places.shipped() / "sft" / "zephyr.yaml"
    write("recipes/dpo/zephyr.yaml")
    assert places.find("sft", named) == places.shipped() / "sft" / "zephyr.yaml", "the folder of another stage"
    folder = write("recipes/sft/zephyr.yaml")
    assert places.find("sft", named) == folder
    path = write("zephyr.yaml")
    assert places.find("sft", named) == path


def test_a_path_may_lead_anywhere(here):
    inside = write("deep/er/mine.yaml")
    assert places.find("sft", "deep/er/mine") == inside
    assert places.find("sft", str(inside.resolve())) == inside.resolve()


def test_a_folder_of_the_name_is_no_recipe(here):
    Path("zephyr.yaml").mkdir()
    assert places.find("sft", "zephyr.yaml") == places.shipped() / "sft" / "zephyr.yaml"


def test_a_miss_names_the_nearest_of_this_stage_and_what_else_has_the_name(here):
    write("recipes/sft/kitten.yaml")
    assert "Did you mean 'kitten'?" in missed("sft", "kiten.yaml")
    line = missed("dpo", "kitten")
    assert "known for dpo: " in line and "zephyr" in line and "other stages have sft/kitten" in line


def test_the_listing_holds_both_shelves_and_the_nearer_wins(here):
    shipped = places.listing()
    assert shipped["dpo/zephyr"] == places.shipped() / "dpo" / "zephyr.yaml"
    mine, other = write("recipes/dpo/zephyr.yaml"), write("recipes/dpo/other.yaml")
    assert places.listing() == shipped | {"dpo/zephyr": mine, "dpo/other": other}


def test_groups_come_from_both_shelves_too(here):
    write("recipes/lora/mine.yaml", "r: 2\n")
    assert {"mine", "r16", "r128"} <= set(places.group_files("lora"))
    assert places.group_files("lora")["mine"] == Path("recipes/lora/mine.yaml")


def test_in_a_checkout_recipes_are_listed_once(monkeypatch):
    monkeypatch.chdir(places.shipped().parent)
    assert [root.resolve() for root in places.roots()] == [places.shipped()]
