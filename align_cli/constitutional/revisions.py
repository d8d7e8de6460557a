"""The supervised half of Constitutional AI up to training: first answers, critiques, revisions (arXiv 2212.08073, §3).

Each round starts from the prompt and the latest answer, so the conversation does not grow with the number of rounds.
"""

from __future__ import annotations

import random
from dataclasses import replace

from align_cli.constitutional import critiques
from align_cli.constitutional.models import Models
from align_cli.data.groups import Count
from align_cli.generation.generators import Generator
from align_cli.generation.sampling import row_seed
from align_cli.model import load
from align_cli.recipe.constitution import Constitution, Principle
from align_cli.recipe.constitutional import CaiRecipe
from align_cli.rewards import prompts as prompt_rows
from align_cli.training.job import Job
from align_cli.training.journal import Row, RowJournal, Unit

ANSWER, CRITIQUE, REVISION = 1, 2, 3
"""Numbers that separate the seeds of each purpose; `labels` continues them."""


def prompts(job: Job[CaiRecipe]) -> tuple[list[Row], list[Count]]:
    """Rows with `row`, `kind` and `prompt`, red-team prompts first, and the row counts, which are also printed."""
    data, method = job.recipe.data, job.recipe.method
    tokenizer = load.tokenizer(job.recipe.model, job.base)
    rows: list[Row] = []
    counts: list[Count] = []
    for kind, sources in (("red-team", data.train), ("harmless", method.harmless)):
        if sources:
            of_kind = replace(job, recipe=replace(job.recipe, data=replace(data, train=sources, eval=None)))
            dataset, count = prompt_rows.dataset(of_kind, tokenizer)
            counts += count
            for row in dataset:
                turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["prompt"]]
                rows.append({"row": len(rows), "kind": kind, "prompt": turns})
    return rows, counts


def answers(job: Job[CaiRecipe], journal: RowJournal, models: Models, prompts: list[Row]) -> None:
    """Write answers.jsonl: the writer's first answer to every prompt."""
    if journal.read("answers") is not None:
        return
    writer, seed = models.writer, job.recipe.seed
    limit = job.recipe.generation.max_new_tokens

    def make(unit: Unit) -> list[Row]:
        seeds = [row_seed(seed, ANSWER, 0, at) for at in unit]
        replies = writer.reply([prompts[at]["prompt"] for at in unit], seeds, limit)
        return [
            prompts[at] | {"answer": reply.text, "flag": reply.flag or ("" if reply.text else "empty")}
            for at, reply in zip(unit, replies, strict=True)
        ]

    journal.fill("answers", writer.units([row["prompt"] for row in prompts]), make, workers=writer.workers)


def revisions(job: Job[CaiRecipe], journal: RowJournal, models: Models, constitution: Constitution) -> None:
    """Write revisions.jsonl: for every prompt, the chain of principles, critiques and revisions, and the result."""
    if journal.read("revisions") is not None:
        return
    recipe = job.recipe
    chains = [row | {"chain": []} for row in journal.read("answers") or []]
    intermediate = []
    for number in range(1, recipe.method.revisions + 1):
        principles = [principle(recipe.seed, constitution, row, number) for row in chains]
        round_ = _Round(recipe, journal, models.writer, constitution, chains, principles, number)
        intermediate += [f".critiques-{number}", f".revisions-{number}"]
        written = round_.critiques(intermediate[-2])
        revised = round_.revisions(intermediate[-1], written)
        for row, one, critique, revision in zip(chains, principles, written, revised, strict=True):
            step = {"principle": one.id, "critique": critique["text"], "critique_flag": critique["flag"]}
            row["chain"].append(step | {"revision": revision["text"], "revision_flag": revision["flag"]})
    journal.write("revisions", [row | {"revision": latest(row, first="")} for row in chains])
    journal.remove(*intermediate)


def principle(seed: int, constitution: Constitution, row: Row, number: int) -> Principle:
    """The principle for a prompt in a round: sampled with replacement, seeded by prompt and round only."""
    return random.Random(f"{seed} principle {row['row']} {number}").choice(constitution.drawn_for(row["kind"]))


def latest(row: Row, first: str | None = None) -> str:
    """The last usable revision; without one, `first`, which defaults to the first answer."""
    texts = [step["revision"] for step in row["chain"] if critiques.usable(step["revision_flag"])]
    return texts[-1] if texts else row["answer"] if first is None else first


class _Round:
    """One round: a critique and a revision of every answer, as rows with `row`, `text` and `flag`."""

    def __init__(
        self,
        recipe: CaiRecipe,
        journal: RowJournal,
        writer: Generator,
        constitution: Constitution,
        chains: list[Row],
        principles: list[Principle],
        number: int,
    ):
        self.recipe, self.journal, self.writer, self.number = recipe, journal, writer, number
        self.chains, self.principles = chains, principles
        self.before = [latest(row) for row in chains]
        self.examples = [constitution.shown_before(row["kind"], recipe.method.examples) for row in chains]

    def critiques(self, name: str) -> list[Row]:
        """The critique of each answer."""
        requests = [one.critique_request for one in self.principles]
        conversations = [
            critiques.conversation(row["prompt"], before, [], request, examples)
            for row, before, request, examples in zip(self.chains, self.before, requests, self.examples, strict=True)
        ]
        shown = self._shown(self.before)

        def parsed(at: int, text: str, cut: bool) -> tuple[str, str]:
            return critiques.parsed(text, requests[at], shown[at])

        return self._written(name, conversations, CRITIQUE, self.recipe.generation.critique_limit(), parsed)

    def revisions(self, name: str, written: list[Row]) -> list[Row]:
        """The revision of each answer after its critique."""
        requests = [one.revision_request for one in self.principles]
        conversations = [
            critiques.conversation(
                row["prompt"], before, [(one.critique_request, critique["text"])], one.revision_request, examples
            )
            for row, before, one, critique, examples in zip(
                self.chains, self.before, self.principles, written, self.examples, strict=True
            )
        ]
        shown = self._shown([critique["text"] for critique in written])

        def parsed(at: int, text: str, cut: bool) -> tuple[str, str]:
            return critiques.revised(text, requests[at], self.before[at], shown[at], cut=cut)

        return self._written(name, conversations, REVISION, self.recipe.generation.max_new_tokens, parsed)

    def _shown(self, last: list[str]) -> list[list[str]]:
        """Texts that a weak model may copy instead of replying: those of the examples, and the preceding text."""
        return [
            [text for one in few for text in (one.answer, one.critique, one.revision)] + [text_before]
            for few, text_before in zip(self.examples, last, strict=True)
        ]

    def _written(
        self,
        name: str,
        conversations: list[list[critiques.Message]],
        stream: int,
        limit: int,
        parsed: critiques.Parser,
    ) -> list[Row]:
        def make(unit: Unit) -> list[Row]:
            seeds = [row_seed(self.recipe.seed, stream, self.number, self.chains[at]["row"]) for at in unit]
            rows = []
            replies = self.writer.reply([conversations[at] for at in unit], seeds, limit)
            for at, reply in zip(unit, replies, strict=True):
                text, flag = parsed(at, reply.text, reply.flag == "cut")
                rows.append({"row": at, "text": text, "flag": flag if reply.flag != "too_long" else "too_long"})
            return rows

        return self.journal.fill(name, self.writer.units(conversations), make, workers=self.writer.workers)
