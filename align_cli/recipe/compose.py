"""Composes YAML files and `key=value` overrides into one resolved tree, through Hydra's Compose API.

Hydra composes a plain tree, and `check.py` validates it afterwards, so that all problems are reported together and
`+key=value` cannot bypass validation. A plain `key=value` may add a key; `check.py` reports unknown keys.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_cli.errors import RecipeError, did_you_mean
from align_cli.recipe import files, overrides, places
from align_cli.recipe.places import GROUPS
from align_cli.recipe.stages import STAGES


@dataclass(frozen=True)
class Composed:
    """A composed recipe before validation."""

    stage: str
    file: Path
    tree: dict[str, Any]
    """The tree with all interpolations resolved; JSON values only."""
    overridden: frozenset[str]
    """Dotted keys set on the command line."""
    problems: tuple[str, ...] = ()
    """Invalid arguments of the command line; the others were composed."""
    parts: tuple[tuple[Path, str], ...] = ()
    """(file, config group) of all its source files; the group is "" for a recipe."""


def compose(stage: str, arguments: list[str]) -> Composed:
    """The resolved tree of `align <stage> recipe=… [key=value …]`.

    Raises RecipeError for a missing recipe or group file, or unreadable YAML. Malformed arguments are kept in
    `Composed.problems`, and `check` reports them with all other problems.
    """
    lines: list[str] = []
    named, given = overrides.split(arguments, lines)
    file = places.find(stage, named)
    _refuse_other_stage(stage, file)
    picks, values = overrides.picked(given, lines)
    made_of = files.parts(stage, file, picks)
    config = _hydra(stage, file, picks, values, lines)
    tree = _resolved(stage, file, config)
    # the keys of a picked group are located in its file
    keys = frozenset(match["key"] for text in values if (match := overrides.OVERRIDE.match(text)))
    return Composed(stage, file, tree, keys, tuple(lines), tuple(made_of))


def default_run_dir(name: str, stage: str) -> str:
    """The default run directory."""
    return f"runs/{name}/{stage}"


def _refuse_other_stage(stage: str, file: Path) -> None:
    """Raise RecipeError for a recipe from another stage's folder or run directory."""
    place = file.resolve().parent
    # any other folder may be called sft by coincidence
    means_it = place.parent in [root.resolve() for root in places.roots()] or file.name == "recipe.yaml"
    folder = place.name if means_it else ""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        folder = str(json.loads((place / "manifest.json").read_text(encoding="utf-8"))["stage"])
    if folder in STAGES and folder != stage:
        raise RecipeError(f"{file}: is a recipe for `align {folder}`; run `align {folder} recipe={file}`")


def _hydra(stage: str, file: Path, picks: list[str], values: list[str], lines: list[str]) -> Any:
    """Hydra's composition of one file and the picked groups, with the other overrides applied in order.

    Adds a line to `lines` for every override that cannot be applied.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from yaml import YAMLError

    OmegaConf.register_new_resolver("stage", _stage_path, replace=True)
    folders = [folder for root in places.roots() for folder in (root, root / stage) if folder.is_dir()]
    search = ",".join("'file://{}'".format(str(folder.resolve()).replace("'", "\\'")) for folder in folders)
    while True:
        GlobalHydra.instance().clear()
        try:
            with warnings.catch_warnings(), initialize_config_dir(str(file.resolve().parent), version_base="1.3"):
                warnings.simplefilter("ignore")
                config = hydra_compose(file.stem, overrides=[f"hydra.searchpath=[{search}]", *picks])
            break
        except MissingConfigException as error:
            raise RecipeError(_missing(file, error)) from None
        except HydraException as error:
            # Hydra needs `zero=zero3` if the recipe's defaults include the group, and `+zero=zero3` otherwise
            lost = next((pick for pick in picks if f"Could not override '{pick.split('=')[0]}'" in str(error)), None)
            if lost is None:
                raise RecipeError(f"{file}: {_hydras(error)}") from None
            picks[picks.index(lost)] = f"+{lost}"
        except (YAMLError, ValueError, TypeError, RecursionError) as error:
            raise RecipeError(f"{file}: cannot be composed ({_hydras(error)}); correct it or a file it names") from None
    OmegaConf.set_struct(config, False)
    for pick in picks:
        group, _, name = pick.lstrip("+").partition("=")
        if isinstance(OmegaConf.to_container(config, resolve=False).get(group), str):
            config[group] = name  # a name in the file's body would override the command line
    for text in values:
        try:
            overrides.apply(config, text)
        except RecipeError as error:
            lines += error.lines
    return config


def _hydras(error: Exception) -> str:
    """Hydra's error about the files, reworded where it refers to Hydra's own concepts."""
    text = _one_line(error if str(error) else error.__cause__ or error)
    if match := re.search(r"Multiple values for (\S+?)\.|(\S+) appears more than once in the final defaults", text):
        group = match[1] or match[2]
        return (
            f"defaults and the inherited recipes pick {group} twice; keep one, or write `override /{group}: NAME` "
            "after the recipe whose choice it replaces"
        )
    text, _, key = text.partition(" full_key: ")
    return f"{key.split()[0]}: {text}; correct the value or quote it" if key and "${" in text else text


def _missing(file: Path, error: Exception) -> str:
    name = getattr(error, "missing_cfg_file", None) or ""
    options = list(getattr(error, "options", None) or [])
    group = str(name).strip("/").split("/")[0]
    if not options and group in GROUPS:
        options = list(places.group_files(group))
    near = did_you_mean(str(name).split("/")[-1], options)
    known = f"; known: {', '.join(options)}" if options and not near else ""
    return f"{file}: defaults names '{name}', which is not in any recipe folder{near}{known}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _stage_path(stage: str, *name: str, _root_: Any) -> str:
    """Resolver of `${stage:sft}`: the run directory of that stage, for this recipe's name or for a given name."""
    if len(name) > 1:
        raise ValueError("${stage:…} takes a stage and, after a comma, the name of a run")
    return default_run_dir(name[0] if name else _root_.name, stage)


def _unresolved(error: Exception) -> str:
    """OmegaConf's message about an interpolation, without its class names."""
    return re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error).splitlines()[0])


def _resolved(stage: str, file: Path, config: Any) -> dict[str, Any]:
    """The tree with names, group names and interpolations filled in."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        name = config.get("name") or (file.resolve().parent.parent.name if file.name == "recipe.yaml" else file.stem)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{file}: name: {_unresolved(error)}; define it or write the value out") from None
    config.name = name
    for group in GROUPS:
        chosen = OmegaConf.to_container(config, resolve=False).get(group)
        if isinstance(chosen, str) and chosen != "None" and not chosen.startswith("${"):
            known = places.group_files(group)
            if chosen not in known:
                near = did_you_mean(chosen, list(known)) or f"; known: {', '.join(known) or 'none'}"
                raise RecipeError(f"{file}: {group}: no group file '{chosen}'{near}")
            config[group] = OmegaConf.load(known[chosen])
    lines: list[str] = []

    def resolve(node: Any, path: str) -> Any:
        if OmegaConf.is_dict(node):
            return {str(key): resolve_at(node, key, f"{path}.{key}" if path else str(key)) for key in node}
        if OmegaConf.is_list(node):
            return [resolve_at(node, index, f"{path}[{index}]") for index in range(len(node))]
        return node

    def resolve_at(parent: Any, key: Any, path: str) -> Any:
        try:
            return resolve(parent[key], path)
        except OmegaConfBaseException as error:
            lines.append(f"{file}: {path}: {_unresolved(error)}; define it or write the value out")
            return None

    tree = _at_home(resolve(config, ""), lines, file)
    for path in _code_keys(tree):
        lines.append(f"{file}: {path}: recipes are data, never code; remove it")
    if lines:
        raise RecipeError(*lines)
    if tree.get("run_dir") is None:
        tree["run_dir"] = default_run_dir(str(name), stage)
    return tree


PATHS = frozenset(
    (
        "path",
        "train",
        "eval",
        "run_dir",
        "hostfile",
        "prompts",
        "center_on",
        "ptx",
        "harmless",
        "helpful",
        "chat_template",
    )
)
"""Names of keys whose text may be a path."""


def _at_home(node: Any, lines: list[str], file: Path, key: str = "", path: str = "") -> Any:
    """The tree with `~` in its paths replaced by the home directory; adds a line for a user who does not exist."""
    if isinstance(node, dict):
        return {name: _at_home(value, lines, file, name, f"{path}.{name}".lstrip(".")) for name, value in node.items()}
    if isinstance(node, list) and key != "prompts":
        return [_at_home(value, lines, file, key, f"{path}[{at}]") for at, value in enumerate(node)]
    if not isinstance(node, str) or key not in PATHS or not re.match(r"~[\w.-]*(/|$)", node):
        return node
    expanded = os.path.expanduser(node)
    if expanded.startswith("~"):
        lines.append(
            f"{file}: {path}: {node}: the user {node.partition('/')[0][1:]!r} does not exist; write the path out"
        )
    return expanded


def _code_keys(node: Any, path: str = "") -> list[str]:
    if isinstance(node, dict):
        here = [f"{path}{key}" for key in node if str(key).startswith("_") and str(key).endswith("_")]
        return here + [below for key, value in node.items() for below in _code_keys(value, f"{path}{key}.")]
    if isinstance(node, list):
        return [below for index, value in enumerate(node) for below in _code_keys(value, f"{path}{index}.")]
    return []
