"""Compare the speed and memory of reward-model training in one run.

    python scripts/bench_rm.py RANKINGS.jsonl [--model models/smollm2-135m-instruct] [--groups 32] [--repeats 3]

(a) TRL's RewardTrainer on every pair of every ranking, (b) one row per response, (c) the prompt shared by its
responses. All three see the same tokens, the same groups in the same order and the same number of groups per optimizer
step. Each variant runs in its own process, so that its peak memory is measured alone. The variants take turns, so that
noise on the machine affects all of them.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

WAYS = {"pairs": "(a) TRL RewardTrainer, expanded pairs", "rows": "(b) K rows", "shared": "(c) shared prompt"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rankings")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--groups", type=int, default=32, help="rankings to train on, spread over all K; 0 for all")
    parser.add_argument("--at-least", type=int, default=2, help="smallest K")
    parser.add_argument("--step", type=int, default=64, help="groups per optimizer step; 64 in InstructGPT")
    parser.add_argument("--tokens", type=int, default=1536, help="(b), (c): tokens per micro-batch")
    parser.add_argument("--pairs", type=int, default=8, help="(a): pairs per micro-batch; the default is TRL's")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    found = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            found[way].append(json.loads(_alone(way)))
    first = found["shared"][0]
    print(
        f"{first['groups']} rankings with K ≥ {args.at_least}, {first['pairs']} pairs, {first['responses']} responses; "
        f"median of {args.repeats}; {'bf16 mixed' if args.bf16 else 'float32'}, {first['device']}, "
        f"torch {version('torch')}, trl {version('trl')}, transformers {version('transformers')}"
    )
    print("| way | groups/s | against (a) | peak memory, MiB | loss |\n|---|---|---|---|---|")
    base = statistics.median(run["groups_per_second"] for run in found["pairs"])
    for way, title in WAYS.items():
        speed = statistics.median(run["groups_per_second"] for run in found[way])
        peak = statistics.median(run["peak_mib"] for run in found[way])
        print(f"| {title} | {speed:.3f} | {speed / base:.2f}× | {peak:.0f} | {found[way][0]['loss']:.4f} |")


def _alone(way: str) -> str:
    done = subprocess.run([sys.executable, *sys.argv, "--way", way], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def measure(args: argparse.Namespace) -> dict:
    """Run one variant: groups per second over its training loop, peak memory in MiB of its process."""
    from align_cli.run import environment

    environment.quiet()
    environment.one_gpu()
    import torch
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from align_cli.data.chat import Tally
    from align_cli.data.groups import read_groups
    from align_cli.data.rankings import rm_rows
    from align_cli.model import load, reward_head
    from align_cli.recipe.sections import Data, Model
    from align_cli.reward_model.trainer import Objective, RankingTrainer

    model = Model(path=args.model)
    tokenizer = load.tokenizer(model)
    read = read_groups(Data(train=args.rankings), "preferences", 0).train
    rows = list(rm_rows(tokenizer, read, max_length=args.max_length, max_prompt_length=None, tally=Tally()))
    rows = sorted(
        (row for row in rows if len(row["responses"]) >= args.at_least), key=lambda row: len(row["responses"])
    )
    if args.groups and args.groups < len(rows):
        rows = [rows[int((at + 0.5) * len(rows) / args.groups)] for at in range(args.groups)]
    # every step gets a fixed mixture of large and small groups
    rows = [row for start in range(args.step) for row in rows[start :: args.step]]
    pairs = [
        {"chosen_ids": row["prompt_ids"] + a, "rejected_ids": row["prompt_ids"] + b}
        for row in rows
        for i, a in enumerate(row["responses"])
        for b in row["responses"][i + 1 :]
    ]
    cuda = torch.cuda.is_available()
    settings = {"num_train_epochs": 1, "bf16": args.bf16, "use_cpu": not cuda, "report_to": "none", "seed": 0}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "logging_steps": 10**6}
    settings |= {"learning_rate": 1e-5, "max_length": args.max_length, "dataloader_pin_memory": cuda}
    with tempfile.TemporaryDirectory() as folder:
        settings["output_dir"] = folder
        network = reward_head.from_policy(model, tokenizer, dtype="float32", seeds=[0], path=args.model)
        if args.way == "pairs":
            # the same number of optimizer steps as the other variants
            accumulate = max(1, round(len(pairs) / args.pairs / (len(rows) / args.step)))
            trainer = RewardTrainer(
                model=network,
                args=RewardConfig(
                    per_device_train_batch_size=args.pairs, gradient_accumulation_steps=accumulate, **settings
                ),
                train_dataset=Dataset.from_list(pairs),
                processing_class=tokenizer,
            )
        else:
            settings |= {"per_device_train_batch_size": args.step, "remove_unused_columns": False}
            trainer = RankingTrainer(
                model=network,
                args=RewardConfig(**settings),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                objective=Objective("ranking", margin=None, center=0.0),
                layout=args.way,
                batch_tokens=args.tokens,
            )
        started = time.perf_counter()
        result = trainer.train()
        seconds = time.perf_counter() - started
    unit = 1024 if platform.system() == "Linux" else 1024**2
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    )
    return {
        "groups": len(rows),
        "pairs": len(pairs),
        "responses": sum(len(row["responses"]) for row in rows),
        "groups_per_second": len(rows) / seconds,
        "peak_mib": peak,
        "loss": result.training_loss,
        "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
    }


if __name__ == "__main__":
    main()
