"""The second half of Constitutional AI up to reinforcement learning: pairs, and labels from AI feedback
(arXiv 2212.08073, §4; both orders averaged as in RLAIF, arXiv 2309.00267)."""

from __future__ import annotations

import random

from align_cli.constitutional.models import Models
from align_cli.generation.choice import REASON, LogProbs
from align_cli.generation.sampling import row_seed
from align_cli.recipe.constitution import Constitution
from align_cli.recipe.constitutional import CaiRecipe
from align_cli.rewards import comparison
from align_cli.rewards.comparison import no_pair
from align_cli.training.job import Job
from align_cli.training.journal import Row, RowJournal, Unit

PAIR, REASONING = 4, 5
REASONED = [0.4, 0.6]
"""Bounds of the label's probability after a chain of thought (§4.1)."""


def pairs(job: Job[CaiRecipe], journal: RowJournal, models: Models, prompts: list[Row]) -> None:
    """Write pairs.jsonl: two answers to every prompt."""
    if journal.read("pairs") is not None:
        return
    recipe = job.recipe
    if recipe.method.pairs == "revised":
        chains = journal.read("revisions") or []
        journal.write("pairs", [_pair(row, [row["answer"], row["revision"]]) for row in chains])
        return
    policy, limit = models.policy, recipe.generation.max_new_tokens

    def make(unit: Unit) -> list[Row]:
        both = [(at, which) for at in unit for which in (0, 1)]
        seeds = [row_seed(recipe.seed, PAIR, which, at) for at, which in both]
        texts = [reply.text for reply in policy.reply([prompts[at]["prompt"] for at, _ in both], seeds, limit)]
        return [_pair(prompts[at], texts[2 * n : 2 * n + 2]) for n, at in enumerate(unit)]

    units = policy.units([row["prompt"] for row in prompts], orders=2)
    journal.fill("pairs", units, make, workers=policy.workers)


def _pair(row: Row, answers: list[str]) -> Row:
    return {"row": row["row"], "kind": row["kind"], "prompt": row["prompt"], "answers": answers}


def preferences(
    job: Job[CaiRecipe], journal: RowJournal, models: Models, constitution: Constitution
) -> tuple[list[Row], list[Row]]:
    """Write preferences.jsonl, which `align rm` and `align dpo` read, and left_out.jsonl. Returns the rows of both."""
    if (labels := journal.read("preferences")) is None:
        every = journal.read("pairs") or []
        judged = _judged(job.recipe, journal, models, constitution, every) if job.recipe.method.judge else {}
        rows = [_labelled(row, judged.get(row["row"]), job.recipe) for row in every]
        journal.write("left_out", [row for row in rows if "why" in row])
        labels = journal.write("preferences", [row for row in rows if "why" not in row])
        journal.remove(".judged")
    return labels, journal.read("left_out") or []


def _judged(
    recipe: CaiRecipe, journal: RowJournal, models: Models, constitution: Constitution, every: list[Row]
) -> dict[int, Row]:
    """For each comparable pair, by row: the principle, and log p(A), log p(B) and p(A) in both answer orders."""
    if (judged := journal.read(".judged")) is not None:
        return {row["pair"]: row for row in judged}
    judge = models.judge
    compared = [row for row in every if not no_pair(row["answers"])]
    principles = [
        random.Random(f"{recipe.seed} comparison {row['row']}").choice(constitution.drawn_for(row["kind"]))
        for row in compared
    ]
    questions = [
        comparison.question(
            row["prompt"], principle.comparison, *(row["answers"] if not order else row["answers"][::-1])
        )
        for row, principle in zip(compared, principles, strict=True)
        for order in (0, 1)
    ]
    limit = recipe.generation.critique_limit()

    def make(unit: Unit) -> list[Row]:
        both = [2 * at + order for at in unit for order in (0, 1)]
        reasons: list[str | None] = [None] * len(both)
        if recipe.method.chain_of_thought:
            turns = [[{"role": "user", "content": f"{questions[n]}\n\n{REASON}"}] for n in both]
            seeds = [row_seed(recipe.seed, REASONING, n % 2, compared[n // 2]["row"]) for n in both]
            reasons = [reply.text for reply in judge.reply(turns, seeds, limit)]
        choices = judge.choose([questions[n] for n in both], reasons)
        rows = []
        for n, at in enumerate(unit):
            orders = [_order(choices[2 * n + order], reasons[2 * n + order]) for order in (0, 1)]
            rows.append({"row": at, "pair": compared[at]["row"], "principle": principles[at].id, "orders": orders})
        return rows

    units = judge.units([[{"role": "user", "content": text}] for text in questions[::2]], orders=2)
    return {row["pair"]: row for row in journal.fill(".judged", units, make, workers=judge.workers)}


def _order(choice: LogProbs | None, reason: str | None) -> Row:
    reasoning = {} if reason is None else {"reasoning": reason}
    if choice is None:
        return reasoning
    a, b = choice
    return reasoning | {"logp_A": round(a, 6), "logp_B": round(b, 6), "p": round(comparison.probability(a, b), 6)}


def _labelled(row: Row, judged: Row | None, recipe: CaiRecipe) -> Row:
    """A row of preferences.jsonl, or of left_out.jsonl with the reason under `why`."""
    method, head = recipe.method, {key: row[key] for key in ("row", "kind", "prompt")}
    if why := no_pair(row["answers"]):
        return head | {"why": why, "answers": row["answers"]}
    if judged is None:  # without a judge, the revision is the better answer
        return head | {"chosen": row["answers"][1], "rejected": row["answers"][0], "probability": 1.0}
    record = {"principle": judged["principle"], "orders": judged["orders"]}
    if not all("p" in order for order in judged["orders"]):
        return head | {"why": "the judge named no letter", "answers": row["answers"]} | record
    bounds = method.clamp or (REASONED if method.chain_of_thought else None)
    p = round(comparison.label(*(order["p"] for order in judged["orders"]), bounds), 6)
    first = 0 if p >= 0.5 else 1
    pair = {"chosen": row["answers"][first], "rejected": row["answers"][1 - first]}
    return head | pair | {"probability": round(max(p, 1 - p), 6), "chosen_was": first} | record
