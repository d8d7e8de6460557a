"""Values that `trainer:` fields may have: ranges that are checked at once, and which settings only a library can judge.

transformers and torch refuse a wrong value while they build the arguments, the optimizer or the scheduler, some not at
all. A setting that this module does not know whole is tried out in a process of its own (`training/trial.py`).
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Numbers from `least` on, or above it if `above`; up to `most`, or below it if `below`."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    also: tuple[Any, ...] = ()
    """Values outside the range that are accepted, too."""

    def problem(self, value: Any) -> str:
        """The message for a number outside the range, else the empty string. Other types are checked elsewhere."""
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or value in self.also
            or not math.isfinite(value)
        ):
            return ""
        low = value <= self.least if self.above else value < self.least
        high = value >= self.most if self.below else value > self.most
        return f"is {value:g}; give {self}" if low or high else ""

    def __str__(self) -> str:
        words = []
        if self.least > -math.inf:
            words.append(f"more than {self.least:g}" if self.above else f"{self.least:g} or more")
        if self.most < math.inf:
            words.append(f"less than {self.most:g}" if self.below else f"at most {self.most:g}")
        return " and ".join(words) + "".join(f", or {value}" for value in self.also)


COUNT, SIZE, SHARE = Range(1), Range(0), Range(0, 1, below=True)

RANGES: dict[str, Range] = {
    "learning_rate": SIZE,
    "weight_decay": SIZE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": SIZE,
    "max_grad_norm": SIZE,
    "label_smoothing_factor": SHARE,
    "num_train_epochs": Range(0, above=True),
    "max_steps": Range(1, also=(-1,)),
    "warmup_steps": SIZE,
    "logging_steps": Range(0, above=True),
    "save_steps": Range(0, above=True),
    "eval_steps": Range(0, above=True),
    "eval_delay": SIZE,
    "save_total_limit": COUNT,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "dataloader_num_workers": SIZE,
    "neftune_noise_alpha": SIZE,
    "torch_empty_cache_steps": COUNT,
    "ddp_timeout": COUNT,
}
"""Field -> the numbers that make sense for it, where transformers' own check is late, unclear or missing."""

FRACTIONS = {"warmup_steps", "logging_steps", "save_steps", "eval_steps"}
"""Fields that are a number of steps, or below 1 a fraction of all steps."""

SURE: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(RANGES),
    "bf16": None,
    "fp16": (False,),
    "gradient_checkpointing": None,
    "logging_first_step": None,
    "dataloader_drop_last": None,
    "dataloader_pin_memory": None,
    "disable_dropout": None,
    "include_num_input_tokens_seen": None,
    "eval_strategy": ("no", "steps", "epoch"),
    "save_strategy": ("no", "steps", "epoch"),
    "logging_strategy": ("steps", "epoch"),
    "report_to": ("none",),
    "lr_scheduler_type": ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"),
    "optim": ("adamw_torch", "rmsprop", "sgd", "adagrad"),
    "run_name": None,
    "save_only_model": None,
}
"""Fields that are checked whole here: their values, or None for every value of the right type and range."""


LONGEST = 400
"""Characters of a library's message that are shown."""


def problem(key: str, value: Any) -> str:
    """The message for a number that the field cannot have, else the empty string."""
    if key in RANGES and (text := RANGES[key].problem(value)):
        return text
    if key in FRACTIONS and isinstance(value, float) and value > 1 and value % 1:
        return f"is {value:g}; give a whole number of steps, or a fraction of all steps below 1"
    return ""


def unsure(block: dict[str, Any]) -> dict[str, Any]:
    """The part of `trainer:` that only the libraries can judge."""
    return {key: value for key, value in block.items() if not _is_sure(key, value)}


def _is_sure(key: str, value: Any) -> bool:
    if key not in SURE:
        return False
    allowed = SURE[key]
    return allowed is None or any(value == one and type(value) is type(one) for one in allowed)


def blamed(message: str, block: dict[str, Any]) -> str | None:
    """The field of `trainer:` that a library's error names, or None."""
    named = [key for key in block if re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", message)]
    return max(named, key=len, default=None)


def refused(key: str | None, value: Any, error: Exception) -> str:
    """The line for a setting that a library refuses, in the library's own words."""
    words = " ".join(str(error).split()) or type(error).__name__
    place = f"trainer.{key}: {value!r} is refused: " if key else "trainer: these settings are refused together: "
    return f"{place}{words if len(words) <= LONGEST else words[:LONGEST] + ' …'}"
