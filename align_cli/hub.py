"""Names of repositories on the Hugging Face hub. Imports nothing heavy."""

from __future__ import annotations

import re

_NAME = r"\w[\w-]*(?:\.[\w-]+)*"
_ID = re.compile(rf"{_NAME}(?:/{_NAME})?", re.ASCII)


def is_id(path: str) -> bool:
    """Whether a path could be a hub id, `name` or `owner/name`; whether the repository exists is not checked."""
    return _ID.fullmatch(path) is not None
