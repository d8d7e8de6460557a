"""Checks the `trainer:` block against the fields of the stage's TRL config, which are parsed from its source.

Importing a TRL config takes five seconds because it imports torch, while its dataclass fields are literals in three
source files. Parsing them always reflects the installed version.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from align_cli.errors import did_you_mean
from align_cli.recipe import trainer_rules
from align_cli.recipe.stages import OWNED, STAGES


@dataclass(frozen=True)
class TrainerField:
    """A field of a TRL config."""

    annotation: str
    default: Any
    """Its literal default, or None if the default is computed."""
    help: str


@cache
def _module(package: str, relative: str) -> ast.Module:
    # find_spec of a top-level name locates the package without running it
    spec = find_spec(package)
    return ast.parse((Path(spec.origin).parent / relative).read_text(encoding="utf-8"))


def _class(module: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name)


def _literal(node: ast.expr | None) -> Any:
    """The value of a literal, or of a `field(default=…)` / `default_factory=lambda: …` holding one; else None."""
    if isinstance(node, ast.Call):
        given = {word.arg: word.value for word in node.keywords}
        inner = given.get("default", given.get("default_factory"))
        return _literal(inner.body if isinstance(inner, ast.Lambda) else inner)
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def _help(node: ast.expr | None) -> str:
    for word in getattr(node, "keywords", []):
        if word.arg == "metadata":
            return str((_literal(word.value) or {}).get("help", "")).replace("%%", "%")
    return ""


BF16 = (
    "Mixed precision in bfloat16: weights keep model.dtype. auto: where the hardware multiplies bfloat16 (GPUs from "
    "compute capability 8.0 on, CPUs with AMX or AVX512-BF16); elsewhere it is emulated and slow, and float32 is used."
)


@cache
def fields(stage: str) -> dict[str, TrainerField]:
    """Name -> field of the stage's TRL config, including inherited fields."""
    config = STAGES[stage].config
    known: dict[str, TrainerField] = {}
    sources = [("transformers", "training_args.py", "TrainingArguments")]
    if config.file is not None:
        sources += [("trl", "trainer/base_config.py", "_BaseConfig"), ("trl", config.file, config.name)]
    for package, file, cls in sources:
        for node in _class(_module(package, file), cls).body:
            if isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_"):
                known[node.target.id] = TrainerField(
                    ast.unparse(node.annotation), _literal(node.value), _help(node.value)
                )
    known["bf16"] = TrainerField("bool | None", "auto", BF16)
    return known


@cache
def choices(enum: str) -> tuple[str, ...]:
    """The values of a transformers enum such as SchedulerType, or none if the enum does not exist."""
    for file in ("trainer_utils.py", "training_args.py"):
        for node in _module("transformers", file).body:
            if isinstance(node, ast.ClassDef) and node.name == enum:
                values = [_literal(entry.value) for entry in node.body if isinstance(entry, ast.Assign)]
                return tuple(value for value in values if isinstance(value, str))
    return ()


ENUMS = {
    "lr_scheduler_type": "SchedulerType",
    "optim": "OptimizerNames",
    "eval_strategy": "IntervalStrategy",
    "save_strategy": "SaveStrategy",
    "logging_strategy": "IntervalStrategy",
}


ALSO = {"bf16": ("auto",)}
"""Field -> values that we accept besides TRL's, and resolve before TRL sees them."""


def owner(stage: str, key: str) -> tuple[bool, str | None]:
    """(whether the field is set elsewhere, the recipe key that sets it or None)."""
    table = {**OWNED, **STAGES[stage].owned}
    return key in table, table.get(key)


def problems(stage: str, block: dict[str, Any]) -> list[tuple[str, str]]:
    """(dotted key, finding and remedy) for every invalid entry of `trainer:`."""
    known, lines = fields(stage), []
    for key, value in block.items():
        place, (owned, better) = f"trainer.{key}", owner(stage, key)
        if owned and key in known:
            lines.append(
                (place, f"is set by {better}; write {better}=…" if better else "is set by the run itself; remove it")
            )
        elif key not in known:
            moved = {
                "warmup_ratio": "; write warmup_steps=0.1 for a fraction of the steps",
                "evaluation_strategy": "; write eval_strategy",
            }
            near = moved.get(key) or did_you_mean(key, [name for name in known if not owner(stage, name)[0]])
            lines.append((place, f"unknown key{near or f'; {STAGES[stage].config.name} has no such field'}"))
        elif wrong := _wrong_type(key, value, known[key].annotation) or trainer_rules.problem(key, value):
            lines.append((place, wrong))
    return lines


def _wrong_type(key: str, value: Any, annotation: str) -> str:
    """The message for a value of the wrong type or an unknown choice, else the empty string."""
    if value in ALSO.get(key, ()):
        return ""
    if key in ENUMS and isinstance(value, str):
        allowed = choices(ENUMS[key])
        if allowed and value not in allowed:
            return f"'{value}' is not one of {', '.join(allowed)}{did_you_mean(value, list(allowed))}"
        return ""
    kinds = {part.strip() for part in annotation.replace("Optional[", "None |").replace("]", "").split("|")}
    simple = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,), "None": (type(None),)}
    if not kinds <= set(simple):
        return ""
    # bool is an int in Python, but `true` for a count is a mistake
    fits = any(isinstance(value, simple[kind]) and (kind == "bool" or not isinstance(value, bool)) for kind in kinds)
    if fits:
        return ""
    wanted = " or ".join([*ALSO.get(key, ()), *sorted("null" if kind == "None" else kind for kind in kinds)])
    return f"expected {wanted}, found {type(value).__name__} {value!r}"
