"""Exceptions for rows that cannot be used, and names of cell types for messages."""

from __future__ import annotations

from typing import Any

STRING, MESSAGES = "a string", "a list of messages"
WORDS = {str: STRING, dict: "an object", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}


class Broken(Exception):
    """A row that prevents the run from starting; the message has finding and remedy, without the place."""


class Dropped(Exception):
    """A row that is left out and counted."""

    def __init__(self, reason: str, example: str = ""):
        super().__init__(reason)
        self.reason, self.example = reason, example


class Empty(Exception):
    """A response without text; the message names the response."""


def kind(value: Any) -> str:
    """The type of a cell's value, in words."""
    if not isinstance(value, list):
        return WORDS.get(type(value), type(value).__name__)
    kinds = {type(item) for item in value}
    if len(kinds) != 1:
        return "a list of mixed types" if kinds else "an empty list"
    return {dict: MESSAGES, str: "a list of strings"}.get(kinds.pop(), "a list of something else")
