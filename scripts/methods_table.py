"""Compare the demo's preference methods in one table.

    python scripts/methods_table.py [RUN…]

For every finished run, the table shows the accuracy on the held-out pairs, the KL to the common starting run, the
length of its answers, and its training time and memory. Accuracy is by log π/π_start, which is DPO's implicit reward
and is defined for methods without a reference, too; a second column uses the mean log-probability per token. The KL is
E Σ_t (log π - log π_start) over answers sampled from the run's own model at T = 1, up to a fixed number of tokens each.
"""

import argparse
import json
from pathlib import Path

RUNS = ("demo/dpo", "demo/orpo", "demo/simpo", "demo/kto", "demo/spin", "online-demo/dpo")
"""The first four train on the same pairs, SPIN on the demo's demonstrations, the last on its own answers."""
DATA, PROMPTS = "scripts/demo/data/preferences.jsonl", Path("scripts/demo/data/held_out.jsonl")
HELD_OUT = 0.15
MAX_LENGTH = 256
TOKENS = 1024
"""Tokens per forward pass."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help="default: all finished demo runs of preference methods")
    parser.add_argument("--start", default="runs/demo/sft", help="the run that all of them started from")
    parser.add_argument("--tokens", type=int, default=48, help="maximum length of sampled answers, in tokens")
    args = parser.parse_args()
    found = args.runs or [f"runs/{run}" for run in RUNS if Path(f"runs/{run}/manifest.json").is_file()]

    from align_cli.run import environment

    environment.quiet()
    environment.one_gpu()
    from rich.console import Console
    from rich.table import Table

    start = Scored(args.start, args.tokens)
    title = f"Preference methods from one start; {len(start.pairs)} held-out pairs, {len(start.answers)} answers"
    caption = "spin learned from demonstrations, online-demo/dpo from its own answers, all others from the same pairs"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in ("run", "accuracy", "by mean", "KL, nats", "tokens", "seconds", "peak MiB"):
        table.add_column(name, justify="left" if name == "run" else "right")
    table.add_row(f"{label(args.start)}, the start", "", f"{start.by_mean():.2f}", "0", f"{start.length():.1f}", "", "")
    for run in found:
        table.add_row(label(run), *measured(Scored(run, args.tokens), start))
    Console(width=110).print(table)


class Scored:
    """A run's model, the held-out pairs with their log-probabilities, and the model's answers."""

    def __init__(self, run: str, longest: int):
        from align_cli.data import chat
        from align_cli.generation.sampling import Sampler, respond, row_seed
        from align_cli.model import load
        from align_cli.model import log_probs as answers
        from align_cli.recipe.sections import Model

        self.run = Path(run)
        self.tokenizer = load.tokenizer(Model(path=run))
        self.model = answers.scoring(load.policy(Model(path=run), self.tokenizer, dtype="float32").eval())
        self.pairs = held_out(self.tokenizer)
        self.on_pairs = self.log_probs(
            [(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in self.pairs]
        )
        asked = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
        prompts = [chat.prompt_ids(self.tokenizer, [{"role": "user", "content": text}]) for text in asked]
        said = respond(
            self.model,
            prompts,
            [row_seed(0, at) for at in range(len(prompts))],
            sampler=Sampler(longest),
            ends=chat.generation_ends(self.tokenizer),
            pad=self.tokenizer.pad_token_id,
        )
        self.answers = [(prompt, [answer]) for prompt, answer in zip(prompts, said, strict=True) if answer]

    def log_probs(self, asked: list[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
        """The summed log-probability of every response; each prompt is computed once for all its responses."""
        import torch

        from align_cli.training import layout

        # a prompt's last token is repeated for each response, because it predicts the response's first token
        rows = [{"prompt_ids": p[:-1], "responses": [p[-1:] + r for r in responses]} for p, responses in asked]
        found: dict[int, list[float]] = {}
        for part in layout.fill(rows, "shared", TOKENS):
            picked = [rows[at] for at in part]
            packed = layout.shared(picked, self.tokenizer.pad_token_id)
            inputs = {key: value for key, value in packed.inputs.items() if key != "ends"}
            with torch.no_grad():
                each = self.model(**inputs, asked=packed.predicting(picked))
            sums = iter(each.split([len(r) - 1 for row in picked for r in row["responses"]]))
            found |= {at: [next(sums).sum().item() for _ in rows[at]["responses"]] for at in part}
        return [found[at] for at in range(len(rows))]

    def by_mean(self) -> float:
        """How often the chosen response has the higher mean log-probability."""
        sides = zip(self.on_pairs, self.pairs, strict=True)
        ahead = [(w / len(row["chosen_ids"]), r / len(row["rejected_ids"])) for (w, r), row in sides]
        return mean_and_error([score(*pair) for pair in ahead])[0]

    def length(self) -> float:
        """Mean number of tokens per sampled answer."""
        return mean_and_error([float(len(answer)) for _, (answer,) in self.answers])[0]


def measured(made: Scored, start: Scored) -> list[str]:
    """The table cells of a run."""
    pairs = zip(made.on_pairs, start.on_pairs, strict=True)
    accuracy, error = mean_and_error([score(w - before_w, r - before_r) for (w, r), (before_w, before_r) in pairs])
    sides = zip(made.log_probs(made.answers), start.log_probs(made.answers), strict=True)
    kl, kl_error = mean_and_error([mine - before for (mine,), (before,) in sides])
    metrics = json.loads((made.run / "manifest.json").read_text(encoding="utf-8"))["metrics"]
    return [
        f"{accuracy:.2f} ± {error:.2f}",
        f"{made.by_mean():.2f}",
        f"{kl:.2f} ± {kl_error:.2f}",
        f"{made.length():.1f}",
        *(f"{metrics[name]:.0f}" if name in metrics else "" for name in ("seconds", "peak_memory_mib")),
    ]


def label(run: str) -> str:
    return "/".join(Path(run).parts[-2:])


def held_out(tokenizer) -> list[dict]:
    """The pairs that the demo's recipes hold out."""
    from align_cli.data.chat import Tally, dpo_rows
    from align_cli.data.groups import read_groups
    from align_cli.recipe.sections import Data, Source

    groups = read_groups(Data(train=[Source(path=DATA)], eval=HELD_OUT), "preferences", 42).eval
    limits = {"max_length": MAX_LENGTH, "max_prompt_length": None}
    return list(dpo_rows(tokenizer, groups, how="best-worst", **limits, tally=Tally()))


def score(better: float, worse: float) -> float:
    return 1.0 if better > worse else 0.5 if better == worse else 0.0


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, (variance / len(values)) ** 0.5


if __name__ == "__main__":
    main()
