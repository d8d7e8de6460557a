"""manifest.json: the inputs and outputs of a finished run, with hashes.

It is used to tell whether a run is finished and unchanged, and whether its parents have changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from align_cli.data.groups import Count
from align_cli.model import kind
from align_cli.run.directory import RunDirectory, write_atomically

PACKAGES = ("align-cli", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed")
LOOSE = ("force", "launch")
"""Recipe keys that do not affect the results."""
INPUTS = ".inputs.json"
"""File of an unfinished run with the manifest's entries of its inputs, as they were when it started."""

DATA = ".data.json"
"""File of an unfinished run with the fingerprints of its local sources, as they were when it was prepared."""


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read(run: str | Path) -> dict[str, Any] | None:
    """A run's manifest, or None if it is missing or unreadable."""
    try:
        content = json.loads((Path(run) / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def parent(role: str, path: str) -> dict[str, Any]:
    """The entry of a parent: runs are identified by the manifest's hash, model directories by a weight fingerprint."""
    manifest = Path(path) / "manifest.json"
    if manifest.is_file():
        return {"role": role, "path": path, "manifest_sha256": sha256(manifest)}
    return {"role": role, "path": path, "manifest_sha256": None, "fingerprint": kind.fingerprint(path)}


def inputs(run: RunDirectory) -> dict[str, Any] | None:
    """The manifest's entries `parents` and `code`, as they were when an unfinished run started; None if it has not
    begun (`RunDirectory.begun`), so that nothing rests on them."""
    try:
        return json.loads((run.path / INPUTS).read_text(encoding="utf-8")) if run.begun() else None
    except (OSError, ValueError):
        return None


def keep_inputs(run: RunDirectory, entries: dict[str, Any]) -> dict[str, Any]:
    """Record the inputs of a run before it reads them, since they may be made anew while it trains. Returns the entries
    of the manifest: those of its first start if the run is resumed."""
    if (kept := inputs(run)) is not None:
        return kept
    write_atomically(run.path / INPUTS, json.dumps(entries, indent=2) + "\n")
    return entries


def keep_data(run: RunDirectory, counts: list[Count]) -> None:
    """Record which data an unfinished run is made from; a run that has begun keeps its first record."""
    file = run.path / DATA
    if not (file.is_file() and run.begun()):
        write_atomically(file, json.dumps([[count.source, count.fingerprint] for count in counts]) + "\n")


def changed_data(run: RunDirectory, counts: list[Count]) -> list[str]:
    """A line for every source of an unfinished run that has changed since it began."""
    try:
        kept = json.loads((run.path / DATA).read_text(encoding="utf-8")) if run.begun() else []
    except (OSError, ValueError):
        return []
    return differing_data([(source, fingerprint) for source, fingerprint in kept], counts)


def differing_data(made: list[tuple[str, str]], counts: list[Count]) -> list[str]:
    """A line for every source of which no part has its old fingerprint; several parts of a directory may be sources."""
    today: dict[str, set[str]] = {}
    for count in counts:
        today.setdefault(count.source, set()).add(count.fingerprint)
    return [
        f"data {source} has changed since"
        for source, fingerprint in made
        if source in today and fingerprint not in today[source]
    ]


def run_of(file: str) -> str | None:
    """The finished run whose directory contains a data file, if any."""
    for folder in Path(file).parents:
        if (folder / "manifest.json").is_file():
            return str(folder)
    return None


def changed_parents(manifest: dict[str, Any]) -> list[str]:
    """A line for every parent that is missing or has changed."""
    lines = []
    for entry in manifest.get("parents", []):
        path, today = entry["path"], parent(entry["role"], entry["path"])
        if not Path(path).exists() and (entry["manifest_sha256"] or entry.get("fingerprint")):
            lines.append(f"{entry['role']} {path} is gone")
        elif any(today.get(key) != entry.get(key) for key in ("manifest_sha256", "fingerprint")):
            lines.append(f"{entry['role']} {path} has changed since")
    return lines


def differing_keys(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """`key old → new` for every setting that differs between two resolved recipes, except the keys in LOOSE."""
    keys = []
    for key in sorted(set(old) | set(new)):
        if not path and key in LOOSE:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            keys += differing_keys(before, after, f"{path}{key}.")
        elif _given(before) != _given(after):
            keys.append(f"{path}{key} {json.dumps(before)} → {json.dumps(after)}")
    return keys


def _given(value: Any) -> Any:
    """The value without keys that are null: earlier versions did not know them."""
    if isinstance(value, dict):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return [_given(inner) for inner in value] if isinstance(value, list) else value


def missing_files(run: RunDirectory, manifest: dict[str, Any]) -> list[str]:
    """A line for every file of a finished run that is missing or has another size. Manifests of earlier versions list
    no files of subdirectories."""
    lines = []
    for name, entry in manifest.get("files", {}).items():
        file = run.path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            lines.append(f"{name} is gone or was changed")
    return lines


def write(
    run: RunDirectory,
    *,
    stage: str,
    name: str,
    seed: int,
    parents: list[dict[str, Any]],
    data: list[dict[str, Any]],
    metrics: dict[str, Any],
    world_size: int,
    zero_stage: int,
    started: str,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the manifest atomically, as the last file: a run with a manifest is finished. Returns it."""
    files = _hashed(run)
    manifest = {
        "stage": stage,
        "name": name,
        "status": "complete",
        "recipe_sha256": files["recipe.yaml"]["sha256"],
        "parents": parents,
        "data": data,
        "files": files,
        "metrics": metrics,
        "world_size": world_size,
        "zero_stage": zero_stage,
        "seed": seed,
        "versions": {package: installed for package in PACKAGES if (installed := version_of(package))},
        "started": started,
        "finished": now(),
        **(extra or {}),
    }
    write_atomically(run.manifest, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    for file in (INPUTS, DATA):
        (run.path / file).unlink(missing_ok=True)
    return manifest


def merged(run: str, destination: Path) -> None:
    """Write the manifest of a model that an adapter's run was merged into: that of the run, with the run as parent and
    its own files. A reward model keeps its scale by it. Nothing is written for an adapter that is not of a run."""
    made, recipe = read(run), Path(run) / "recipe.yaml"
    if made is None or not recipe.is_file():
        return
    shutil.copy2(recipe, destination / "recipe.yaml")
    here = RunDirectory(destination)
    entries = {"parents": [parent("adapter", run)], "files": _hashed(here), "finished": now()}
    write_atomically(here.manifest, json.dumps(made | entries, indent=2, ensure_ascii=False) + "\n")


def _hashed(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """The manifest's entries for a run's files."""
    return {
        file.relative_to(run.path).as_posix(): {"sha256": sha256(file), "bytes": file.stat().st_size}
        for file in sorted(_results(run))
    }


def _results(run: RunDirectory) -> Iterator[Path]:
    """The run's files, and those of its subdirectories: a value function, the merged base of an adapter. Checkpoints,
    logs of trackers and hidden files are no results; a round of a loop has a manifest of its own."""
    for folder, folders, names in os.walk(run.path):
        here = Path(folder)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and here / name not in (run.checkpoints, run.logs)
            and not (here / name / "recipe.yaml").is_file()
        ]
        yield from (here / name for name in names if not name.startswith(".") and here / name != run.manifest)


def version_of(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
