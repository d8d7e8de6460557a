"""Print how Constitutional AI changed the model, from the answers saved by the runs.

    python scripts/demo_cai_table.py

Reads samples.jsonl and manifest.json of runs/demo/cai and runs/cai/dpo, and the answers labelled by hand. Generates
nothing.
"""

import json
from pathlib import Path

from demo_table import samples, show_answers, show_counts
from rich.console import Console

from align_cli.constitutional.refusals import is_refusal

CAI, DPO = Path("runs/demo/cai"), Path("runs/cai/dpo")
LABELLED = Path("scripts/demo/data/labelled_answers.jsonl")


def main() -> None:
    console = Console(width=118)
    cai, dpo = samples(CAI), samples(DPO)
    stages = {
        "as it came": [row["before"] for row in cai],
        "after SL-CAI": [row["after"] for row in cai],
        "after DPO": [row["after"] for row in dpo],
    }
    labels = [row["label"] for row in cai]

    show_answers(console, [row["prompt"] for row in cai], labels, stages)
    named = {"harmful": "harmful compliance: not refused", "harmless": "over-refusal: refused"}
    show_counts(console, labels, stages, "Counted over all held-out answers", named, complied=("harmful",))

    found = json.loads((CAI / "manifest.json").read_text())["cai"]
    for kind in ("red-team", "harmless"):
        held = found[kind]
        console.print(
            f"{kind} prompts trained on: {held['answers_refused']} of {held['rows']} refused at first, "
            f"{held['revisions_refused']} after revision"
        )
    held = found["labels"]
    console.print(
        f"{held['rows']} labels: confidence {held['confidence']:.2f}, position bias {held['position_bias']:+.2f}, "
        f"{held['orders_disagree']:.0%} judged otherwise when the answers change places"
    )
    if LABELLED.is_file():
        rows = [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]
        right = sum(is_refusal(row["answer"]) == row["refused"] for row in rows)
        console.print(f"The counter of refusals agrees with a person on {right} of {len(rows)} such answers.")


if __name__ == "__main__":
    main()
