"""Recipe files as text: YAML syntax, duplicate keys, the files that a recipe inherits, and the line of a key.

They are checked here because Hydra and OmegaConf report such errors with long messages or a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align_cli.errors import RecipeError
from align_cli.recipe import places
from align_cli.recipe.places import GROUPS

PLAIN = {"map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge"}
"""YAML tags that a recipe may contain; any other tag would construct an object from the text."""


def read(file: Path) -> Any:
    """The YAML mapping of a file, as nodes with line numbers. Raises RecipeError for anything else."""
    import yaml

    try:
        node = yaml.compose(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise RecipeError(f"{where}: not valid YAML ({getattr(error, 'problem', error)}); correct this line") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    if node is None or not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            f"{file}: expected keys such as model: and data:, found {'nothing' if node is None else 'no mapping'}"
        )
    if wrong := [f"{file}:{line}: {text}" for line, text in _wrong(node, "", set())]:
        raise RecipeError(*wrong)
    return node


def _wrong(node: Any, path: str, seen: set[int]) -> Iterator[tuple[int, str]]:
    """(line, problem) for every duplicate key, non-scalar key, and tag that is not plain data."""
    import yaml

    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if node.tag.removeprefix("tag:yaml.org,2002:") not in PLAIN:
        yield node.start_mark.line + 1, f"{path or 'the file'} has the tag {node.tag}: recipes are data; remove it"
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                yield key.start_mark.line + 1, f"a {key.id} is used as a key in {path or 'the file'}; write a word"
                continue
            name = f"{path}.{key.value}" if path else key.value
            if key.value in keys:
                yield key.start_mark.line + 1, f"{name} is written twice; keep one"
            keys.add(key.value)
            yield from _wrong(value, name, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            yield from _wrong(entry, f"{path}[{index}]", seen)


def parts(stage: str, file: Path, picks: list[str]) -> list[tuple[Path, str]]:
    """(file, group) of all source files of a recipe, starting with itself: the recipes it inherits (group ""), and the
    group files picked by it or by the command line.

    Raises RecipeError with all problems of reading them.
    """
    lines: list[str] = []
    picked = {group: places.group_files(group)[name] for group, _, name in (pick.partition("=") for pick in picks)}
    kept = [part for part in _parts(stage, file, lines, ()) if part[1] not in picked]
    kept += [(part, group) for group, part in picked.items()]
    for part, group in kept:
        if group:
            try:
                read(part)
            except RecipeError as error:
                lines += error.lines
    if lines:
        raise RecipeError(*dict.fromkeys(lines))
    return list(dict.fromkeys(kept))


def _parts(stage: str, file: Path, lines: list[str], above: tuple[Path, ...]) -> Iterator[tuple[Path, str]]:
    """The file, then the files it inherits, by precedence: later entries of `defaults` before earlier ones."""
    import yaml

    yield file, ""
    try:
        node = read(file)
    except RecipeError as error:
        lines += error.lines
        return
    above = (*above, file.resolve())
    for key, value in node.value:
        if key.value in GROUPS and isinstance(value, yaml.ScalarNode):
            yield from _group_file(key.value, value.value)
        if key.value != "defaults":
            continue
        where = f"{file}:{key.start_mark.line + 1}"
        if not isinstance(value, yaml.SequenceNode) or not all(map(_is_default, value.value)):
            lines.append(f"{where}: defaults must be a list such as [/zero: zero3, zephyr, _self_]")
            continue
        if "_self_" not in [entry.value for entry in value.value]:
            lines.append(
                f"{where}: defaults lacks _self_, so the groups would override this file; add _self_ as the last entry"
            )
        for entry in reversed(value.value):
            if isinstance(entry, yaml.MappingNode):
                for group, chosen in entry.value:
                    yield from _group_file(group.value.removeprefix("override ").strip().lstrip("/"), chosen.value)
            elif entry.value != "_self_":
                inherited = _inherited(stage, file, entry.value)
                if inherited is not None and inherited.resolve() in above:
                    lines.append(
                        f"{where}: defaults names '{entry.value}', but {inherited} inherits this file (a cycle); "
                        "remove it, or rename one of the two"
                    )
                elif inherited is not None:
                    yield from _parts(stage, inherited, lines, above)


def _is_default(entry: Any) -> bool:
    """Whether an entry of `defaults` is a recipe's name or `/group: name`."""
    import yaml

    if isinstance(entry, yaml.MappingNode):
        return len(entry.value) == 1 and isinstance(entry.value[0][1], yaml.ScalarNode)
    return isinstance(entry, yaml.ScalarNode) and entry.tag == "tag:yaml.org,2002:str"


def _group_file(group: str, name: Any) -> Iterator[tuple[Path, str]]:
    known = places.group_files(group) if group in GROUPS else {}
    if name in known:
        yield known[name], group


def _inherited(stage: str, file: Path, name: str) -> Path | None:
    """The recipe named by an entry of `defaults`: in the file's own folder, or in the folders that Hydra searches."""
    folders = [file.parent, *(folder for root in places.roots() for folder in (root, root / stage))]
    plain = name.strip().lstrip("/").removesuffix(".yaml")
    return next((candidate for folder in folders if (candidate := folder / f"{plain}.yaml").is_file()), None)


def line_of(file: Path, path: list[str | int]) -> int | None:
    """The line number (1-based) of a key, or of an entry of a list, in a file."""
    import yaml

    node, line = read(file), None
    for part in path:
        if isinstance(part, int):
            if not isinstance(node, yaml.SequenceNode):
                continue  # a single source is written without a list
            if part >= len(node.value):
                return None
            node = node.value[part]
            line = node.start_mark.line + 1
            continue
        if not isinstance(node, yaml.MappingNode):
            return None
        pair = next(((key, value) for key, value in node.value if key.value == part), None)
        if pair is None:
            return None
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line
