"""Tries the `trainer:` settings that only the libraries can judge: builds the stage's config, a trainer of a tiny
model, its optimizer and its schedule, and makes a step.

Runs in a process of its own, since it imports torch and TRL: `python -m align_cli.training.trial`, with
`{"stage": …, "trainer": {…}}` on stdin; it prints a JSON list of problems.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from typing import Any

import torch
import transformers
import trl
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from align_cli.recipe import trainer_rules
from align_cli.recipe.stages import STAGES


def problems(stage: str, block: dict[str, Any]) -> list[str]:
    """A line for every setting that a library refuses, in the library's words."""
    block, lines = dict(block), []
    while (error := _attempt(stage, block)) is not None:
        key = _culprit(stage, block, error)
        lines.append(trainer_rules.refused(key, block.get(key), error))
        if key is None:
            break
        del block[key]
    return lines


def _culprit(stage: str, block: dict[str, Any], error: Exception) -> str | None:
    """The setting without which the error changes: first among those that the message names."""
    doubtful = list(trainer_rules.unsure(block))
    named = trainer_rules.blamed(str(error), {key: block[key] for key in doubtful})
    for key in sorted(doubtful, key=lambda key: key != named):
        left = {other: value for other, value in block.items() if other != key}
        if str(_attempt(stage, left)) != str(error):
            return key
    return None


def _attempt(stage: str, block: dict[str, Any]) -> Exception | None:
    """What building and stepping a tiny trainer raises."""
    name = STAGES[stage].config.name
    cls = getattr(trl, name, None) or getattr(transformers, name)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, max_position_embeddings=16,
        )
    )  # fmt: skip
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}] * 8
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        try:
            args = cls(**(_defaults() | block | _fixed(folder)))
            trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
            trainer.create_optimizer_and_scheduler(num_training_steps=10)
            trainer.get_train_dataloader()
            device = next(trainer.model.parameters()).device
            for parameter in trainer.model.parameters():
                parameter.grad = parameter.detach().clone().to(device)
            trainer.optimizer.step()
        except Exception as error:  # noqa: BLE001  any library may raise anything: that is what is asked
            return error
    return None


def _defaults() -> dict[str, Any]:
    return {"report_to": "none", "lr_scheduler_type": "cosine", "bf16": False, "use_cpu": not torch.cuda.is_available()}


def _fixed(folder: str) -> dict[str, Any]:
    """What the run decides, and what `trainer_rules` knows whole: not in question here."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 10,
        "bf16": False,
        "disable_tqdm": True,
        "log_level": "error",
    }


def main() -> None:
    asked = json.load(sys.stdin)
    sys.stdout.write(json.dumps(problems(asked["stage"], asked["trainer"])) + "\n")


if __name__ == "__main__":
    main()
