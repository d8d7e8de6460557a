"""What can be the matter with a row, and what a cell holds, in words."""

from __future__ import annotations

from typing import Any

STRING, MESSAGES = "a string", "a list of messages"
WORDS = {str: STRING, dict: "an object", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}


class Broken(Exception):
    """A row that keeps the run from starting; says what was found and what to do, without the place."""


class Dropped(Exception):
    """A row that is left out and counted."""

    def __init__(self, reason: str, example: str = ""):
        super().__init__(reason)
        self.reason, self.example = reason, example


class Empty(Exception):
    """A response without text; says which."""


def kind(value: Any) -> str:
    """What a cell holds, in words."""
    if not isinstance(value, list):
        return WORDS.get(type(value), type(value).__name__)
    kinds = {type(item) for item in value}
    if len(kinds) != 1:
        return "a list of mixed types" if kinds else "an empty list"
    return {dict: MESSAGES, str: "a list of strings"}.get(kinds.pop(), "a list of something else")
