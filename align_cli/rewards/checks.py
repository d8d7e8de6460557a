"""Verifiable rewards: 1 for a correct response, 0 for any other. Imports no torch.

The correct answer is in a data column. JSON schemas are checked by `jsonschema`: draft 2020-12 unless the schema names
another, with formats. References outside the schema are not resolved, so nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY
from referencing import Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)(?:[eE][-+]?\d+)?")
FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def numbers(text: str) -> list[float]:
    """The numbers in a text, in order; 1,234.5 and 1e3 are one each."""
    digits = (match[0].replace(",", "") for match in NUMBER.finditer(text))
    return [float(number) for number in digits if any(map(str.isdigit, number))]


def exact(text: str, wanted: Any) -> bool:
    """Whether a response equals the wanted text, ignoring whitespace."""
    return " ".join(text.split()) == " ".join(str(wanted).split())


def numeric(text: str, wanted: Any, tolerance: float = 1e-6) -> bool:
    """Whether the last numbers of a response and of the wanted cell are equal, as in GSM8K."""
    given, right = numbers(text), numbers(str(wanted))
    return bool(given and right) and math.isclose(given[-1], right[-1], rel_tol=tolerance, abs_tol=tolerance)


def matches(text: str, pattern: Any) -> bool:
    """Whether the pattern matches anywhere in a response."""
    return re.search(str(pattern), text, re.DOTALL) is not None


def json_schema(text: str, schema: Any) -> bool:
    """Whether a response is JSON, bare or in a fenced block, that is valid under the schema."""
    fenced = FENCED.search(text)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=_no_number, parse_float=_finite)
        return _validator(_as_text(schema)).is_valid(value)
    except (ValueError, RecursionError):  # not JSON, or nested too deeply
        return False


KINDS: dict[str, Callable[[str, Any], bool]] = {
    "exact": exact,
    "numeric": numeric,
    "regex": matches,
    "json-schema": json_schema,
}


def verifier(kind: str, extract: str | None = None) -> Callable[[list[Any], list[str]], list[float]]:
    """A function (wanted cells, responses) -> a reward of 1 or 0 each.

    With `extract`, the last match of this pattern in a response (its first group, if it has one) is compared; a
    response without a match is wrong.
    """

    def answer(text: str) -> str | None:
        if extract is None:
            return text
        occurrences = list(re.finditer(extract, text, re.DOTALL))
        return (occurrences[-1][1] if occurrences[-1].re.groups else occurrences[-1][0]) if occurrences else None

    def score(wanted: list[Any], texts: list[str]) -> list[float]:
        given = map(answer, texts)
        return [float(text is not None and KINDS[kind](text, right)) for text, right in zip(given, wanted, strict=True)]

    return score


def problem(kind: str, wanted: Any) -> str:
    """Why responses cannot be compared with a cell, or the empty string."""
    if kind == "numeric" and not numbers(str(wanted)):
        return "contains no number"
    if kind == "regex":
        try:
            re.compile(str(wanted))
        except re.error as error:
            return f"is not a valid pattern ({error})"
    if kind == "json-schema":
        try:
            return _schema_problem(json.loads(_as_text(wanted)))
        except (ValueError, RecursionError) as error:
            return f"is not a valid JSON schema ({error})"
    return ""


def _schema_problem(schema: Any) -> str:
    """Why a schema cannot be checked, or the empty string."""
    if not isinstance(schema, (dict, bool)):
        return f"is not a valid JSON schema (it is a {type(schema).__name__})"
    validator = _class(schema)
    try:
        validator.check_schema(schema)
    except SchemaError as error:
        where = "/".join(map(str, error.absolute_path))
        return f"is not a valid JSON schema ({f'{where}: ' if where else ''}{error.message})"
    resource = Resource.from_contents(schema, default_specification=DRAFT202012)
    try:
        formats = list(_formats(resource, REGISTRY.resolver_with_root(resource)))
    except Unresolvable as error:
        return f"refers to '{error.ref}', which is not in the schema"
    unknown = next((name for name in formats if name not in validator.FORMAT_CHECKER.checkers), None)
    return f"uses the format '{unknown}', which is not checked here; write a pattern instead" if unknown else ""


def _formats(resource: Resource, resolver: Any) -> Iterator[str]:
    """The formats of a schema and its subschemas. Raises Unresolvable for a reference without a target."""
    contents = resource.contents
    if isinstance(contents, dict):
        for key in ("$ref", "$dynamicRef"):
            if isinstance(contents.get(key), str):
                try:
                    resolver.lookup(contents[key])
                except Unresolvable:
                    raise Unresolvable(ref=contents[key]) from None
        if isinstance(contents.get("format"), str):
            yield contents["format"]
    for inner in resource.subresources():
        yield from _formats(inner, resolver.in_subresource(inner))


@lru_cache(maxsize=1024)
def _validator(text: str) -> Validator:
    """The validator of a schema given as text. It downloads nothing."""
    schema = json.loads(text)
    validator = _class(schema)
    return validator(schema, registry=REGISTRY, format_checker=validator.FORMAT_CHECKER)


def _class(schema: Any) -> type[Validator]:
    return validator_for(schema, default=Draft202012Validator)


def _as_text(cell: Any) -> str:
    return cell if isinstance(cell, str) else json.dumps(cell)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is too large")
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
