"""Compare the demo's preference methods, which learn from the same pairs with the same budget, in one table.

    python scripts/methods_table.py [RUN…]

Of every finished run: accuracy on the held-out pairs, the KL to the run that all of them started from, the length of
its answers, and what it took. Accuracy is by log π/π_start, the reward that a method without a reference implies as
well as DPO's own, and, beside it, by the mean log-probability a token. The KL is E Σ_t (log π - log π_start) over
answers sampled from the run's own model at T = 1, a bounded number of tokens each.
"""

import argparse
import json
from pathlib import Path

STAGES = ("dpo", "orpo", "simpo", "kto", "spin")
DATA, PROMPTS = "scripts/demo/data/preferences.jsonl", Path("scripts/demo/data/held_out.jsonl")
HELD_OUT = 0.15
MAX_LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help="default: every preference method's run of the demo that is there")
    parser.add_argument("--start", default="runs/demo/sft", help="the run that all of them started from")
    parser.add_argument("--tokens", type=int, default=48, help="longest sampled answer")
    args = parser.parse_args()
    found = args.runs or [
        f"runs/demo/{stage}" for stage in STAGES if Path(f"runs/demo/{stage}/manifest.json").is_file()
    ]

    from align_cli.run.launch import quiet_environment

    quiet_environment()
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Preference methods, same pairs, same number of passes", title_justify="left")
    for name in ("run", "accuracy", "by mean", "KL, nats", "tokens", "seconds", "peak MiB"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for label, *cells in [measured(run, args.start, args.tokens) for run in [args.start, *found]]:
        table.add_row(label, *cells)
    Console(width=110).print(table)


def measured(run: str, start: str, longest: int) -> list[str]:
    """A row of the table. The starting run's accuracy by log π/π_start is a half by definition."""
    import torch

    from align_cli.data import chat
    from align_cli.methods.sampling import Sampler, respond, row_seed
    from align_cli.model import load
    from align_cli.recipe.sections import Model

    torch.manual_seed(0)
    tokenizer = load.tokenizer(Model(path=run))
    policy, before = (load.policy(Model(path=path), tokenizer, dtype="float32").eval() for path in (run, start))
    pairs = held_out(tokenizer)
    by_ratio, by_mean = [], []
    for row in pairs:
        sides = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids")]
        chosen, rejected = (log_prob(policy, *side) for side in sides)
        ahead, behind = (log_prob(before, *side) for side in sides)
        by_ratio.append(score(chosen - ahead, rejected - behind))
        by_mean.append(score(chosen / len(sides[0][1]), rejected / len(sides[1][1])))
    asked = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    prompts = [chat.prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    said = respond(
        policy,
        prompts,
        [row_seed(0, at) for at in range(len(prompts))],
        sampler=Sampler(longest),
        ends=chat.generation_ends(tokenizer),
        pad=tokenizer.pad_token_id,
    )
    ratios = [log_prob(policy, p, r) - log_prob(before, p, r) for p, r in zip(prompts, said, strict=True)]
    kl, error = mean_and_error(ratios)
    made = json.loads((Path(run) / "manifest.json").read_text())["metrics"]
    took = [f"{made[name]:.0f}" if name in made else "" for name in ("seconds", "peak_memory_mib")]
    length = sum(map(len, said)) / len(said)
    plain = run == start
    return [
        "/".join(Path(run).parts[-2:]) + (" (the start)" if plain else ""),
        "" if plain else f"{mean_and_error(by_ratio)[0]:.2f} ± {mean_and_error(by_ratio)[1]:.2f}",
        f"{mean_and_error(by_mean)[0]:.2f}",
        "0" if plain else f"{kl:.2f} ± {error:.2f}",
        f"{length:.1f}",
        *(["", ""] if plain else took),
    ]


def held_out(tokenizer) -> list[dict]:
    """The pairs that the demo's recipes hold out."""
    from align_cli.data.chat import Tally, dpo_rows
    from align_cli.data.groups import read_groups
    from align_cli.recipe.sections import Data, Source

    groups = read_groups(Data(train=[Source(path=DATA)], eval=HELD_OUT), "preferences", 42).eval
    return list(
        dpo_rows(tokenizer, groups, how="best-worst", max_length=MAX_LENGTH, max_prompt_length=None, tally=Tally())
    )


def log_prob(model, prompt: list[int], response: list[int]) -> float:
    """The summed log-probability of a response."""
    import torch

    if not response:
        return 0.0
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logits = model(ids, logits_to_keep=len(response) + 1).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, -len(response) :, None]).sum().item()


def score(better: float, worse: float) -> float:
    return 1.0 if better > worse else 0.5 if better == worse else 0.0


def mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, (variance / len(values)) ** 0.5


if __name__ == "__main__":
    main()
