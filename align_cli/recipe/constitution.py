"""Loads a constitution (principles for critiques and judges) from YAML, and reports all its problems together."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from align_cli.errors import RecipeError, did_you_mean, raise_all
from align_cli.recipe import files, places
from align_cli.recipe.sections import section

GROUP = "constitution"
"""Folder of constitutions under recipes/."""
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Kind = Literal["red-team", "harmless"]
"""Kind of a prompt, known from the source it comes from."""


@section
class Principle:
    """One principle for critiques, revisions and comparisons of answers."""

    id: Text
    """Short name, used in rows and reports."""
    critique_request: Text
    """Asks the model to criticise its own answer."""
    revision_request: Text
    """Asks the model to revise its answer after the critique."""
    comparison: Text
    """Asks a judge which of two answers is better."""
    prompts: Literal["all", "red-team", "harmless"] = "all"
    """Kind of prompts it is drawn for."""


@section
class Example:
    """A few-shot example: a dialogue of answer, critique and revision."""

    prompt: Text
    answer: Text
    critique_request: Text
    critique: Text
    revision_request: Text
    revision: Text
    prompts: Literal["all", "red-team", "harmless"] = "all"
    """Kind of prompts it is shown for."""


@section
class Principles:
    """The content of a constitution file."""

    principles: Annotated[list[Principle], Field(min_length=1)]
    examples: list[Example] = Field(default_factory=list)


@dataclass(frozen=True)
class Constitution:
    """A constitution and its file."""

    path: str
    sha256: str
    principles: list[Principle]
    examples: list[Example]

    def drawn_for(self, kind: Kind) -> list[Principle]:
        """The principles for prompts of a kind."""
        return [one for one in self.principles if one.prompts in ("all", kind)]

    def shown_before(self, kind: Kind, count: int | None) -> list[Example]:
        """The first `count` examples for prompts of a kind; None for all of them."""
        return [one for one in self.examples if one.prompts in ("all", kind)][:count]


def find(named: str, key: str = "method.constitution") -> Path:
    """The file named by the recipe's `key`: a path, or a name in recipes/constitution. Raises RecipeError."""
    known = places.group_files(GROUP)
    file = known.get(named.removesuffix(".yaml")) if "/" not in named else None
    if Path(named).is_file():
        return Path(named)
    if file is None:
        near = did_you_mean(named, list(known)) or f"; known: {', '.join(known)}, or the path of a YAML file"
        raise RecipeError(f"{key}: {named}: no such constitution{near}")
    return file


def load(named: str, key: str = "method.constitution") -> Constitution:
    """The constitution named by a recipe. Raises RecipeError with all problems and their lines."""
    import yaml

    file = find(named, key)
    files.read(file)  # syntax, keys written twice, tags
    text = file.read_bytes()
    try:
        parsed = _adapter().validate_json(json.dumps(yaml.safe_load(text), default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(*dict.fromkeys(_explain(file, detail) for detail in error.errors())) from None
    twice = [name for name, count in Counter(one.id for one in parsed.principles).items() if count > 1]
    raise_all(RecipeError, [f"{file}: the principle '{name}' occurs twice; rename one" for name in twice])
    return Constitution(str(file), hashlib.sha256(text).hexdigest(), parsed.principles, parsed.examples)


def problems(named: str, kinds: list[Kind]) -> list[str]:
    """All problems of a constitution for prompts of these kinds, one line each."""
    try:
        loaded = load(named)
    except RecipeError as error:
        return list(error.lines)
    return [
        f"{loaded.path}: has no principle for {kind} prompts; add one with prompts: {kind} or all"
        for kind in kinds
        if not loaded.drawn_for(kind)
    ]


@cache
def _adapter() -> TypeAdapter:
    return TypeAdapter(Principles)


def _explain(file: Path, detail: dict[str, Any]) -> str:
    """The message for a pydantic error, with file and line."""
    location, given, kind = list(detail["loc"]), detail.get("input"), detail["type"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    lines = (files.line_of(file, location[:end]) for end in range(len(location), 0, -1))
    line = next((number for number in lines if number), None)
    where = f"{file}:{line}" if line else str(file)
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: {key}: is missing; write it"
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        cls = Principles if len(location) == 1 else Principle if location[0] == "principles" else Example
        known = list(cls.__pydantic_fields__)
        return f"{where}: {key}: unknown key{did_you_mean(str(location[-1]), known) or '; known: ' + ', '.join(known)}"
    if kind in ("string_too_short", "too_short"):
        return f"{where}: {key}: is empty; write it, or remove the entry"
    expected = detail["msg"].replace("Input should be", "expected").replace("a valid ", "a ")
    return f"{where}: {key}: {expected}, found {type(given).__name__} {given!r:.60}"


def chosen(named: str, wanted: list[str] | None, key: str) -> Constitution:
    """The constitution reduced to the principles with these ids; None for all. `key` is the recipe key of the reward.
    Raises RecipeError with all problems."""
    loaded = load(named, f"{key}.constitution")
    known = [one.id for one in loaded.principles]
    raise_all(
        RecipeError,
        [
            f"{key}.principles: {loaded.path} has no principle '{name}'{did_you_mean(name, known)}"
            for name in wanted or ()
            if name not in known
        ],
    )
    return replace(loaded, principles=[one for one in loaded.principles if wanted is None or one.id in wanted])
