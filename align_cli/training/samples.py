"""samples.jsonl: greedy answers to the same prompts before and after training, one JSON object per prompt."""

from __future__ import annotations

import contextlib
import json

import torch
from transformers import PreTrainedTokenizerBase, Trainer

from align_cli import distributed
from align_cli.data import chat
from align_cli.data.prompts import as_messages, sample_prompts
from align_cli.model import zero
from align_cli.model.load import set_ends
from align_cli.run.directory import write_atomically
from align_cli.training.job import Job

BEFORE = ".samples-before.json"
"""File that keeps the answers from before training until the answers from after training are written."""
BATCH = 32
"""Prompts per generation batch."""


class Samples:
    """The recipe's sample prompts and the model's answers to them."""

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase):
        self.job, self.tokenizer = job, tokenizer
        wanted = job.recipe.samples
        self.rows = distributed.from_rank_0(lambda: sample_prompts(wanted, tokenizer)) if wanted else []
        self.before = job.run.path / BEFORE

    def answer(self, trainer: Trainer, when: str) -> None:
        """Answer every prompt; `when` is "before" or "after" training. After training, write samples.jsonl.

        A resumed run keeps the answers from before its first step.
        """
        if not self.rows:
            return
        if when == "before" and distributed.from_rank_0(self._began):
            return
        self.job.say(f"answering {len(self.rows)} sample prompts, {when}")
        answers = self._generate(trainer)
        if not self.job.main:
            return
        if when == "before":
            write_atomically(self.before, json.dumps(answers, ensure_ascii=False))
            return
        before = json.loads(self.before.read_text()) if self.before.is_file() else [None] * len(answers)
        lines = [
            json.dumps({**row, "before": old, "after": new}, ensure_ascii=False)
            for row, old, new in zip(self.rows, before, answers, strict=True)
        ]
        write_atomically(self.job.run.samples, "\n".join(lines) + "\n")
        self.before.unlink(missing_ok=True)

    def _began(self) -> bool:
        """Whether an earlier attempt has answered the prompts, or trained."""
        return self.before.is_file() or self.job.run.latest_checkpoint() is not None

    def _generate(self, trainer: Trainer) -> list[str]:
        model = trainer.accelerator.unwrap_model(trainer.model)
        texts = [chat.render(self.tokenizer, as_messages(row["prompt"]), prompt=True) for row in self.rows]
        ends, answers = set_ends(model, chat.generation_ends(self.tokenizer)), []
        training = model.training
        model.eval()
        # a value function in the model takes no part
        alone, device = getattr(trainer, "policy_alone", contextlib.nullcontext), trainer.accelerator.device
        with alone(), zero.on_device(model, device), torch.no_grad(), trainer.accelerator.autocast():
            for start in range(0, len(texts), BATCH):
                batch = self.tokenizer(
                    texts[start : start + BATCH],
                    add_special_tokens=False,
                    padding=True,
                    padding_side="left",
                    return_tensors="pt",
                ).to(device)
                made = model.generate(
                    **batch,
                    max_new_tokens=self.job.recipe.samples.max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=ends,
                    pad_token_id=self.tokenizer.pad_token_id,
                    use_cache=True,
                )
                fresh = made[:, batch["input_ids"].shape[1] :]
                answers += [text.strip() for text in self.tokenizer.batch_decode(fresh, skip_special_tokens=True)]
        model.train(training)
        return answers
