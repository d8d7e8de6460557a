"""Overrides from the command line (`key=value`): parsing, group picks, and application to a composed tree."""

from __future__ import annotations

import re
from typing import Any

from align_cli.errors import RecipeError, did_you_mean
from align_cli.recipe import places
from align_cli.recipe.places import GROUPS

OVERRIDE = re.compile(r"^(?P<sign>\+\+|\+|~)?(?P<key>[\w./@\-]+(\[\d+\][\w./@\-]*)*)(=(?P<value>.*))?$", re.DOTALL)


def split(arguments: list[str], lines: list[str]) -> tuple[str, list[str]]:
    """(recipe name, overrides); adds a line for every argument that is neither. Raises RecipeError without a recipe."""
    named, overrides = None, []
    for text in arguments:
        if text.startswith("-") and not text.startswith("~"):
            plain = text.lstrip("-")
            lines.append(f"command line: {text} is not an option; write {plain if '=' in plain else plain + '=VALUE'}")
        elif text.startswith("recipe="):
            if named:
                lines.append(f"command line: recipe= is given twice ({named}, {text[7:]}); keep one")
            named = text[7:]
        elif not (match := OVERRIDE.match(text)) or (match["value"] is None and match["sign"] != "~"):
            hint = f"recipe={text}" if text.endswith(".yaml") else "key=value"
            lines.append(f"command line: '{text}' is not a setting; write {hint}")
        else:
            overrides.append(text)
    if named is None or not named:
        raise RecipeError("command line: no recipe; add recipe=NAME.yaml (`align recipes` lists them)", *lines)
    return named, overrides


def picked(overrides: list[str], lines: list[str]) -> tuple[list[str], list[str]]:
    """(picks of group files such as `zero=zero3`, all other overrides); adds a line for every unknown group file."""
    picks, values = [], []
    for text in overrides:
        try:
            # `compose` finds out whether the recipe's defaults include the group, so + and ++ are equivalent here
            picks.append(text.lstrip("+")) if _picks_group(text) else values.append(text)
        except RecipeError as error:
            lines += error.lines
    return picks, values


def _picks_group(text: str) -> bool:
    """Whether `zero=zero3` names a file of a config group. Raises RecipeError for an unknown file."""
    match = OVERRIDE.match(text)
    key, value, known = match["key"], match["value"] or "", places.group_files(match["key"])
    if key not in GROUPS or match["sign"] == "~":
        return False
    if value in known:
        return True
    if value in ("null", "None") or not re.fullmatch(r"[\w./\-]*", value):
        return False
    aim = {"model": f"; for a path write model.path={value}", "data": f"; for a source write data.train={value}"}
    near = did_you_mean(value, list(known)) or f"; known: {', '.join(known) or 'none'}"
    raise RecipeError(f"command line: {key}={value}: no such group file{near}{aim.get(key, '')}")


def apply(config: Any, text: str) -> None:
    """Set or delete one key. A mapping is merged into a mapping; any other value replaces the old one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    match = OVERRIDE.match(text)
    key, raw = match["key"], match["value"]
    try:
        if match["sign"] == "~":
            parent, _, last = key.rpartition(".")
            del (OmegaConf.select(config, parent) if parent else config)[last]
            return
        try:
            parsed = OverridesParser.create().parse_override(f"++value={raw}" if "[" in key else f"++{key}={raw}")
            value = parsed.value()
            if parsed.is_sweep_override():
                raise RecipeError(f"command line: {text}: {_no_sweep(key, raw, value)}")
        except HydraException:
            value = raw  # `runs/lr=5e-7` is not valid in Hydra's grammar; take it as plain text
        _open_lists(config, key)
        merge = isinstance(value, dict) and OmegaConf.is_dict(OmegaConf.select(config, key))
        OmegaConf.update(config, key, value, merge=merge, force_add=True)
    except (OmegaConfBaseException, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"command line: {text}: cannot be set here ({' '.join(str(error).split())})") from None


def _open_lists(config: Any, key: str) -> None:
    """Turn the short forms on the way to a key such as `data.train[0].split` into lists and mappings: a single source
    is a list of one, and a path is the source's `path`."""
    from omegaconf import OmegaConf

    for match in re.finditer(r"\[\d+\]", key):
        whole, entry = key[: match.start()], key[: match.end()]
        node = OmegaConf.select(config, whole)
        if isinstance(node, str) or OmegaConf.is_dict(node):
            OmegaConf.update(config, whole, [node], merge=False)
        if key[match.end() :].startswith(".") and isinstance(one := OmegaConf.select(config, entry), str):
            OmegaConf.update(config, entry, {"path": one}, merge=False)


def _no_sweep(key: str, raw: str, sweep: Any) -> str:
    """The message for several values of one key."""
    if not getattr(sweep, "simple_form", False) or re.match(r"\w+\(", raw):
        return f"{raw.split('(')[0]}(…) is a sweep, but a run needs a single value; write one, or quote the text"
    if key in GROUPS:
        return f"a comma is a sweep, but a run needs a single value; write {key}={raw.split(',')[0]}"
    return f"a comma is a sweep; write {key}=[{raw}] for a list, or quote the text"
