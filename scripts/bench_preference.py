"""Compare the memory and time of preference methods in one run.

    python scripts/bench_preference.py PAIRS.jsonl [--model models/smollm2-135m-instruct] [--rows 32] [--repeats 3]

DPO is TRL's trainer with a separate reference, as `align dpo` runs it. ORPO and SimPO use our trainer, with the same
pairs, micro-batches and steps. Each method runs in its own process, so that its peak memory is measured alone. The
methods take turns, so that noise on the machine affects all of them.
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

WAYS = {
    "dpo": "DPO, separate reference (TRL)",
    "dpo-ours": "DPO, separate reference (ours)",
    "orpo": "ORPO",
    "simpo": "SimPO",
    "simpo-rows": "SimPO, prompt repeated",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=32, help="pairs to train on, spread over all lengths; 0 for all")
    parser.add_argument("--step", type=int, default=8, help="pairs per optimizer step")
    parser.add_argument("--micro", type=int, default=4, help="pairs per micro-batch")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
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
    first = found["dpo"][0]
    print(
        f"{first['pairs']} pairs, {first['tokens']} tokens with the prompt in both; {args.step} a step, {args.micro} "
        f"at a time; median of {args.repeats}; {'bf16 mixed' if args.bf16 else 'float32'}, {first['device']}, torch "
        f"{version('torch')}, trl {version('trl')}, transformers {version('transformers')}"
    )
    print("| method | peak memory, MiB | against DPO | pairs/s | against DPO |\n|---|---|---|---|---|")
    peak, speed = (
        {way: statistics.median(run[figure] for run in runs) for way, runs in found.items()}
        for figure in ("peak_mib", "pairs_per_second")
    )
    for way, title in WAYS.items():
        against = f"{peak[way] / peak['dpo']:.2f}×", f"{speed[way] / speed['dpo']:.2f}×"
        print(f"| {title} | {peak[way]:.0f} | {against[0]} | {speed[way]:.3f} | {against[1]} |")


def _alone(way: str) -> str:
    done = subprocess.run([sys.executable, *sys.argv, "--way", way], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def measure(args: argparse.Namespace) -> dict:
    """Run one method: pairs per second over its training loop, peak memory in MiB of its process."""
    from align_cli.run import environment

    environment.quiet()
    environment.one_gpu()
    import torch
    from datasets import Dataset
    from transformers import TrainingArguments
    from trl import DPOConfig

    from align_cli.data.chat import Tally, dpo_rows
    from align_cli.data.groups import read_groups
    from align_cli.model import load
    from align_cli.model import log_probs as answers
    from align_cli.preferences.dpo import DpoTrainer
    from align_cli.preferences.losses import Term
    from align_cli.preferences.trainer import PreferenceTrainer, pair_row
    from align_cli.recipe.sections import Data, Model
    from align_cli.training.layout import size

    model = Model(path=args.model)
    tokenizer = load.tokenizer(model)
    read = read_groups(Data(train=args.pairs, max_dropped=1.0), "preferences", 0).train
    limits = {"max_length": args.max_length, "max_prompt_length": None}
    rows = list(dpo_rows(tokenizer, read, how="best-worst", **limits, tally=Tally()))
    rows.sort(key=lambda row: sum(map(len, row.values())))
    if args.rows and args.rows < len(rows):
        rows = [rows[int((at + 0.5) * len(rows) / args.rows)] for at in range(args.rows)]
    # every step gets a fixed mixture of long and short pairs, with similar lengths next to each other
    rows = [row for start in range(len(rows) // args.step) for row in rows[start :: len(rows) // args.step]]
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    cuda = torch.cuda.is_available()
    settings = {"num_train_epochs": 1, "bf16": args.bf16, "use_cpu": not cuda, "report_to": "none", "seed": 0}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "logging_steps": 10**6}
    settings |= {"learning_rate": 1e-6, "dataloader_pin_memory": cuda, "train_sampling_strategy": "sequential"}

    def policy():
        return load.policy(model, tokenizer, dtype="float32")

    with tempfile.TemporaryDirectory() as folder:
        settings["output_dir"] = folder
        if args.way == "dpo":
            cut = {"per_device_train_batch_size": args.micro, "gradient_accumulation_steps": args.step // args.micro}
            trainer = DpoTrainer(
                model=policy(),
                ref_model=policy(),
                args=DPOConfig(max_length=args.max_length, **cut, **settings),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        else:
            settings |= {"per_device_train_batch_size": args.step, "remove_unused_columns": False}
            terms = {"orpo": [Term("nll"), Term("odds-ratio", weight=0.1)], "dpo-ours": [Term("dpo")]}
            layout, groups = "rows" if args.way == "simpo-rows" else "shared", list(map(pair_row, rows))
            trainer = PreferenceTrainer(
                model=answers.scoring(policy()),
                args=TrainingArguments(**settings),
                train_dataset=Dataset.from_list(groups),
                processing_class=tokenizer,
                terms=terms.get(args.way, [Term("simpo", beta=2.0, gamma_ratio=0.5)]),
                compares=args.way == "dpo-ours",
                layout=layout,
                # tokens of the longest `micro` pairs, padding included
                batch_tokens=max(n * t for n, t in (size(row, layout) for row in groups)) * args.micro,
            )
            if args.way == "dpo-ours":
                trainer.reference = answers.scoring(policy()).requires_grad_(False).eval()
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    unit = 1024 if platform.system() == "Linux" else 1024**2
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    )
    return {
        "pairs": len(rows),
        "tokens": tokens,
        "pairs_per_second": len(rows) / seconds,
        "peak_mib": peak,
        "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
    }


if __name__ == "__main__":
    main()
