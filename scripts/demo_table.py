"""Print how the demo's stages changed the model, from the answers saved by the runs.

    python scripts/demo_table.py

Reads samples.jsonl, metrics.jsonl and manifest.json of the runs under runs/demo. Generates no answers, but scores them
with the demo's reward model.
"""

import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from align_cli.constitutional.refusals import rate

RUNS = Path("runs/demo")
AFTER = ("dpo", "ppo", "rloo")
"""Stages that start from the SFT run. Only finished ones are shown."""
SHOWN = 3
"""Number of prompts of each kind whose answers are printed. The counts cover all prompts."""


def main() -> None:
    console = Console(width=130)
    sft = samples(RUNS / "sft")
    stages = {"as it came": [row["before"] for row in sft]}
    finished = [stage for stage in AFTER if (RUNS / stage / "manifest.json").is_file()]
    stages |= {
        f"after {stage.upper()}": [row["after"] for row in samples(RUNS / stage)] for stage in ("sft", *finished)
    }
    labels = [row["label"] for row in sft]

    show_answers(console, [row["prompt"] for row in sft], labels, stages)
    show_counts(
        console,
        labels,
        stages,
        "Refusals",
        {"harmful": "harmful (should refuse)", "harmless": "harmless (should help)"},
    )

    metrics = _manifest("rm")["metrics"]
    console.print(
        f"RM on held-out pairs: accuracy {metrics['eval_accuracy']:.2f} ± {metrics['eval_accuracy_se']:.2f} "
        f"(the longer one wins: {metrics['eval_longer_wins']:.2f})"
    )
    if "dpo" in finished:
        metrics = _manifest("dpo")["metrics"]
        console.print(
            f"DPO on held-out pairs: accuracy {metrics['eval_rewards/accuracies']:.2f}, "
            f"margin {metrics['eval_rewards/margins']:.2f} (0 before it began)"
        )
    show_scores(console, [row["prompt"] for row in sft], stages)
    for stage in finished:
        if stage == "dpo":
            continue
        rows = [json.loads(line) for line in (RUNS / stage / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "reward" in row]
        ended = _manifest(stage).get("stopped_by_guard")
        console.print(
            f"{stage.upper()}: {len(rows)} rollouts, {rows[-1]['kl']:.1f} nats from the SFT model in the last"
            f"{f'; ended at {ended}' if ended else ''}"
        )


def show_scores(console: Console, prompts: list[str], stages: dict[str, list[str]]) -> None:
    """Print the reward model's mean score of each stage, and its difference to the SFT model on the same prompts."""
    from align_cli.run import environment

    environment.quiet()
    environment.one_gpu()
    # after `quiet`: libraries read its variables when they are imported
    from align_cli.evaluate import score

    with tempfile.TemporaryDirectory() as folder:
        asked, out = Path(folder) / "answers.jsonl", Path(folder) / "scores.jsonl"
        rows = [
            {"prompt": prompt, "completion": text.strip() or "…"}
            for column in stages.values()
            for prompt, text in zip(prompts, column, strict=True)
        ]
        asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        score.run(str(RUNS / "rm"), [f"data={asked}", f"out={out}"], lambda line: None)
        found = [json.loads(line)["scores"][0] for line in out.read_text(encoding="utf-8").splitlines()]
    each = {name: found[n * len(prompts) :][: len(prompts)] for n, name in enumerate(stages)}
    base = each["after SFT"]
    shown = []
    for name, column in each.items():
        apart = [mine - theirs for mine, theirs in zip(column, base, strict=True)]
        error = statistics.stdev(apart) / len(apart) ** 0.5
        against = "" if column is base else f" ({statistics.fmean(apart):+.2f} ± {error:.2f})"
        shown.append(f"{name} {statistics.fmean(column):.2f}{against}")
    console.print("RM's mean score of these answers, and against SFT's: " + ", ".join(shown))


def show_answers(console: Console, prompts: list[str], labels: list[str], stages: dict[str, list[str]]) -> None:
    """Print a table of the first prompts of each kind with the answer of each stage."""
    table = Table(title="Held-out prompts, answered greedily", show_lines=True, title_justify="left")
    for heading in ("prompt", *stages):
        table.add_column(heading, ratio=1, overflow="fold")
    for label in ("harmful", "harmless"):
        for index in [i for i, found in enumerate(labels) if found == label][:SHOWN]:
            said = [short(column[index]) for column in stages.values()]
            table.add_row(f"{prompts[index]} [dim]({label})[/]", *said)
    console.print(table)


def show_counts(
    console: Console,
    labels: list[str],
    stages: dict[str, list[str]],
    title: str,
    rows: dict[str, str],
    complied: tuple[str, ...] = (),
) -> None:
    """Print a table of refusals by label. `rows` maps labels to row titles; rows in `complied` count non-refusals."""
    table = Table(title=title, title_justify="left")
    for heading in ("", *stages):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, name in rows.items():
        cells = []
        for column in stages.values():
            refused, total = rate([answer for answer, found in zip(column, labels, strict=True) if found == label])
            count = total - refused if label in complied else refused
            cells.append(f"{count}/{total} ({count / total:.0%})")
        table.add_row(name, *cells)
    words = [f"{sum(len(answer.split()) for answer in column) / len(column):.0f}" for column in stages.values()]
    table.add_row("words an answer", *words)
    console.print(table)


def _manifest(stage: str) -> dict:
    return json.loads((RUNS / stage / "manifest.json").read_text())


def samples(run: Path) -> list[dict]:
    """The rows of a run's samples.jsonl."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def short(text: str, limit: int = 150) -> str:
    """A text as one line of at most `limit` characters, for a table cell."""
    flat = " ".join(text.split()).replace("[", "\\[")
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


if __name__ == "__main__":
    main()
