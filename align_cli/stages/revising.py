"""The supervised half of Constitutional AI up to training: first answers, critiques, revisions (arXiv 2212.08073, §3).

Each round starts from the prompt and the answer as it stands then, so that a conversation does not grow with the
number of rounds.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from align_cli.data.groups import Count
from align_cli.methods import critiques
from align_cli.methods.sampling import row_seed
from align_cli.model import load
from align_cli.recipe.constitution import Constitution, Principle
from align_cli.stages import online
from align_cli.stages.job import Job
from align_cli.stages.kept import Kept, Row
from align_cli.stages.speakers import Speakers, critique_limit

ANSWER, CRITIQUE, REVISION = 1, 2, 3
"""Streams of seeds; those of `labelling` follow."""


def prompts(job: Job) -> tuple[list[Row], list[Count]]:
    """`row`, `kind` and `prompt` of every prompt, red-team ones first, and the row counts, which are printed too."""
    data, method = job.recipe.data, job.recipe.method
    tokenizer = load.tokenizer(job.recipe.model, job.base)
    rows: list[Row] = []
    counts: list[Count] = []
    for kind, sources in (("red-team", data.train), ("harmless", method.harmless)):
        if sources:
            asked = replace(job, recipe=replace(job.recipe, data=replace(data, train=sources, eval=None)))
            found, count = online.prompts(asked, tokenizer)
            counts += count
            for row in found:
                turns = [{"role": turn["role"], "content": turn["content"]} for turn in row["prompt"]]
                rows.append({"row": len(rows), "kind": kind, "prompt": turns})
    return rows, counts


def answers(job: Job, kept: Kept, speakers: Speakers, asked: list[Row]) -> None:
    """answers.jsonl: the writer's first answer to every prompt."""
    if kept.read("answers") is not None:
        return
    writer, seed = speakers.writer, job.recipe.seed
    limit = job.recipe.generation.max_new_tokens

    def make(unit: Any) -> list[Row]:
        seeds = [row_seed(seed, ANSWER, 0, at) for at in unit]
        replies = writer.reply([asked[at]["prompt"] for at in unit], seeds, limit)
        return [
            asked[at] | {"answer": reply.text, "flag": reply.flag or ("" if reply.text else "empty")}
            for at, reply in zip(unit, replies, strict=True)
        ]

    kept.fill("answers", writer.units([row["prompt"] for row in asked]), make, workers=writer.workers)


def revisions(job: Job, kept: Kept, speakers: Speakers, law: Constitution) -> None:
    """revisions.jsonl: for every prompt the chain of principle, critique and revision, and the last revision."""
    if kept.read("revisions") is not None:
        return
    rounds, chains = job.recipe.method.revisions, [row | {"chain": []} for row in kept.read("answers") or []]
    names = []
    for round_ in range(1, rounds + 1):
        drawn = [principle(job.recipe.seed, law, row, round_) for row in chains]
        names += [f".critiques-{round_}", f".revisions-{round_}"]
        said = _ask(job, kept, speakers, law, chains, drawn, names[-2], round_, None)
        new = _ask(job, kept, speakers, law, chains, drawn, names[-1], round_, said)
        for row, one, critique, revision in zip(chains, drawn, said, new, strict=True):
            step = {"principle": one.id, "critique": critique["text"], "critique_flag": critique["flag"]}
            row["chain"].append(step | {"revision": revision["text"], "revision_flag": revision["flag"]})
    kept.write("revisions", [row | {"revision": standing(row, first="")} for row in chains])
    kept.forget(*names)


def principle(seed: int, law: Constitution, row: Row, round_: int) -> Principle:
    """The principle of a prompt's round: drawn with replacement, by prompt, whatever the rank or the batch."""
    return random.Random(f"{seed} principle {row['row']} {round_}").choice(law.drawn_for(row["kind"]))


def standing(row: Row, first: str | None = None) -> str:
    """The answer as the rounds so far left it; `first` in place of the first answer where none revised it."""
    texts = [step["revision"] for step in row["chain"] if critiques.usable(step["revision_flag"])]
    return texts[-1] if texts else row["answer"] if first is None else first


def _ask(
    job: Job,
    kept: Kept,
    speakers: Speakers,
    law: Constitution,
    chains: list[Row],
    drawn: list[Principle],
    name: str,
    round_: int,
    said: list[Row] | None,
) -> list[Row]:
    """`row`, `text` and `flag` of each chain's critique or, where critiques are `said`, of its revision."""
    if (done := kept.read(name)) is not None:
        return done
    writer, recipe, revise = speakers.writer, job.recipe, said is not None
    before = [standing(row) for row in chains]
    last = [one.revision_request if revise else one.critique_request for one in drawn]
    examples = [law.shown_before(row["kind"], recipe.method.examples) for row in chains]
    # what a weak model repeats in place of a reply
    shown = [[text for one in few for text in (one.answer, one.critique, one.revision)] for few in examples]
    for at, texts in enumerate(shown):
        texts.append(said[at]["text"] if revise else before[at])
    asked = [
        critiques.conversation(
            row["prompt"],
            before[at],
            [(drawn[at].critique_request, said[at]["text"])] if revise else [],
            last[at],
            examples[at],
        )
        for at, row in enumerate(chains)
    ]
    stream = REVISION if revise else CRITIQUE
    limit = recipe.generation.max_new_tokens if revise else critique_limit(recipe.generation)

    def make(unit: Any) -> list[Row]:
        seeds = [row_seed(recipe.seed, stream, round_, chains[at]["row"]) for at in unit]
        rows = []
        for at, reply in zip(unit, writer.reply([asked[at] for at in unit], seeds, limit), strict=True):
            if revise:
                text, flag = critiques.revised(reply.text, last[at], before[at], shown[at], cut=reply.flag == "cut")
            else:
                text, flag = critiques.parsed(reply.text, last[at], shown[at])
            rows.append({"row": at, "text": text, "flag": flag if reply.flag != "too_long" else "too_long"})
        return rows

    return kept.fill(name, writer.units(asked), make, workers=writer.workers)
