"""The second half of Constitutional AI up to reinforcement learning: pairs, and labels from AI feedback
(arXiv 2212.08073, §4; both orders averaged as in RLAIF, arXiv 2309.00267)."""

from __future__ import annotations

import random
from typing import Any

from align_cli.methods import feedback
from align_cli.methods.sampling import row_seed
from align_cli.recipe.constitution import Constitution
from align_cli.stages.job import Job
from align_cli.stages.kept import Kept, Row
from align_cli.stages.speakers import Speakers, critique_limit

PAIR, REASONING = 4, 5
REASONED = [0.4, 0.6]
"""Bounds after a chain of thought (§4.1)."""


def pairs(job: Job, kept: Kept, speakers: Speakers, asked: list[Row]) -> None:
    """pairs.jsonl: two answers to every prompt."""
    if kept.read("pairs") is not None:
        return
    recipe = job.recipe
    if recipe.method.pairs == "revised":
        chains = kept.read("revisions") or []
        kept.write("pairs", [_pair(row, [row["answer"], row["revision"]]) for row in chains])
        return
    policy, limit = speakers.policy, recipe.generation.max_new_tokens

    def make(unit: Any) -> list[Row]:
        both = [(at, which) for at in unit for which in (0, 1)]
        seeds = [row_seed(recipe.seed, PAIR, which, at) for at, which in both]
        texts = [reply.text for reply in policy.reply([asked[at]["prompt"] for at, _ in both], seeds, limit)]
        return [_pair(asked[at], texts[2 * n : 2 * n + 2]) for n, at in enumerate(unit)]

    units = policy.units([row["prompt"] for row in asked], orders=2)
    kept.fill("pairs", units, make, workers=policy.workers)


def _pair(row: Row, answers: list[str]) -> Row:
    return {"row": row["row"], "kind": row["kind"], "prompt": row["prompt"], "answers": answers}


def preferences(job: Job, kept: Kept, speakers: Speakers, law: Constitution) -> tuple[list[Row], list[Row]]:
    """preferences.jsonl, which `align rm` and `align dpo` read as it stands, and left_out.jsonl. Returns both."""
    if (done := kept.read("preferences")) is None:
        every = kept.read("pairs") or []
        judged = _judged(job, kept, speakers, law, every) if job.recipe.method.judge else {}
        rows = [_labelled(row, judged.get(row["row"]), job) for row in every]
        kept.write("left_out", [row for row in rows if "why" in row])
        done = kept.write("preferences", [row for row in rows if "why" not in row])
        kept.forget(".judged")
    return done, kept.read("left_out") or []


def useless(answers: list[str]) -> str:
    """Why two answers are no pair, or the empty string."""
    if not all(text.strip() for text in answers):
        return "an answer is empty"
    return "the answers are the same" if answers[0] == answers[1] else ""


def _judged(job: Job, kept: Kept, speakers: Speakers, law: Constitution, every: list[Row]) -> dict[int, Row]:
    """For each pair that is one: the principle, and log p(A), log p(B) and p(A) with either answer as (A)."""
    if (done := kept.read(".judged")) is not None:
        return {row["pair"]: row for row in done}
    recipe, judge = job.recipe, speakers.judge
    asked = [row for row in every if not useless(row["answers"])]
    drawn = [
        random.Random(f"{recipe.seed} comparison {row['row']}").choice(law.drawn_for(row["kind"])) for row in asked
    ]
    texts = [
        feedback.question(row["prompt"], one.comparison, *(row["answers"] if not order else row["answers"][::-1]))
        for row, one in zip(asked, drawn, strict=True)
        for order in (0, 1)
    ]
    limit, thought = critique_limit(recipe.generation), recipe.method.chain_of_thought

    def make(unit: Any) -> list[Row]:
        both = [2 * at + order for at in unit for order in (0, 1)]
        reasons: list[str | None] = [None] * len(both)
        if thought:
            turns = [[{"role": "user", "content": f"{texts[n]}\n\n{feedback.REASON}"}] for n in both]
            seeds = [row_seed(recipe.seed, REASONING, n % 2, asked[n // 2]["row"]) for n in both]
            reasons = [reply.text for reply in judge.reply(turns, seeds, limit)]
        found = judge.choose([texts[n] for n in both], reasons)
        rows = []
        for n, at in enumerate(unit):
            orders = [_order(found[2 * n + order], reasons[2 * n + order]) for order in (0, 1)]
            rows.append({"row": at, "pair": asked[at]["row"], "principle": drawn[at].id, "orders": orders})
        return rows

    units = judge.units([[{"role": "user", "content": text}] for text in texts[::2]], orders=2)
    return {row["pair"]: row for row in kept.fill(".judged", units, make, workers=judge.workers)}


def _order(found: tuple[float, float] | None, reason: str | None) -> Row:
    thought = {} if reason is None else {"reasoning": reason}
    if found is None:
        return thought
    a, b = found
    return thought | {"logp_A": round(a, 6), "logp_B": round(b, 6), "p": round(feedback.probability(a, b), 6)}


def _labelled(row: Row, judged: Row | None, job: Job) -> Row:
    """A row of preferences.jsonl, or, with the reason under `why`, of left_out.jsonl."""
    method, head = job.recipe.method, {key: row[key] for key in ("row", "kind", "prompt")}
    if why := useless(row["answers"]):
        return head | {"why": why, "answers": row["answers"]}
    if judged is None:  # the revision is the better one
        return head | {"chosen": row["answers"][1], "rejected": row["answers"][0], "probability": 1.0}
    record = {"principle": judged["principle"], "orders": judged["orders"]}
    if not all("p" in order for order in judged["orders"]):
        return head | {"why": "the judge named no letter", "answers": row["answers"]} | record
    bounds = method.clamp or (REASONED if method.chain_of_thought else None)
    p = round(feedback.label(*(order["p"] for order in judged["orders"]), bounds), 6)
    first = 0 if p >= 0.5 else 1
    pair = {"chosen": row["answers"][first], "rejected": row["answers"][1 - first]}
    return head | pair | {"probability": round(max(p, 1 - p), 6), "chosen_was": first} | record
