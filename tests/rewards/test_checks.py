"""Rewards that are checked: what is right, what is wrong, and which cells nothing can be compared with."""

import json

import pytest

from align_cli.rewards import checks


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so 7 + 5 = 12.", [7, 5, 12]),
        ("$1,234.50 in all", [1234.5]),
        ("-3 and +4", [-3, 4]),
        ("1e3 or .5", [1000, 0.5]),
        ("no number here, nor in v-", []),
        ("1,2 and 10,000", [1, 2, 10000]),
    ],
)
def test_numbers(text, found):
    assert checks.numbers(text) == found


@pytest.mark.parametrize(
    ("kind", "text", "wanted", "right"),
    [
        ("exact", " yes \n", "yes", True),
        ("exact", "yes.", "yes", False),
        ("exact", "a  b", "a b", True),
        ("numeric", "First 3, then 4. The answer is 1,200.", "#### 1200", True),
        ("numeric", "The answer is 12.0", 12, True),
        ("numeric", "The answer is 12, I think, of 13", 12, False),
        ("numeric", "no idea", 12, False),
        ("regex", "I can't help with that", r"can('|no)t", True),
        ("regex", "Sure", r"can('|no)t", False),
    ],
)
def test_what_is_right(kind, text, wanted, right):
    assert checks.verifier(kind)([wanted], [text]) == [float(right)]


def test_only_what_is_extracted_is_compared():
    boxed = checks.verifier("numeric", r"\\boxed\{([^}]*)\}")
    assert boxed([4, 4, 4], [r"\boxed{3} no, \boxed{4}, out of 9", "it is 4", r"\boxed{5}"]) == [1.0, 0.0, 0.0]


SCHEMA = {
    "type": "object",
    "required": ["name", "age"],
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ('{"name": "Ada", "age": 36}', True),
        ('Here:\n```json\n{"name": "Ada", "age": 36.0, "tags": ["a"]}\n```\n', True),
        ('{"name": "Ada", "age": true}', False),
        ('{"name": "Ada", "age": 150}', False),
        ('{"name": "", "age": 1}', False),
        ('{"name": "Ada"}', False),
        ('{"name": "Ada", "age": 1, "more": 1}', False),
        ('{"name": "Ada", "age": 1, "tags": ["a", "c"]}', False),
        ('{"name": "Ada", "age": 1, "tags": ["a", "b", "a"]}', False),
        ('{"name": "Ada", "age": NaN}', False),
        ('{"name": "Ada", "age": 36', False),
        ("[]", False),
        ("[" * 5000, False),
        ('{"name": "Ada", "age": 1e999}', False),
        ('{"name": "Ada", "age": ' + "9" * 5000 + "}", False),
    ],
)
def test_json_schema(text, right):
    assert checks.json_schema(text, SCHEMA) is right


@pytest.mark.parametrize(
    ("value", "schema", "right"),
    [
        (1, {"anyOf": [{"type": "string"}, {"const": 1}]}, True),
        (True, {"const": 1}, False),
        (1, {"enum": [True]}, False),
        (2, {"allOf": [{"minimum": 1}, {"maximum": 1}]}, False),
        ("x", {"not": {"type": "string"}}, False),
        ("ab", {"pattern": "^b"}, False),
        (None, {"type": ["null", "string"]}, True),
        ({"a": 1}, {"minProperties": 2}, False),
        (3, True, True),
        (3, False, False),
        ("2026-02-30", {"format": "date"}, False),
        ({"a": 1, "b": {"a": 2}}, {"properties": {"b": {"$ref": "#"}, "a": {"maximum": 1}}}, False),
        (7, {"oneOf": [{"minimum": 5}, {"multipleOf": 7}]}, False),
        # the draft that the schema names: exclusiveMaximum was a boolean in draft 4
        (3, {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 3, "exclusiveMaximum": True}, False),
    ],
)
def test_schemas(value, schema, right):
    assert checks.json_schema(json.dumps(value), schema) is right
    assert checks.json_schema(json.dumps(value), json.dumps(schema)) is right


@pytest.mark.parametrize(
    ("kind", "cell", "finding"),
    [
        ("numeric", "unknown", "contains no number"),
        ("regex", "(", "is not a valid pattern"),
        ("json-schema", "{", "is not a valid JSON schema"),
        ("json-schema", "[1]", "it is a list"),
        ("json-schema", '{"oneOf": []}', "is not a valid JSON schema (oneOf: [] should be non-empty)"),
        ("json-schema", {"type": "strnig"}, "is not a valid JSON schema (type: 'strnig' is not valid"),
        ("json-schema", {"items": {"pattern": "("}}, "schema (items/pattern: '(' is not a 'regex')"),
        ("json-schema", {"items": {"$ref": "#/$defs/x"}}, "refers to '#/$defs/x', which is not in the schema"),
        ("json-schema", {"$ref": "https://example.com/a"}, "refers to 'https://example.com/a', which is not in"),
        ("json-schema", {"properties": {"a": {"format": "uri"}}}, "uses the format 'uri', which is not checked here"),
        ("json-schema", "[" * 5000, "is not a valid JSON schema"),
        ("json-schema", {"properties": {"a": {"format": "date"}, "format": {"type": "string"}}}, ""),
        ("json-schema", {"$defs": {"x": {"type": "string"}}, "items": {"$ref": "#/$defs/x"}}, ""),
        ("json-schema", SCHEMA, ""),
        ("numeric", "#### 3", ""),
        ("exact", "anything", ""),
    ],
)
def test_cells_that_nothing_can_be_compared_with(kind, cell, finding):
    said = checks.problem(kind, cell)
    assert said.startswith(finding) or finding in said if finding else not said
