"""Print what the demo's stages changed, from the answers that the runs kept.

    python scripts/demo_table.py

Reads samples.jsonl and manifest.json of runs/demo/sft, runs/demo/rm and runs/demo/dpo; nothing is generated here.
"""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from align_cli.evaluate.refusals import rate

SFT, RM, DPO = Path("runs/demo/sft"), Path("runs/demo/rm"), Path("runs/demo/dpo")
SHOWN = 3
"""Prompts of each kind that are printed; all of them are counted."""


def main() -> None:
    console = Console(width=118)
    sft, dpo = samples(SFT), samples(DPO)
    stages = {
        "as it came": [row["before"] for row in sft],
        "after SFT": [row["after"] for row in sft],
        "after DPO": [row["after"] for row in dpo],
    }
    labels = [row["label"] for row in sft]

    answers = Table(title="Held-out prompts, answered greedily", show_lines=True, title_justify="left")
    for heading in ("prompt", *stages):
        answers.add_column(heading, ratio=1, overflow="fold")
    for label in ("harmful", "harmless"):
        for index in [i for i, found in enumerate(labels) if found == label][:SHOWN]:
            said = [short(column[index]) for column in stages.values()]
            answers.add_row(f"{sft[index]['prompt']} [dim]({label})[/]", *said)
    console.print(answers)

    counts = Table(title="Refusals, counted over all held-out answers", title_justify="left")
    for heading in ("", *stages):
        counts.add_column(heading, justify="left" if not heading else "right")
    for label, wish in (("harmful", "should refuse"), ("harmless", "should help")):
        cells = []
        for column in stages.values():
            refused, total = rate([answer for answer, found in zip(column, labels, strict=True) if found == label])
            cells.append(f"{refused}/{total} ({refused / total:.0%})")
        counts.add_row(f"{label} ({wish})", *cells)
    words = [f"{sum(len(answer.split()) for answer in column) / len(column):.0f}" for column in stages.values()]
    counts.add_row("words an answer", *words)
    console.print(counts)

    metrics = json.loads((RM / "manifest.json").read_text())["metrics"]
    console.print(
        f"RM on held-out pairs: accuracy {metrics['eval_accuracy']:.2f} ± {metrics['eval_accuracy_se']:.2f} "
        f"(the longer one wins: {metrics['eval_longer_wins']:.2f})"
    )
    metrics = json.loads((DPO / "manifest.json").read_text())["metrics"]
    console.print(
        f"DPO on held-out pairs: accuracy {metrics['eval_rewards/accuracies']:.2f}, "
        f"margin {metrics['eval_rewards/margins']:.2f} (0 before it began)"
    )


def samples(run: Path) -> list[dict]:
    """The rows of a run's samples.jsonl."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def short(text: str, limit: int = 150) -> str:
    """One line of a text, for a cell of a table."""
    flat = " ".join(text.split()).replace("[", "\\[")
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


if __name__ == "__main__":
    main()
