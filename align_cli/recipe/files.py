"""Recipe files as text: syntax, keys written twice, the files that one recipe is made of, and where a key stands.

Hydra and OmegaConf wrap such errors in pages of their own, or in a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align_cli.errors import RecipeError
from align_cli.recipe import places
from align_cli.recipe.schema import GROUPS


def read(file: Path) -> Any:
    """The YAML mapping of a file, as nodes with their lines. Raises RecipeError for what is none."""
    import yaml

    try:
        node = yaml.compose(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise RecipeError(f"{where}: not valid YAML ({getattr(error, 'problem', error)}); mend this line") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    if node is None or not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            f"{file}: expected keys such as model: and data:, found {'nothing' if node is None else 'no mapping'}"
        )
    if twice := [f"{file}:{line}: {key} is written twice; keep one" for key, line in _twice(node)]:
        raise RecipeError(*twice)
    return node


def _twice(node: Any, path: str = "") -> Iterator[tuple[str, int]]:
    import yaml

    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                yield f"{path}{key.value}", key.start_mark.line + 1
            seen.add(key.value)
            yield from _twice(value, f"{path}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _twice(entry, path)


def parts(stage: str, file: Path, picks: list[str]) -> list[tuple[Path, str]]:
    """(file, group) of all that a recipe is made of, itself first: the recipes it inherits (group ""), and the group
    files that it or the command line picks.

    Raises RecipeError with everything in them that cannot be read.
    """
    lines: list[str] = []
    found = list(_parts(stage, file, lines, set()))
    for pick in picks:
        group, _, name = pick.partition("=")
        found.append((places.group_files(group)[name], group))
    for part, group in found:
        if group:
            try:
                read(part)
            except RecipeError as error:
                lines += error.lines
    if lines:
        raise RecipeError(*dict.fromkeys(lines))
    return list(dict.fromkeys(found))


def _parts(stage: str, file: Path, lines: list[str], seen: set[Path]) -> Iterator[tuple[Path, str]]:
    import yaml

    seen.add(file.resolve())
    yield file, ""
    try:
        node = read(file)
    except RecipeError as error:
        lines += error.lines
        return
    for key, value in node.value:
        if key.value in GROUPS and isinstance(value, yaml.ScalarNode):
            yield from _group_file(key.value, value.value)
        if key.value != "defaults" or not isinstance(value, yaml.SequenceNode):
            continue
        if "_self_" not in [entry.value for entry in value.value]:
            lines.append(
                f"{file}:{key.start_mark.line + 1}: defaults lacks _self_, so the groups would win over this file; "
                "add _self_ as the last entry"
            )
        for entry in value.value:
            if isinstance(entry, yaml.MappingNode):
                for group, chosen in entry.value:
                    yield from _group_file(group.value.removeprefix("override ").strip().lstrip("/"), chosen.value)
            elif isinstance(entry.value, str) and entry.value != "_self_":
                inherited = _inherited(stage, file, entry.value)
                if inherited is not None and inherited.resolve() not in seen:
                    yield from _parts(stage, inherited, lines, seen)


def _group_file(group: str, name: Any) -> Iterator[tuple[Path, str]]:
    known = places.group_files(group) if group in GROUPS else {}
    if name in known:
        yield known[name], group


def _inherited(stage: str, file: Path, name: str) -> Path | None:
    """The recipe that an entry of `defaults` means: beside the file, or in the folders that Hydra searches."""
    folders = [file.parent, *(folder for root in places.roots() for folder in (root, root / stage))]
    plain = name.strip().lstrip("/").removesuffix(".yaml")
    return next((found for folder in folders if (found := folder / f"{plain}.yaml").is_file()), None)


def line_of(file: Path, path: list[str]) -> int | None:
    """The line (1-based) on which a dotted key stands in a file."""
    import yaml

    node, line = read(file), None
    for part in path:
        if not isinstance(node, yaml.MappingNode):
            return None
        pair = next(((key, value) for key, value in node.value if key.value == part), None)
        if pair is None:
            return None
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line
