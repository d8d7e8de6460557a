"""Rewards that can be checked: 1 for a response that is right, 0 for any other. Imports the standard library alone.

What is right stands in a column of the data. A JSON schema is checked by a subset of draft 2020-12, and a schema that
uses more of it is refused, not half checked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)(?:[eE][-+]?\d+)?")
FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}
KEYWORDS = {
    *("type", "enum", "const", "properties", "required", "additionalProperties", "items", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("minProperties", "maxProperties", "anyOf", "allOf", "not"),
}
NOTES = {"$schema", "$id", "title", "description", "default", "examples", "$comment"}
"""Keywords of a schema that say nothing about what is valid."""


def numbers(text: str) -> list[float]:
    """The numbers in a text, in order; 1,234.5 and 1e3 are one each."""
    found = (match[0].replace(",", "") for match in NUMBER.finditer(text))
    return [float(number) for number in found if any(map(str.isdigit, number))]


def exact(text: str, wanted: Any) -> bool:
    """Whether a response is the wanted text, white space apart."""
    return " ".join(text.split()) == " ".join(str(wanted).split())


def numeric(text: str, wanted: Any, tolerance: float = 1e-6) -> bool:
    """Whether the last number of a response is the last one of the wanted cell, as GSM8K's answers are compared."""
    found, right = numbers(text), numbers(str(wanted))
    return bool(found and right) and math.isclose(found[-1], right[-1], rel_tol=tolerance, abs_tol=tolerance)


def matches(text: str, pattern: Any) -> bool:
    """Whether the pattern is found in a response."""
    return re.search(str(pattern), text, re.DOTALL) is not None


def json_schema(text: str, schema: Any) -> bool:
    """Whether a response is JSON, bare or in a fenced block, that the schema allows."""
    fenced = FENCED.search(text)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=_no_number)
    except ValueError:
        return False
    return allowed(value, _schema(schema))


KINDS: dict[str, Callable[[str, Any], bool]] = {
    "exact": exact,
    "numeric": numeric,
    "regex": matches,
    "json-schema": json_schema,
}


def verifier(kind: str, extract: str | None = None) -> Callable[[list[Any], list[str]], list[float]]:
    """(wanted cells, responses) -> a reward of 1 or 0 each. `extract` is a pattern whose last match in a response, its
    first group if it has one, is what is compared; a response without a match is wrong."""

    def answer(text: str) -> str | None:
        if extract is None:
            return text
        found = list(re.finditer(extract, text, re.DOTALL))
        return (found[-1][1] if found[-1].re.groups else found[-1][0]) if found else None

    def score(wanted: list[Any], texts: list[str]) -> list[float]:
        given = map(answer, texts)
        return [float(text is not None and KINDS[kind](text, right)) for text, right in zip(given, wanted, strict=True)]

    return score


def problem(kind: str, wanted: Any) -> str:
    """Why nothing can be compared with a cell, or the empty string."""
    if kind == "numeric" and not numbers(str(wanted)):
        return "holds no number"
    if kind == "regex":
        try:
            re.compile(str(wanted))
        except re.error as error:
            return f"is no pattern ({error})"
    if kind == "json-schema":
        try:
            schema = _schema(wanted)
        except ValueError as error:
            return f"is no JSON schema ({error})"
        if unknown := sorted(_unknown(schema)):
            return f"uses {', '.join(unknown)}, which is not checked here; write it with {', '.join(sorted(KEYWORDS))}"
    return ""


def allowed(value: Any, schema: Any) -> bool:
    """Whether a value is valid under a schema of KEYWORDS (JSON Schema draft 2020-12)."""
    if isinstance(schema, bool):
        return schema
    kinds = schema.get("type")
    if kinds is not None and not any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if "enum" in schema and not any(_same(value, option) for option in schema["enum"]):
        return False
    if "const" in schema and not _same(value, schema["const"]):
        return False
    if not all(allowed(value, part) for part in schema.get("allOf", [])):
        return False
    if "anyOf" in schema and not any(allowed(value, part) for part in schema["anyOf"]):
        return False
    if "not" in schema and allowed(value, schema["not"]):
        return False
    if isinstance(value, dict):
        return _object(value, schema)
    if isinstance(value, list):
        size = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf)
        return size and all(allowed(entry, schema.get("items", True)) for entry in value)
    if isinstance(value, str):
        size = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf)
        return size and ("pattern" not in schema or re.search(schema["pattern"], value) is not None)
    if _is(value, "number"):
        inside = schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
        return inside and schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf)
    return True


def _object(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", math.inf):
        return False
    if any(name not in value for name in schema.get("required", [])):
        return False
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    return all(allowed(entry, known.get(name, others)) for name, entry in value.items())


def _is(value: Any, kind: str) -> bool:
    # true is an int in Python, and 1.0 an integer in JSON Schema
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES.get(kind, ()))


def _same(one: Any, other: Any) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _schema(cell: Any) -> Any:
    schema = json.loads(cell) if isinstance(cell, str) else cell
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"it is a {type(schema).__name__}")
    return schema


def _unknown(schema: Any) -> set[str]:
    """Keywords of a schema, and of the schemas in it, that are not checked here."""
    if not isinstance(schema, dict):
        return set()
    inner = [schema.get("items"), schema.get("additionalProperties"), schema.get("not")]
    inner += [*schema.get("properties", {}).values(), *schema.get("anyOf", []), *schema.get("allOf", [])]
    return (set(schema) - KEYWORDS - NOTES).union(*map(_unknown, inner))


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
