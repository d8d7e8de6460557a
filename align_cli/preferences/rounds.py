"""The loop of iterative DPO and SPIN: each round has its own run directory and starts from the previous round's model.

A round answers its prompts, makes pairs, and trains on them with its initial policy as reference. It is finished once
its manifest exists. A killed loop runs the same rounds again: finished rounds are skipped, existing answers are reused,
and training resumes from its checkpoint. The last round's model is also placed in the loop's own directory.
"""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from datasets import Dataset
from trl import DPOConfig

from align_cli import distributed
from align_cli.data.groups import Count
from align_cli.errors import UpstreamError
from align_cli.model import kind, load, lora
from align_cli.preferences import dpo
from align_cli.recipe.preferences import DpoRecipe, SpinRecipe
from align_cli.run import manifest
from align_cli.run.directory import RunDirectory, write_atomically
from align_cli.training.job import Job, Outcome
from align_cli.training.loop import run_to_end
from align_cli.training.placement import release
from align_cli.training.samples import BEFORE
from align_cli.training.stop import Stopped

NOT_MODEL = {"recipe.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl", "responses.jsonl", "pairs.jsonl"}
"""Files of a round that do not belong to its model."""
LoopRecipe = TypeVar("LoopRecipe", DpoRecipe, SpinRecipe)


@dataclass
class Sampled:
    """Sampled training data of a round."""

    rows: list[dict[str, list[int]]]
    """`prompt_ids`, `chosen_ids`, `rejected_ids`."""
    figures: dict[str, float]
    """Metrics of the answers."""
    count: Count
    """Counts of prompts answered and of prompts that gave no pair."""
    held_out: list[dict[str, list[int]]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    """Further entries of the round's manifest."""


class Rounds(ABC, Generic[LoopRecipe]):
    """The loop over rounds. Subclasses define the name of a round, its training data and its settings."""

    word: str
    """Name of a round: its directory is <word>-<number>."""
    numbers: range

    def __init__(self, job: Job[LoopRecipe]):
        self.job, self.tokenizer = job, load.tokenizer(job.recipe.model, job.base)
        self.counts: list[Count] = []
        self.reason: dict[str, str] = {}
        """Why the loop ended before its last round, for the manifest; empty if it did not."""
        self.final: Path | None = None
        """Directory of the round whose model becomes the loop's; None for the last round."""

    @abstractmethod
    def settings(self, number: int) -> LoopRecipe:
        """The recipe with the settings of this round."""

    @abstractmethod
    def arguments(self, part: Job[LoopRecipe]) -> DPOConfig:
        """Training arguments of a round."""

    @abstractmethod
    def sample(self, part: Job[LoopRecipe], number: int) -> Sampled | None:
        """The round's answers as rows to train on; None if nothing is left to learn. Raises Stopped."""

    def before(self, number: int, figures: dict[str, float]) -> bool:
        """Whether the round may train, given the metrics of its answers."""
        return True

    def after(self, number: int, made: dict[str, Any]) -> bool:
        """Whether another round may follow, given this round's manifest."""
        return True

    def folder(self, number: int) -> Path:
        """A round's run directory."""
        return self.job.run.path / f"{self.word}-{number}"

    def run(self) -> Outcome:
        """Run all rounds and place the last one's model in the loop's own directory."""
        try:
            return self._finish(self._rounds())
        except Stopped as stopped:
            return Outcome({}, self.counts, stopped.number)

    def _rounds(self) -> list[tuple[int, dict[str, Any]]]:
        """Run the rounds. Returns (number, manifest) of every finished round."""
        job, start, done = self.job, self.job.recipe.model.path, []
        for number in self.numbers:
            run = RunDirectory(self.folder(number))
            made = distributed.from_rank_0(lambda run=run: _finished(run))
            if made is not None:
                if not self.before(number, made["sampled"]):
                    break
                job.say(f"{run.path} is finished")
            else:
                made = self._round(number, run, start)
                if made is None:
                    break
            start = str(run.path)
            done.append((number, made))
            if not self.after(number, made):
                break
        return done

    def _round(self, number: int, run: RunDirectory, start: str) -> dict[str, Any] | None:
        """Run one round. Returns its manifest; None if it must not train."""
        started, part = manifest.now(), self._part(number, run, start)
        self._write_recipe(part)
        parents = self._parents(part, start) if part.main else []
        sampled = self.sample(part, number)
        if sampled is None:
            return None
        release()
        if not self.before(number, sampled.figures):
            return None
        part.recipe = replace(self.settings(number), run_dir=part.recipe.run_dir, model=part.recipe.model)
        self._write_recipe(part)
        outcome = self._train(part, number, sampled)
        if outcome.stopped_by is not None:
            raise Stopped(outcome.stopped_by)
        made = None
        if self.job.main:
            made = manifest.write(
                run,
                stage=part.recipe.stage,
                name=f"{self.job.recipe.name}, {run.path.name}",
                seed=part.recipe.seed,
                parents=parents,
                data=[sampled.count.as_manifest()],
                metrics=outcome.metrics,
                world_size=part.ranks,
                zero_stage=part.recipe.zero.stage,
                started=started,
                extra={"precision": part.precision_entry(), "sampled": sampled.figures} | sampled.extra,
            )
        return distributed.broadcast(made)

    def _parents(self, part: Job[LoopRecipe], start: str) -> list[dict[str, Any]]:
        """The manifest's entries for the models that the round uses, hashed before it reads them."""
        rewards = [source for _, source in part.recipe.reward_sources()]
        models = [("policy", start), *(("reward", one.path) for one in rewards if one.path)]
        models += [("judge", one.judge.path) for one in rewards if one.judge and one.judge.path]
        entries = {"parents": [manifest.parent(role, path) for role, path in models], "code": []}
        return manifest.keep_inputs(part.run, entries)["parents"]

    def _part(self, number: int, run: RunDirectory, start: str) -> Job[LoopRecipe]:
        """The job of one round."""
        recipe = replace(self.settings(number), run_dir=str(run.path))
        base = self.job.base
        if number != self.numbers[0]:
            recipe, base = replace(recipe, model=replace(recipe.model, path=start)), start

        def merged() -> str:
            run.path.mkdir(parents=True, exist_ok=True)
            if kind.look(base).kind != "adapter":
                return base
            # the reference is the merged model, not the adapter's base
            folder = run.path / "base"
            if not folder.is_dir():
                lora.merge(start, folder, trust_remote_code=recipe.model.trust_remote_code)
            return str(folder)

        base = distributed.from_rank_0(merged)
        fingerprint = kind.fingerprint(base) if recipe.lora and self.job.main else None
        return replace(self.job, recipe=recipe, run=run, base=base, base_fingerprint=fingerprint)

    def _write_recipe(self, part: Job[LoopRecipe]) -> None:
        if not part.main:
            return
        head = f"# {part.run.path.name} of `align {part.recipe.stage} recipe={self.job.run.recipe}`\n"
        text = yaml.safe_dump(asdict(part.recipe), sort_keys=False, allow_unicode=True)
        write_atomically(part.run.recipe, head + text)

    def _train(self, part: Job[LoopRecipe], number: int, sampled: Sampled) -> Outcome:
        before = self.folder(number - 1) / "samples.jsonl"
        if part.main and before.is_file() and not (part.run.path / BEFORE).is_file():
            # this round's initial model gave the previous round's answers "after" training
            answers = [json.loads(line)["after"] for line in before.read_text(encoding="utf-8").splitlines()]
            write_atomically(part.run.path / BEFORE, json.dumps(answers, ensure_ascii=False))
        args = self.arguments(part)
        held_out = Dataset.from_list(sampled.held_out) if sampled.held_out else None
        trainer = dpo.trainer(part, self.tokenizer, args, Dataset.from_list(sampled.rows), held_out)
        outcome = run_to_end(trainer, self.tokenizer, part, [])
        engines = [getattr(trainer, "deepspeed", None), trainer.ref_model]
        trainer.accelerator.free_memory()
        del trainer
        release(*engines)
        return outcome

    # -- the loop's run directory

    def _finish(self, done: list[tuple[int, dict[str, Any]]]) -> Outcome:
        job = self.job
        last = self.final or self.folder(done[-1][0])
        if job.main:
            _link(last, job.run.path)
            self._join_metrics(done)
            self._join_samples([number for number, _ in done], last)
        rounds = [{self.word: number} | made["sampled"] | made["metrics"] for number, made in done]
        extra = {f"{self.word}s": rounds, "model_of": last.name} | self.reason
        parents = [manifest.parent(self.word, str(last))] if job.main else []
        metrics = next(made["metrics"] for number, made in done if self.folder(number) == last)
        return Outcome(metrics | {f"{self.word}s": len(done)}, self.counts, extra=extra, parents=parents)

    def _join_metrics(self, done: list[tuple[int, dict[str, Any]]]) -> None:
        """Write all rounds' metrics into one file, steps renumbered; each round starts with its answers' metrics."""
        lines, offset = [], 0
        for number, made in done:
            lines.append({"step": offset, self.word: number} | made["sampled"])
            for text in (self.folder(number) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                row = json.loads(text)
                lines.append(row | {"step": offset + row["step"], self.word: number})
            offset += made["metrics"]["steps"]
        write_atomically(self.job.run.metrics, "".join(json.dumps(line) + "\n" for line in lines))

    def _join_samples(self, numbers: list[int], last: Path) -> None:
        """Write samples.jsonl with the answers from before the first round and after the last."""
        files = [self.folder(numbers[0]) / "samples.jsonl", last / "samples.jsonl"]
        if all(file.is_file() for file in files):
            first, final = (file.read_text(encoding="utf-8").splitlines() for file in files)
            rows = [json.loads(b) | {"before": json.loads(a)["before"]} for a, b in zip(first, final, strict=True)]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(self.job.run.samples, text)


def _finished(run: RunDirectory) -> dict[str, Any] | None:
    """The manifest of a finished round. Raises UpstreamError if its parents have changed."""
    made = manifest.read(run.path) if run.state() == "finished" else None
    if made is not None and (lines := manifest.changed_parents(made)):
        raise UpstreamError(f"{run.path}: its {lines[0]}; start the loop anew with force=true")
    return made


def _link(source: Path, target: Path) -> None:
    """Hard-link a round's model into the loop's directory, or copy it if the file system cannot link."""
    for file in source.iterdir():
        if not file.is_file() or file.name.startswith(".") or file.name in NOT_MODEL:
            continue
        part = target / f".{file.name}.part"
        part.unlink(missing_ok=True)
        try:
            os.link(file, part)
        except OSError:
            shutil.copyfile(file, part)
        part.replace(target / file.name)
