"""When a trainer evaluates, saves, logs and stops: what transformers would refuse with a traceback."""

from __future__ import annotations

from typing import Any

EVALUATES = {
    "eval_strategy": ("no", False, True, None),
    "eval_on_start": (False, None),
    "save_strategy": ("no", "steps", "epoch", False, True, None),
}
"""Trainer fields that ask for an evaluation unless they have one of these values."""


def problems(trainer: dict[str, Any], evaluated: bool) -> list[str]:
    """When to evaluate, save and log: what transformers would refuse with a traceback."""
    lines = [
        f"trainer.{key}: is {str(trainer[key]).lower()}, as which YAML reads a bare yes or no; write {key}: 'no'"
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
            lines.append("trainer.save_strategy: best by which metric? set trainer.metric_for_best_model=eval_loss")
        if trainer.get("eval_strategy", "no") == "no":
            lines.append("trainer.save_strategy: best needs evaluations on the way; set trainer.eval_strategy=epoch")
    return lines


def steps_given(trainer: Any) -> float:
    """trainer.max_steps, where it is a number."""
    steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
    return steps if isinstance(steps, (int, float)) else 0
