"""Checks `lora.targets` against the modules of a model, whose names stand in its files. Imports no torch."""

from __future__ import annotations

import re

from align_cli.errors import did_you_mean
from align_cli.model import kind
from align_cli.recipe.sections import Lora

ALL = "all-linear"


def problems(path: str, lora: Lora | None) -> list[str]:
    """A line for targets that name no module: PEFT ignores them as long as another one matches. Empty if the model's
    files are not at hand."""
    if lora is None or lora.targets == ALL:
        return []
    contents = kind.look(path)
    folder = contents.base if contents.kind == "adapter" else path
    if contents.kind not in ("adapter", "causal-lm") or not folder or not (names := kind.modules(folder)):
        return []
    if isinstance(lora.targets, str):
        # PEFT takes a single text as a pattern of whole names
        try:
            missing = [] if any(re.fullmatch(lora.targets, name) for name in names) else [lora.targets]
        except re.error as error:
            return [f"lora.targets: {lora.targets!r} is not a pattern ({error}); write a list of names, or {ALL}"]
    else:
        missing = [one for one in lora.targets if not any(name == one or name.endswith(f".{one}") for name in names)]
    last = sorted({name.rpartition(".")[2] for name in names})
    known = ", ".join(last)
    return [
        f"lora.targets: {path} has no module '{one}'{did_you_mean(one, last) or f'; it has {known}, or write {ALL}'}"
        for one in missing
    ]
