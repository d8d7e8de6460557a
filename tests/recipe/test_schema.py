"""The schema that people and editors read."""

import copy
import dataclasses

import pytest
import yaml

from align_cli.recipe import places
from align_cli.recipe.check import from_tree, json_schema, load, to_tree
from align_cli.recipe.sections import Recipe
from align_cli.recipe.stages import STAGES

KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


def fits(value, schema, root):
    """Whether a value fits a JSON schema; the words that ours uses, and an error for any other."""
    ignored = {"description", "title", "default", "$schema", "$defs"}
    for word, wanted in schema.items():
        if word in ignored or word in ("additionalProperties", "uniqueItems"):
            continue
        if word == "$ref":
            good = fits(value, root["$defs"][wanted.rsplit("/", 1)[1]], root)
        elif word == "anyOf":
            good = any(fits(value, option, root) for option in wanted)
        elif word == "type":
            good = any(_is(value, kind) for kind in ([wanted] if isinstance(wanted, str) else wanted))
        elif word in ("enum", "const"):
            good = value in wanted if word == "enum" else value == wanted
        elif word == "properties":
            others = schema.get("additionalProperties", True)
            good = not isinstance(value, dict) or all(
                fits(inner, wanted[key], root) if key in wanted else _other(inner, others, root)
                for key, inner in value.items()
            )
        elif word == "required":
            good = not isinstance(value, dict) or set(wanted) <= set(value)
        elif word == "items":
            good = not isinstance(value, list) or all(fits(entry, wanted, root) for entry in value)
        elif word == "minItems":
            good = not isinstance(value, list) or len(value) >= wanted
        elif word == "maxItems":
            good = not isinstance(value, list) or len(value) <= wanted
        else:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            compare = {
                "minimum": lambda bound: value >= bound,
                "maximum": lambda bound: value <= bound,
                "exclusiveMinimum": lambda bound: value > bound,
                "exclusiveMaximum": lambda bound: value < bound,
            }[word]
            good = not number or compare(wanted)
        if not good:
            return False
    return True


def _is(value, kind):
    if kind == "null":
        return value is None
    return isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _other(value, others, root):
    return others if isinstance(others, bool) else fits(value, others, root)


def raw(key):
    return yaml.safe_load(places.listing()[key].read_text())


SHIPPED = sorted(places.listing())
PUBLISHED = {
    "sft": "zephyr",
    "rm": "llama3-8b",
    "ppo": "instructgpt",
    "rloo": "hh",
    "dpo": "zephyr",
    "orpo": "mistral-7b",
    "simpo": "llama3-8b-instruct",
    "kto": "demo",
    "grpo": "demo",
    "cai": "mistral-7b",
    "spin": "zephyr",
}
"""A recipe of each stage that uses config groups or hub ids."""


@pytest.mark.parametrize("key", SHIPPED)
def test_an_editor_accepts_the_shipped_recipes_as_they_are_written(key):
    schema = json_schema(key.split("/")[0])
    for name, value in raw(key).items():
        assert fits(value, schema["properties"][name], schema), f"{name}: {value}"
    assert fits(raw(key), schema, schema)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["nope"], 1),
        (["seed"], "3"),
        (["seed"], True),
        (["seed"], -1),
        (["method", "bta"], 0.1),
        (["method", "beta"], 0),
        (["method", "loss"], "sigmod"),
        (["trainer", "lerning_rate"], 1e-5),
        (["trainer", "learning_rate"], "1e-5"),
        (["trainer", "lr_scheduler_type"], "cosin"),
        (["trainer", "output_dir"], "x"),
        (["zero"], "zero4"),
        (["zero"], {"stage": 4}),
        (["data", "train"], {"weight": 1}),
    ],
)
def test_an_editor_marks_what_is_wrong(key_schema, path, value):
    tree, schema = copy.deepcopy(key_schema)
    assert fits(tree, schema, schema)
    inner = tree
    for part in path[:-1]:
        inner = inner.setdefault(part, {})
    inner[path[-1]] = value
    assert not fits(tree, schema, schema)


@pytest.fixture(scope="module")
def key_schema():
    return raw("dpo/demo"), json_schema("dpo")


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_resolved_recipe_fits_the_schema_too(here, stage):
    schema = json_schema(stage)
    tree = to_tree(load(stage, [f"recipe={PUBLISHED[stage]}", *(["lora=r16"] if stage != "ppo" else [])])[1])
    for key, value in tree.items():
        assert fits(value, schema["properties"][key], schema), f"{key}: {value}"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_docstring_stands_under_every_field(stage):
    seen, common = [], Recipe.__pydantic_fields__

    def read(section):
        for name, field in section.__pydantic_fields__.items():
            inner = section_in(field.annotation)
            # a section says by its own docstring what it is for; the keys of every stage say it in Recipe
            bases = [vars(base).get("__pydantic_fields__", {}) for base in section.__mro__]
            told = any(fields[name].description for fields in [common, *bases] if name in fields)
            assert told or (inner and inner.__doc__), f"{section.__name__}.{name}"
            seen.append(name)
            if inner:
                read(inner)

    read(STAGES[stage].recipe)
    assert {"train", "path", "stage", "num_gpus", "r", "prompts", "run_dir"} <= set(seen)


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_an_editor_is_told_what_the_keys_of_every_stage_are(stage):
    schema = json_schema(stage)
    for key in ("name", "seed", "run_dir", "force", "trainer"):
        assert schema["properties"][key].get("description"), key


def section_in(annotation):
    if dataclasses.is_dataclass(annotation):
        return annotation
    return next((found for part in getattr(annotation, "__args__", ()) if (found := section_in(part))), None)


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_typed_recipe_becomes_a_tree_and_comes_back(here, stage):
    answers = stage != "rm"
    held_out = [] if stage in ("ppo", "rloo", "grpo") else ["data.eval=0.05"]
    words = [f"recipe={PUBLISHED[stage]}", *(["lora=r128"] if stage != "ppo" else []), *held_out]
    words += ["samples={prompts: [hi], max_new_tokens: 3}"] if answers else []
    recipe = load(stage, [*words, "zero=zero3-offload", "zero.config={x: {y: [1, null]}}", "launch.num_gpus=4"])[1]
    back = from_tree(stage, yaml.safe_load(yaml.safe_dump(to_tree(recipe))))
    assert back == recipe and type(back) is STAGES[stage].recipe
    assert back.zero.config == {"x": {"y": [1, None]}} and back.data.eval == (0.05 if held_out else None)
    assert not answers or back.samples.prompts == ["hi"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        back.seed = 1
