"""Checks of when a trainer evaluates, saves, logs and stops, which transformers would report with a traceback."""

from __future__ import annotations

from typing import Any

EVALUATES = {
    "eval_strategy": ("no", False, True, None),
    "eval_on_start": (False, None),
    "save_strategy": ("no", "steps", "epoch", False, True, None),
}
"""Trainer fields that trigger an evaluation unless they have one of these values."""


def problems(trainer: dict[str, Any], evaluated: bool) -> list[str]:
    """Problems of when to evaluate, save and log. `evaluated`: whether data.eval is set."""
    lines = [
        f"trainer.{key}: is {str(trainer[key]).lower()}, since YAML reads yes and no as booleans; write {key}: 'no'"
        for key in ("eval_strategy", "save_strategy", "logging_strategy")
        if isinstance(trainer.get(key), bool)
    ]
    if not evaluated:
        lines += [
            f"trainer.{key}: there is nothing to evaluate on; set data.eval, a source or a fraction"
            for key, without in EVALUATES.items()
            if trainer.get(key, without[0]) not in without
        ]
    elif trainer.get("save_strategy") == "best":
        if not trainer.get("metric_for_best_model"):
            lines.append("trainer.save_strategy: best needs a metric; set trainer.metric_for_best_model=eval_loss")
        if trainer.get("eval_strategy", "no") == "no":
            lines.append("trainer.save_strategy: best needs evaluations; set trainer.eval_strategy=epoch")
    return lines


def steps_given(trainer: dict[str, Any]) -> float:
    """trainer.max_steps if it is a number, else 0."""
    steps = trainer.get("max_steps")
    return steps if isinstance(steps, (int, float)) else 0
