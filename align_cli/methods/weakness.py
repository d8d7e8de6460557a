"""How weak the rows of `align cai` are: counts of what a small model gets wrong, and a warning for each that is common.

Chains are rows of revisions.jsonl, labels rows of preferences.jsonl and left_out.jsonl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from align_cli.methods import feedback
from align_cli.methods.critiques import changed, usable

Row = dict[str, Any]


def of_chains(chains: Sequence[Row], refuses: Callable[[str], bool]) -> dict[str, Any]:
    """Counts of answers, critiques and revisions by what is wrong with them, refusals before and after, and, for each
    principle, how often it was drawn and which share of the answer's words its revisions changed."""
    steps = [step for row in chains for step in row["chain"]]
    found: dict[str, Any] = {
        "answers": {"rows": len(chains), "empty": sum(not row["answer"] for row in chains)},
        "critiques": {"rows": len(steps)} | _flags(steps, "critique_flag"),
        "revisions": {"rows": len(steps)} | _flags(steps, "revision_flag"),
    }
    for kind in ("red-team", "harmless"):
        rows = [row for row in chains if row["kind"] == kind]
        if rows:
            found[kind] = {
                "rows": len(rows),
                "answers_refused": sum(refuses(row["answer"]) for row in rows),
                "revisions_refused": sum(refuses(row["revision"]) for row in rows),
            }
    principles: dict[str, list[float]] = {}
    for row in chains:
        before = row["answer"]
        for step in row["chain"]:
            after = step["revision"] if usable(step["revision_flag"]) else before
            principles.setdefault(step["principle"], []).append(changed(before, after))
            before = after
    found["principles"] = {
        name: {"drawn": len(shares), "changed": round(fmean(shares), 4)} for name, shares in sorted(principles.items())
    }
    return found


def _flags(steps: Sequence[Row], key: str) -> dict[str, int]:
    return dict(sorted(Counter(step[key] for step in steps if step[key]).items()))


def of_labels(labels: Sequence[Row], left_out: Sequence[Row]) -> dict[str, Any]:
    """Counts and means of a judge's labels: confidence |2p - 1|, position bias, and how often the orders disagree."""
    judged = [row for row in [*labels, *left_out] if row.get("orders")]
    pairs = [tuple(order["p"] for order in row["orders"]) for row in judged]
    found: dict[str, Any] = {"rows": len(labels), "left_out": dict(Counter(row["why"] for row in left_out))}
    if labels:
        found["confidence"] = round(fmean(2 * row["probability"] - 1 for row in labels), 4)
    if pairs:
        found |= {
            "position_bias": round(fmean(feedback.bias(*pair) for pair in pairs), 4),
            "orders_disagree": round(fmean(feedback.disagree(*pair) for pair in pairs), 4),
            "judged": len(pairs),
        }
    return found


def warnings(found: dict[str, Any], above: float) -> list[str]:
    """A line for every kind of weak row that is more common than `above`."""
    lines = []

    def look(part: str, total: int, count: int, what: str, mend: str) -> None:
        if total and count / total > above:
            lines.append(f"{count} of {total} {part} {what} ({count / total:.0%}); {mend}")

    better = "a larger writer would do better"
    for part in ("critiques", "revisions"):
        held = found.get(part, {})
        for flag, what in (
            ("empty", "are empty"),
            ("unparsable", "are unparsable"),
            ("copied", "repeat what was shown before them"),
            ("unchanged", "are the answer before once more"),
            ("too_long", "found no room in the model's context"),
        ):
            mend = "lower generation.max_new_tokens or method.examples" if flag == "too_long" else better
            look(part, held.get("rows", 0), held.get(flag, 0), what, mend)
    held = found.get("harmless", {})
    text = "revisions of harmless prompts are refusals"
    look(text, held.get("rows", 0), held.get("revisions_refused", 0), "", "the model will learn to refuse too much")
    held = found.get("labels", {})
    total = held.get("rows", 0) + sum(held.get("left_out", {}).values())
    look(
        "pairs",
        total,
        sum(held.get("left_out", {}).values()),
        "are left out of preferences.jsonl",
        "see left_out.jsonl",
    )
    if held.get("orders_disagree", 0) > above:
        lines.append(
            f"the judge prefers another answer when the two change places in {held['orders_disagree']:.0%} of the "
            f"pairs, (A) by {held['position_bias']:+.2f} on average; the averaged labels say little where it does"
        )
    return [line.replace("  ", " ") for line in lines]
