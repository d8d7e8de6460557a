"""samples.jsonl: greedy answers to the same prompts before and after training, one JSON object per prompt."""

from __future__ import annotations

import contextlib
import json

import yaml
from transformers import PreTrainedTokenizerBase, Trainer

from align_cli import distributed
from align_cli.data import chat
from align_cli.data.prompts import as_messages, sample_prompts
from align_cli.generation.sampling import Sampler, respond
from align_cli.model import zero
from align_cli.model.load import set_ends
from align_cli.run import manifest
from align_cli.run.directory import RunDirectory, write_atomically
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
        answers = distributed.from_rank_0(self._kept) if when == "before" else None
        if answers is None:
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

    def _kept(self) -> list[str] | None:
        """The answers that the finished run whose model this one trains gave at its end: they are those that its model
        would give now. None if it was asked otherwise, or computed in other types."""
        recipe, run = self.job.recipe, RunDirectory(self.job.recipe.model.path)
        made, file = manifest.read(run.path), run.samples
        if made is None or recipe.model.chat_template or not file.is_file():
            return None
        precision, now = made.get("precision", {}), self.job.precision.as_manifest()
        same = all(precision.get(key) == now[key] for key in ("weights", "products", "machine"))
        same &= made.get("template_date") == recipe.data.date
        same &= made["files"].get(file.name, {}).get("sha256") == manifest.sha256(file)
        theirs = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
        same &= (
            not theirs.get("lora")
            and (theirs.get("samples") or {}).get("max_new_tokens") == recipe.samples.max_new_tokens
        )
        if not same:
            return None
        answers = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        after = [answer.pop("after") for answer in answers]
        for answer in answers:
            del answer["before"]
        return after if answers == self.rows else None

    def _generate(self, trainer: Trainer) -> list[str]:
        model = trainer.accelerator.unwrap_model(trainer.model)
        texts = [chat.render(self.tokenizer, as_messages(row["prompt"]), prompt=True) for row in self.rows]
        prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ends = set_ends(model, chat.generation_ends(self.tokenizer))
        sampler = Sampler(self.job.recipe.samples.max_new_tokens, batch=BATCH, greedy=True)
        # a value function in the model takes no part
        alone, device = getattr(trainer, "policy_alone", contextlib.nullcontext), trainer.accelerator.device
        with alone(), zero.on_device(model, device), trainer.accelerator.autocast():
            pad = self.tokenizer.pad_token_id
            made = respond(model, prompts, [0] * len(prompts), sampler=sampler, ends=ends, pad=pad)
        return [text.strip() for text in self.tokenizer.batch_decode(made, skip_special_tokens=True)]
