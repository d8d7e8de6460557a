"""Python functions as rewards: located without running them, and loaded only with --allow-code.

A recipe is data. `reward: {python: package.module:function}` is the only key that can name code, and it requires
--allow-code on the command line. Imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align_cli.errors import UpstreamError

ALLOWED = "ALIGN_ALLOW_CODE"
"""Environment variable that passes --allow-code on to the ranks."""
ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def allow() -> None:
    """Allow Python functions in recipes, in this process and its child processes."""
    os.environ[ALLOWED] = "1"


def allowed() -> bool:
    """Whether --allow-code was given."""
    return os.environ.get(ALLOWED) == "1"


def problems(key: str, entry: str) -> list[str]:
    """Why `module:function` cannot be a reward. With --allow-code this imports parent packages, but not the module."""
    if not ENTRY.fullmatch(entry):
        return [f"{key}: '{entry}' does not name a function; write module:function, such as rewards:brevity"]
    if not allowed():
        return [f"{key}: {entry} is Python code, which runs with your rights; add --allow-code if you trust it"]
    file, name = source(entry), entry.split(":")[1]
    if file is None:
        module = entry.split(":")[0]
        return [f"{key}: no module {module} in the working directory or among installed packages; correct its name"]
    if not re.search(
        rf"^(async\s+)?(def|class)\s+{name}\b|^{name}\s*[:=]|import\b.*\b{name}\b", file.read_text(), re.M
    ):
        return [f"{key}: {file} does not define {name}; correct the name after the colon"]
    return []


def source(entry: str) -> Path | None:
    """The file of an entry's module, or None if it is not found."""
    _working_directory_first()
    try:
        spec = importlib.util.find_spec(entry.split(":")[0])
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def fingerprint(entry: str) -> dict[str, Any]:
    """The manifest's record of an entry: its file and the file's hash."""
    file = source(entry)
    return {
        "entry": entry,
        "file": str(file) if file else None,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest() if file else None,
    }


def load(entry: str) -> Callable[..., Any]:
    """The function. Raises UpstreamError without --allow-code, or if it cannot be imported."""
    if not allowed():
        raise UpstreamError(f"{entry}: is Python code; add --allow-code if you trust it")
    _working_directory_first()
    module, name = entry.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything
        raise UpstreamError(f"{entry}: cannot be loaded: {type(error).__name__}: {error}") from error


def _working_directory_first() -> None:
    # sys.path of a console script starts with the script's folder, not with the working directory
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
