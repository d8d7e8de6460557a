"""Resolves a source's path to files, and computes their fingerprint.

A path is a file, a glob, a directory of shards, or a directory that `save_to_disk` wrote. In a directory only the files
of the requested split are read. They are found by name, with the rules of Hugging Face datasets:
https://huggingface.co/docs/datasets/repository_structure
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

from align_cli import hub
from align_cli.errors import DataError
from align_cli.recipe.sections import Source

READABLE = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
PACKED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"(\xb5/\xfd"}
"""Compression suffix that may follow a readable one -> the magic bytes of such a file."""
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
OTHER_FILES = (*PACKED, *ARCHIVES, ".txt", ".arrow", ".xlsx", ".yaml", ".yml", ".md", ".html", ".pkl")
"""Suffixes of files we cannot read. A path with such a suffix is a local file, not a hub id."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> words that denote it in a file name, if delimited by `-`, `.`, `_`, a space or a digit."""
WORDS = {
    split: re.compile(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?=[-._ 0-9]|$)", re.I) for split, words in SPLITS.items()
}
SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\..*")
NO_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


@dataclass
class Found:
    """The files of a local path, or in `problem` the reason why they cannot be read."""

    files: list[Path] = field(default_factory=list)
    root: Path | None = None
    """The base directory of a directory or a glob; None for a single file."""
    saved: bool = False
    """Whether `save_to_disk` wrote the directory."""
    problem: str = ""


def is_local(source: Source) -> bool:
    """Whether the path denotes a local file or directory; otherwise it is a hub id."""
    path = source.path
    if os.path.exists(os.path.expanduser(path)) or path.startswith((".", "/", "~")) or not hub.is_id(path):
        return True
    # If the directory data/ exists, `data/pairs` without a suffix is a mistyped local path, not a hub id.
    return path.lower().endswith(READABLE + OTHER_FILES) or ("/" in path and os.path.isdir(path.split("/")[0]))


def files(source: Source) -> list[Path]:
    """The files that hold the source's rows; empty for a hub id or if nothing can be read."""
    return find(source).files if is_local(source) else []


def find(source: Source) -> Found:
    """The files of a local source, sorted, or the problem that keeps them from being read."""
    if problem := _only_for_hub_ids(source):
        return Found(problem=f"{source.path}: {problem}")
    path = Path(os.path.expanduser(source.path))
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if glob.has_magic(source.path):
            return _globbed(source, str(path))
        if os.path.islink(path):
            return Found(problem=_dangling(path))
        if isinstance(error, (FileNotFoundError, NotADirectoryError, ValueError)):
            return Found(problem=_missing(source.path))
        return Found(problem=f"{source.path}: cannot be read ({error.strerror}); correct the path or its permissions")
    if stat.S_ISDIR(mode):
        return _shards(source, path)
    if source.data_dir is not None:
        return Found(problem=f"{source.path}: is not a directory, so it has no data_dir; remove data_dir")
    if not stat.S_ISREG(mode):
        return Found(problem=f"{source.path}: is a pipe or a device, but rows are read twice; save them to a file")
    problem = "" if kind(path) in READABLE else f"{source.path}: {unreadable(path)}"
    return Found([path], problem=problem)


def kind(path: Path) -> str:
    """The suffix of the file format, without a compression suffix: `.jsonl` for rows.jsonl.gz."""
    name = path.name.lower()
    return Path(name.removesuffix(next((suffix for suffix in PACKED if name.endswith(suffix)), ""))).suffix


def unreadable(path: Path) -> str:
    """The reason why a file of this name cannot be read, and the remedy."""
    name, suffix = path.name.lower(), path.suffix
    if name.endswith(ARCHIVES):
        return f"cannot read a '{suffix}' archive; unpack it and name the files or the directory"
    if suffix.lower() in PACKED:
        return f"the format of the compressed file is unknown; add it to the name, e.g. {path.stem}.jsonl{suffix}"
    finding = f"cannot read a '{suffix}' file" if suffix else "cannot read a file without a suffix"
    return f"{finding}; convert it to one of {', '.join(READABLE)}"


def _globbed(source: Source, pattern: str) -> Found:
    """The files that a glob matches; only those of the source's split if it is not train."""
    parts = Path(pattern).parts
    root = Path(*parts[: next(at for at, part in enumerate(parts) if glob.has_magic(part))])
    matched = sorted(Path(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    rows = [path for path in matched if kind(path) in READABLE]
    if not rows and matched:
        return Found(problem=f"{source.path}: matches {_some(matched)}, but no readable file; {_name_one()}")
    if not rows:
        return Found(problem=_missing(source.path, "no file matches"))
    return Found(rows, root) if source.split == "train" else _of_split(source, root, rows)


def _shards(source: Source, path: Path) -> Found:
    """The files of a directory that hold the requested split."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return Found(sorted(file for file in path.rglob("*") if file.is_file()), path, saved=True)
    if (path / "refs" / "main").is_file():  # a hub cache, which holds one snapshot per revision
        path = path / "snapshots" / (path / "refs" / "main").read_text().strip()
    if source.data_dir is not None:
        path = path / source.data_dir
        if not path.is_dir():
            has = ", ".join(sorted(entry.name for entry in path.parent.glob("*/"))) or "no directories"
            return Found(problem=f"{source.path}: no directory '{source.data_dir}' (has {has}); correct data_dir")
        return _shards(replace(source, data_dir=None), path)
    seen = sorted(_walked(path))
    rows = [file for file in seen if kind(file) in READABLE and file.name not in NO_ROWS]
    if rows and all((path / name).is_file() for name in ("recipe.yaml", "manifest.json")):
        there = [file for file in rows if kind(file) == ".jsonl"]
        return Found(problem=f"{source.path}: is a run; name the file in it that holds the rows: {_some(there)}")
    if not rows:
        has = f"has {_some([file.relative_to(path) for file in seen])}" if seen else "is empty"
        return Found(problem=f"{source.path}: the directory has no data file ({has}); {_name_one()}")
    return _of_split(source, path, rows)


def _only_for_hub_ids(source: Source) -> str:
    """Why a local source cannot have the settings it has; the empty string if it can."""
    if source.subset is not None:
        return f"subset '{source.subset}' is for hub ids; name the subset's folder with data_dir, or its files"
    if source.revision is not None:
        return f"revision '{source.revision}' is for hub ids; remove it"
    if source.data_dir is not None:
        if glob.has_magic(source.path) and not os.path.exists(os.path.expanduser(source.path)):
            return "is a glob, so it has no data_dir; write the folder into the glob"
        if os.path.isabs(source.data_dir) or ".." in Path(source.data_dir).parts:
            return f"data_dir '{source.data_dir}' leads out of it; name a folder below it"
    return ""


def _of_split(source: Source, root: Path, rows: list[Path]) -> Found:
    names = {file.relative_to(root).as_posix(): file for file in rows}
    splits = by_split(list(names))
    wanted = next((split for split, words in SPLITS.items() if source.split in words), source.split)
    stems = _stems(names)
    chosen = splits.get(source.split) or splits.get(wanted) or stems.get(source.split)
    if not chosen:
        return Found(problem=f"{source.path}: no split '{source.split}'; set split to one of {', '.join(splits)}")
    if dangling := next((names[name] for name in chosen if not names[name].exists()), None):
        return Found(problem=_dangling(dangling))
    return Found([names[name] for name in chosen], root)


def by_split(names: list[str]) -> dict[str, list[str]]:
    """Split -> the file names that belong to it, relative to their directory. Without a split's name, all are `train`.

    The first rule that applies is used: shards in data/, whose split may have any name; then directory names with a
    split's word; then file names with a split's word.
    """
    if sharded := _stems([name for name in names if re.fullmatch(r"data/[^/]+", name)]):
        return sharded
    for part in (lambda name: name.split("/")[:-1], lambda name: name.split("/")[-1:]):
        by_word = {
            split: [name for name in names if any(map(word.search, part(name)))] for split, word in WORDS.items()
        }
        by_word = {split: listed for split, listed in by_word.items() if listed}
        # train_prefs-00000-of-00001 and train_sft-00000-of-00001 are both train, but hold different columns
        if any(len(_stems(listed)) > 1 for listed in by_word.values()):
            return _stems(names)
        if by_word:
            return by_word
    return {"train": list(names)}


def _stems(names: Iterable[str]) -> dict[str, list[str]]:
    """Shard names, grouped by the part before `-00000-of-00001`."""
    stems: dict[str, list[str]] = {}
    for name in names:
        if match := SHARD.fullmatch(name.split("/")[-1]):
            stems.setdefault(match[1], []).append(name)
    return dict(sorted(stems.items(), key=lambda item: (item[0] not in SPLITS, [*SPLITS, item[0]].index(item[0]))))


def _walked(path: Path) -> Iterator[Path]:
    """Files below a directory, without hidden ones and those in `.cache`, `.git`, `__pycache__` etc."""
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        here = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (file for file in here if file.is_file() or file.is_symlink())


def _dangling(link: Path) -> str:
    return f"{link}: is a link to {os.readlink(link)}, which does not exist; fetch the file again"


def _some(paths: list[Path]) -> str:
    more = f", … {len(paths) - 5} more" if len(paths) > 5 else ""
    return ", ".join(map(str, paths[:5])) + more


def _name_one() -> str:
    return f"name one of {', '.join(READABLE)}, or a directory of them"


def _missing(path: str, finding: str = "no such file") -> str:
    """The line for a missing file, with the closest name that exists."""
    wanted = Path(os.path.expanduser(path))
    where = "" if wanted.is_absolute() else " (looked in the working directory)"
    folders = [str(folder) for folder in dict.fromkeys((wanted.parent, Path(), Path("data"))) if os.path.isdir(folder)]
    readable = [folder for folder in folders if os.access(folder, os.R_OK)]
    there = [Path(folder, name) for folder in readable for name in sorted(os.listdir(folder))]
    there = [str(file) for file in there if kind(file) in READABLE]
    near = get_close_matches(path, there, n=1) or [file for file in there if Path(file).name == wanted.name]
    if near:
        return f"{path}: {finding}{where}. Did you mean '{near[0]}'?"
    has = f"files found: {', '.join(there[:5])}" if there else "correct the path"
    return f"{path}: {finding}{where}; {has}"


def fingerprint(source: Source) -> str:
    """sha256 of a file's bytes, or of the names and bytes of all files of a directory or a glob;
    `hub:<id>@<revision>:<split>` for a hub id, followed by its subset and data_dir if it has any.

    The revision is the commit in the local hub cache, or `unknown`; the network is not used. Raises DataError for a
    missing or unreadable file.
    """
    if not is_local(source):
        parts = [f"{key}={value}" for key in ("subset", "data_dir") if (value := getattr(source, key)) is not None]
        return ":".join([f"hub:{source.path}@{_cached_revision(source)}", source.split, *parts])
    located = find(source)
    if not located.files:
        raise DataError(located.problem)
    try:
        if located.root is None:
            return _sha256(located.files[0])
        listed = "".join(f"{file.relative_to(located.root).as_posix()}\n{_sha256(file)}\n" for file in located.files)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read ({error.strerror}); correct its permissions") from None
    return hashlib.sha256(listed.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached_revision(source: Source) -> str:
    """The commit that a hub id's revision stands for in the local cache, or `unknown`."""
    revision = source.revision or "main"
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub.constants import HF_HUB_CACHE

    ref = Path(HF_HUB_CACHE, f"datasets--{source.path.replace('/', '--')}", "refs", revision)
    return ref.read_text().strip() if ref.is_file() else "unknown"
