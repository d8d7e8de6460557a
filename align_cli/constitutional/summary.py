"""Summary of an `align cai` run: counts of typical failures of small models, and warnings if they are common.

Chains are rows of revisions.jsonl; labels are rows of preferences.jsonl and left_out.jsonl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from align_cli.constitutional.critiques import changed, usable
from align_cli.rewards import comparison

Row = dict[str, Any]


def of_chains(chains: Sequence[Row], refuses: Callable[[str], bool]) -> dict[str, Any]:
    """Counts of answers, critiques and revisions by flag, refusals before and after revision, and for each principle
    how often it was drawn and the mean share of words that its revisions changed."""
    steps = [step for row in chains for step in row["chain"]]
    counts: dict[str, Any] = {
        "answers": {"rows": len(chains), "empty": sum(not row["answer"] for row in chains)},
        "critiques": {"rows": len(steps)} | _flags(steps, "critique_flag"),
        "revisions": {"rows": len(steps)} | _flags(steps, "revision_flag"),
    }
    for kind in ("red-team", "harmless"):
        rows = [row for row in chains if row["kind"] == kind]
        if rows:
            counts[kind] = {
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
    counts["principles"] = {
        name: {"drawn": len(shares), "changed": round(fmean(shares), 4)} for name, shares in sorted(principles.items())
    }
    return counts


def _flags(steps: Sequence[Row], key: str) -> dict[str, int]:
    return dict(sorted(Counter(step[key] for step in steps if step[key]).items()))


def of_labels(labels: Sequence[Row], left_out: Sequence[Row]) -> dict[str, Any]:
    """Counts and means of a judge's labels: confidence |2p - 1|, position bias, and how often the orders disagree."""
    # a judge may have named no letter in one order
    judged = [row for row in [*labels, *left_out] if row.get("orders") and all("p" in order for order in row["orders"])]
    pairs = [tuple(order["p"] for order in row["orders"]) for row in judged]
    counts: dict[str, Any] = {"rows": len(labels), "left_out": dict(Counter(row["why"] for row in left_out))}
    if labels:
        counts["confidence"] = round(fmean(2 * row["probability"] - 1 for row in labels), 4)
    if pairs:
        counts |= {
            "position_bias": round(fmean(comparison.bias(*pair) for pair in pairs), 4),
            "orders_disagree": round(fmean(comparison.disagree(*pair) for pair in pairs), 4),
            "judged": len(pairs),
        }
    return counts


WEAK_REPLIES = {
    "empty": "are empty",
    "unparsable": "are unparsable",
    "copied": "repeat a text shown to the model",
    "unchanged": "repeat the previous answer",
    "too_long": "did not fit into the model's context",
}
"""Flag of a critique or a revision -> its text in a warning."""


def warnings(counts: dict[str, Any], above: float) -> list[str]:
    """A line for every kind of weak row whose share exceeds `above`."""
    lines = []

    def warn(rows: str, total: int, count: int, remedy: str) -> None:
        if total and count / total > above:
            lines.append(f"{count} of {total} {rows} ({count / total:.0%}); {remedy}")

    for part in ("critiques", "revisions"):
        replies = counts.get(part, {})
        for flag, what in WEAK_REPLIES.items():
            shorter = "lower generation.max_new_tokens or method.examples"
            remedy = shorter if flag == "too_long" else "use a larger writer"
            warn(f"{part} {what}", replies.get("rows", 0), replies.get(flag, 0), remedy)
    harmless = counts.get("harmless", {})
    warn(
        "revisions of harmless prompts are refusals",
        harmless.get("rows", 0),
        harmless.get("revisions_refused", 0),
        "the model will learn to over-refuse",
    )
    labels = counts.get("labels", {})
    left_out = sum(labels.get("left_out", {}).values())
    pairs = labels.get("rows", 0) + left_out
    warn("pairs are left out of preferences.jsonl", pairs, left_out, "see left_out.jsonl")
    if labels.get("orders_disagree", 0) > above:
        lines.append(
            f"the judge changes its preference when the answers are swapped in {labels['orders_disagree']:.0%} of the "
            f"pairs, bias to (A) {labels['position_bias']:+.2f} on average; averaged labels of these pairs are weak"
        )
    return lines
