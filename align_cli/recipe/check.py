"""Turns a composed tree into the typed recipe, or reports all its problems: file and line, key, finding, remedy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from align_cli.errors import RecipeError, did_you_mean
from align_cli.recipe import files, places
from align_cli.recipe import trl_config as trainer
from align_cli.recipe.compose import Composed, compose
from align_cli.recipe.places import GROUPS
from align_cli.recipe.sections import Recipe
from align_cli.recipe.stages import STAGES

EXPECTED = re.compile(r"expected (.+), found (.+)", re.DOTALL)


@cache
def _adapter(stage: str) -> TypeAdapter:
    return TypeAdapter(STAGES[stage].recipe)


def load(stage: str, arguments: list[str]) -> tuple[Composed, Recipe]:
    """Compose and check the recipe of `align <stage> recipe=… [key=value …]`.

    Raises RecipeError with all problems found.
    """
    composed = compose(stage, arguments)
    return composed, check(composed)


def check(composed: Composed) -> Recipe:
    """The typed recipe of a composed tree.

    Raises RecipeError with every unknown key, wrong type, broken rule and bad `trainer:` field.
    """
    stage, tree, problems = composed.stage, composed.tree, list(_not_finite(composed.tree))
    try:
        recipe = from_tree(stage, tree)
    except ValidationError as error:
        recipe = None
        infinite = {key for key, _ in problems}
        explained = _joined([_explain(stage, tree, detail) for detail in error.errors()])
        problems += [(key, text) for key, text in explained if key not in infinite]
    if recipe is not None:
        problems += [problem for problem in _rules(recipe)]
    if isinstance(tree.get("trainer"), dict):
        problems += trainer.problems(stage, tree["trainer"])
    if not problems and not composed.problems:
        return recipe
    sources = _Sources(composed)
    lines = [*composed.problems, *(f"{sources.where(key)}{key}: {text}" for key, text in problems)]
    method = tree.get("method")
    if isinstance(method, dict) and (other := _stage_of_method(stage, set(method))):
        lines.append(f"{composed.file}: method: has the keys of a recipe for `align {other}`; run that instead")
    raise RecipeError(*dict.fromkeys(lines))


def from_tree(stage: str, tree: dict[str, Any]) -> Recipe:
    """The typed recipe of a plain tree. Raises pydantic's ValidationError."""
    # Strict JSON mode: '3' is not a number and 1 not a boolean, but mappings may become sections.
    return _adapter(stage).validate_json(json.dumps(tree, allow_nan=True), strict=True)


def partial(composed: Composed) -> Recipe:
    """The valid part of the recipe, so that models and data can be checked together with an invalid recipe.

    An invalid section gets its default, which is None for `model` and `data`.
    """
    return _partial(STAGES[composed.stage].recipe, composed.tree)


def _partial(cls: type, tree: dict[str, Any]) -> Any:
    """A section with its valid fields, and defaults for the others."""
    made, hints = object.__new__(cls), get_type_hints(cls, include_extras=True)
    for name, field in cls.__pydantic_fields__.items():
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        if name in tree:
            value = _validated(hints[name], tree[name], value)
        object.__setattr__(made, name, value)
    return made


def _validated(hint: Any, given: Any, default: Any) -> Any:
    """A value of the annotated type, or the valid part of a section or of a list of sections, or the default."""
    try:
        return TypeAdapter(hint).validate_json(json.dumps(given), strict=True)
    except (ValidationError, ValueError, TypeError):
        section = _section_in(hint)
    if section is None:
        return default
    if isinstance(given, list):
        entries = (_validated(section, {"path": one} if isinstance(one, str) else one, None) for one in given)
        return [one for one in entries if one is not None] or default
    required = {name for name, field in section.__pydantic_fields__.items() if field.is_required()}
    if not isinstance(given, dict) or not required <= set(given):
        return default
    made = _partial(section, given)
    return default if any(getattr(made, name) is None for name in required) else made


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """The plain tree of a typed recipe, with all defaults filled in."""
    return asdict(recipe)


def json_schema(stage: str) -> dict[str, Any]:
    """A JSON schema with which an editor can complete and check recipes, including the fields of TRL's config."""
    schema = _adapter(stage).json_schema()
    names = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "None": "null"}
    block = {}
    for key, field in trainer.fields(stage).items():
        if trainer.owner(stage, key)[0]:
            continue
        kinds = [names[kind] for part in field.annotation.split("|") if (kind := part.strip()) in names]
        entry: dict[str, Any] = {"type": kinds} if len(kinds) == len(field.annotation.split("|")) else {}
        if values := trainer.choices(trainer.ENUMS.get(key, "")):
            entry = {"enum": list(values)}
        if also := trainer.ALSO.get(key):
            entry = {"anyOf": [entry, {"enum": list(also)}]}
        block[key] = entry | ({"description": field.help} if field.help else {})
    schema["properties"]["trainer"] |= {"properties": block, "additionalProperties": False}
    schema["properties"]["defaults"] = {
        "type": "array",
        "description": f"Config groups ({', '.join(GROUPS)}) and recipes that this one inherits; _self_ must be last.",
    }
    # name and run_dir have defaults from the file's name; the others may come from inherited files
    schema["required"] = [
        key for key in schema.get("required", []) if key not in ("name", "run_dir", "model", "data", "reward")
    ]
    recipe = STAGES[stage].recipe
    method = _adapter_type(recipe, "method")
    for section, block in ((recipe, schema), (method, schema["$defs"].get(method.__name__, {}))):
        # pydantic drops the docstrings of inherited fields
        for base in section.__mro__:
            for key, field in vars(base).get("__pydantic_fields__", {}).items():
                if key in block.get("properties", {}) and field.description:
                    block["properties"][key].setdefault("description", field.description)
    for section in ("Model", "Data"):
        # a config group may set keys that the file does not
        schema["$defs"][section].pop("required", None)
    for group in GROUPS:
        if group in schema["properties"]:
            body = schema["properties"].pop(group)
            choices = {"type": "string", "enum": list(places.group_files(group))} if places.group_files(group) else {}
            schema["properties"][group] = {"anyOf": [body, choices]} if choices else body
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"align {stage} recipe"} | {
        key: value for key, value in schema.items() if key != "title"
    }


def _rules(section: Any, path: str = "") -> list[tuple[str, str]]:
    """Cross-field problems of a section and of its subsections."""
    problems = list(section.rules()) if hasattr(section, "rules") else []
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            problems += _rules(value, f"{path}{field.name}.")
    return problems


def _not_finite(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """A problem for every nan or infinity in a tree."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _not_finite(inner, f"{path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"is {value}; give a finite number"


def _explain(stage: str, tree: dict[str, Any], detail: dict[str, Any]) -> tuple[str, str]:
    """(dotted key, message) for a pydantic error."""
    location = [part for part in detail["loc"] if not _is_tag(part)]
    key, kind, given = _dotted(location), detail["type"], detail.get("input")
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(stage, location[:-1])
        listed = f"; known here: {', '.join(known)}" if known else ""
        return key, f"unknown key{did_you_mean(str(location[-1]), known) or listed}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return key, f"is missing; set {key}=…"
    if kind == "literal_error":
        allowed = detail["ctx"]["expected"].replace(" or ", ", ").replace("'", "")
        return key, f"{given!r} is not one of {allowed}{did_you_mean(str(given), allowed.split(', '))}"
    if given == "None":
        return key, "'None' is read as text; write null"
    if kind == "dataclass_type":
        return key, f"expected a section with keys {', '.join(_known_keys(stage, location))}, found {given!r}"
    if kind == "too_short" and not given:
        return key, "is an empty list; name at least one"
    message = (
        detail["msg"]
        .replace("Input should be", "expected")
        .replace("expected a valid int", "expected an int")
        .replace("expected a valid array", "expected a list")
        .replace("expected a valid", "expected a")
    )
    return key, f"{message}, found {type(given).__name__} {given!r}"


def _joined(problems: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Merges the problems that pydantic reports for each type of a union: `expected a number or a list, found …`."""
    by_key: dict[str, list[str]] = {}
    for key, text in problems:
        by_key.setdefault(key, []).append(text)
    joined = []
    for key, texts in by_key.items():
        split = [match for text in texts if (match := EXPECTED.fullmatch(text))]
        if split and any(other.startswith((f"{key}[", f"{key}.")) for other in by_key):
            continue  # one type of the union matches, and the problems inside it are reported
        if len(texts) > 1 and split:
            names = [name for text in texts if (name := re.search(r" is not one of (.+?)(\. Did you mean|$)", text))]
            wanted = dict.fromkeys([*(match[1] for match in split), *(name[1] for name in names)])
            texts = [f"expected {' or '.join(wanted)}, found {split[0][2]}"]
        joined += [(key, text) for text in texts]
    return joined


def _is_tag(part: Any) -> bool:
    """Whether a part of pydantic's location is the branch of a union, which users did not write."""
    return isinstance(part, str) and (
        part in ("str", "float", "int", "bool")
        or part.startswith(("list[", "literal[", "function-", "nullable", "constrained-"))
    )


def _dotted(location: list[Any]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _known_keys(stage: str, location: list[Any]) -> list[str]:
    """The keys of the section at a location."""
    section: Any = STAGES[stage].recipe
    for part in location:
        if isinstance(part, int):
            continue
        hints = {field.name: field for field in fields(section)} if is_dataclass(section) else {}
        section = _section_in(_adapter_type(section, part)) if part in hints else None
    return [field.name for field in fields(section)] if is_dataclass(section) else []


def _adapter_type(section: Any, name: str) -> Any:
    return section.__pydantic_fields__[name].annotation


def _section_in(annotation: Any) -> Any:
    """The first section in an annotation such as `list[Source] | None`."""
    if is_dataclass(annotation):
        return annotation
    return next((inside for inner in get_args(annotation) if (inside := _section_in(inner))), None)


def _stage_of_method(stage: str, keys: set[str]) -> str | None:
    """Another stage whose method accepts all these keys, if this stage's method does not."""
    known = {name: set(_known_keys(name, ["method"])) for name in STAGES}
    if not keys or keys <= known[stage]:
        return None
    return next((name for name in STAGES if keys <= known[name]), None)


class _Sources:
    """Where a key is set: the command line, or a file and line."""

    def __init__(self, composed: Composed):
        self.composed = composed

    def where(self, key: str) -> str:
        plain = key.split("[")[0]
        if any(f"{key}.".startswith((f"{word}.", f"{word}[")) for word in self.composed.overridden):
            return "command line: "
        parts = [int(index) if index else name for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key)]
        # a missing key has no line; report the line of the list entry that lacks it
        shortest = len(plain.split("."))
        for length in range(len(parts), shortest - 1, -1):
            for file, group in self.composed.parts:
                path = parts[:length] if not group else parts[1:length] if parts[0] == group else []
                if path and (line := files.line_of(file, path)):
                    return f"{file}:{line}: "
        if any(word.startswith(f"{plain}.") for word in self.composed.overridden):
            return "command line: "
        return f"{self.composed.file}: "
