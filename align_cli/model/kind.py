"""Finds out what a path contains (model, adapter, unfinished run, …) from its small files: no weights, no torch.

Libraries accept a reward model as a policy, or an adapter as a model, and then fail deep inside or silently train a
random head. A run's manifest and `config.json` tell them apart.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from align_cli import hub

Kind = Literal["causal-lm", "reward-model", "adapter", "hub", "unfinished", "missing", "other"]


@dataclass(frozen=True)
class Contents:
    """What a path contains."""

    path: str
    kind: Kind
    finding: str = ""
    """Why the path cannot be used, for kinds that cannot."""
    remedy: str = ""
    """How to fix it, if that does not depend on the caller."""
    base: str | None = None
    """An adapter's base model."""
    reward: bool = False
    """An adapter for a sequence classifier."""
    config: dict | None = None
    """Contents of config.json, if it exists."""

    @property
    def problem(self) -> str:
        """Finding and remedy, for a message."""
        return "; ".join(part for part in (self.finding, self.remedy) if part)


def look(path: str) -> Contents:
    """What a path contains: a model, an adapter, an unfinished run, a hub id (not checked for existence) or nothing."""
    folder = Path(path)
    if not folder.exists():
        local = path.startswith((".", "runs/", "models/")) or ("/" in path and Path(path).parts[0] in _here())
        if hub.is_id(path) and not local:
            return Contents(path, "hub")
        return Contents(path, "missing", "no such directory")
    if not folder.is_dir():
        return Contents(path, "other", "is a file, not a model directory")
    config = _json(folder / "config.json")
    if (folder / "recipe.yaml").is_file() and (_json(folder / "manifest.json") or {}).get("status") != "complete":
        return Contents(path, "unfinished", "is an unfinished run", config=config)
    if torn := _unreadable(folder):
        return Contents(path, "other", *torn, config=config)
    if (folder / "adapter_config.json").is_file():
        adapter = _json(folder / "adapter_config.json") or {}
        base, unchanged = _base(folder, adapter.get("base_model_name_or_path"))
        reward = adapter.get("task_type") == "SEQ_CLS"
        if unchanged:
            return Contents(path, "adapter", base=base, reward=reward)
        finding = f"is an adapter whose base {base} has changed since it was trained"
        return Contents(path, "other", finding, "put the old base back, or train the adapter again", base, reward)
    if config is None:
        there = (folder / "config.json").is_file()
        return Contents(path, "other", "its config.json is not a JSON object" if there else "holds no config.json")
    if not list(folder.glob("*.safetensors")):
        old = next((file.name for file in folder.glob("*.bin")), None)
        finding = f"holds {old} but no safetensors" if old else "holds no weights"
        return Contents(path, "other", finding, "save it with save_pretrained (safetensors)", config=config)
    architectures = config.get("architectures") or [""]
    if isinstance(architectures, list) and str(architectures[0]).endswith("ForSequenceClassification"):
        return Contents(path, "reward-model", config=config)
    return Contents(path, "causal-lm", config=config)


BASE = "base.json"
"""File of an adapter's run that names its base: path, path from the run, and fingerprint when it was trained."""


def name_base(folder: Path, base: str, weights: str | None) -> None:
    """Record the base of the adapter in `folder`: its path, also from there, since both may be moved or be named from
    another directory, and the fingerprint of its weights when the adapter was trained."""
    entry = {"path": base, "fingerprint": weights}
    if Path(base).is_dir():
        entry["from_run"] = os.path.relpath(base, folder)
    (folder / BASE).write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")


def _base(folder: Path, name: object) -> tuple[str | None, bool]:
    """(where an adapter's base is, whether its weights are those that the adapter was trained on).

    A relative path is looked up from the working directory and from the adapter; a base that was run again since, below
    the name that it got then. A hub id, or a path where nothing is, comes back as it is.
    """
    if not isinstance(name, str):
        return None, True
    kept = _json(folder / BASE) or {}
    beside = [folder / kept["from_run"]] if isinstance(kept.get("from_run"), str) else []
    above = [parent / name for parent in folder.resolve().parents] if not Path(name).is_absolute() else []
    places = [Path(name), *(Path(os.path.normpath(place)) for place in beside), *above]
    places += [old for place in places[:2] if place.parent.is_dir() for old in place.parent.glob(f"{place.name}.old-*")]
    there = list(dict.fromkeys(place for place in places if place.is_dir()))
    wanted = kept.get("fingerprint")
    for place in there if wanted else there[:1]:
        if not wanted or fingerprint(str(place)) == wanted:
            return name if place == Path(name) else str(place), True
    return (str(there[0]), False) if there else (name, True)


def _here() -> set[str]:
    """Directories in the working directory: a path into one of them is not a hub id."""
    return {entry.name for entry in Path.cwd().iterdir() if entry.is_dir()}


def has_chat_template(path: str) -> bool:
    """Whether the tokenizer saved in a directory has a chat template."""
    folder = Path(path)
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    return bool((_json(folder / "tokenizer_config.json") or {}).get("chat_template"))


def parameters(path: str) -> int | None:
    """Number of parameters in a directory's safetensors, from their headers; None if the directory has none."""
    total = 0
    for file in Path(path).glob("*.safetensors"):
        for name, tensor in header(file).items():
            if name != "__metadata__":
                size = 1
                for length in tensor["shape"]:
                    size *= length
                total += size
    return total or None


def config(path: str) -> dict | None:
    """The config.json of a model, or of an adapter's base; None if it is not at hand."""
    contents = look(path)
    return config(contents.base) if contents.kind == "adapter" and contents.base else contents.config


def heads(path: str) -> int | None:
    """Number of scalar heads in the weights of a reward model or its adapter; None without one."""
    for file in Path(path).glob("*.safetensors"):
        for name, entry in header(file).items():
            if name.endswith("score.weight"):
                return entry["shape"][0]
    return None


def modules(path: str) -> set[str]:
    """Names of the modules with a matrix in a directory's safetensors: those that may get an adapter."""
    return {
        name.removesuffix(".weight")
        for file in Path(path).glob("*.safetensors")
        for name, entry in header(file).items()
        if name.endswith(".weight") and len(entry["shape"]) == 2
    }


def header(file: Path) -> dict:
    """The header of a safetensors file: name -> {dtype, shape, data_offsets}. Raises ValueError if it has none."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > file.stat().st_size:
            raise ValueError("no safetensors header")
        content = json.loads(stream.read(length))
    if not isinstance(content, dict) or not all(_is_entry(*entry) for entry in content.items()):
        raise ValueError("no safetensors header")
    return content


def _is_entry(name: str, entry: object) -> bool:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    return name == "__metadata__" or (isinstance(shape, list) and all(isinstance(length, int) for length in shape))


def _unreadable(folder: Path) -> tuple[str, str] | None:
    """(finding, remedy) for the first file that cannot be read; None if all can."""
    for file in sorted([*folder.glob("*config.json"), *folder.glob("*.safetensors")]):
        try:
            with file.open("rb") as stream:
                pointer = stream.read(24).startswith(b"version https://git-lfs")
            if pointer:
                return f"{file.name} is a git-lfs pointer", "run `git lfs pull` there"
            if file.suffix == ".safetensors":
                header(file)
        except ValueError:
            return f"{file.name} is not a complete safetensors file", "copy or write it again"
        except OSError as error:
            return f"{file.name} cannot be read ({error.strerror})", "correct the file or its permissions"
    return None


def manifest(path: str) -> dict:
    """The manifest of a run; empty if none exists."""
    return _json(Path(path) / "manifest.json") or {}


def fingerprint(path: str) -> str | None:
    """A hash that changes with a model directory's weights or config; None if the path is not a directory.

    Hashes sizes, headers and 64 samples of 64 KiB per file. Since training changes every tensor, this tells models
    apart without reading them in full.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(size // 64, 1 << 16)):
                stream.seek(start)
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()


def small_json(file: Path) -> dict:
    """The JSON object in a file; empty if missing or invalid."""
    return _json(file) or {}


def _json(file: Path) -> dict | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
