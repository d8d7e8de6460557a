"""Compare the speed and memory of PPO implementations in one run.

    python -m venv trl112 && trl112/bin/pip install torch==2.13.0 trl==1.12.0 peft==0.21.2 transformers==5.23.0
    python scripts/bench_ppo.py --trl trl112/bin/python [--model models/smollm2-135m-instruct] [--bf16]

(a) the PPOTrainer of TRL 1.12, the last release that had one, in a separate environment; (b) `align ppo` with four
models; (c) `align ppo` with one backbone under LoRA. All use the same prompts, rollouts, epochs and micro-batches, and
the same number of tokens in every response (no token ends a response). The reward model's head is random, which costs
the same as a trained one. Each variant runs in its own process, so that its peak memory is measured alone; variants
take turns.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = {
    "trl": "(a) TRL 1.12 PPOTrainer",
    "four": "(b) align ppo, four models",
    "shared": "(c) align ppo, one backbone (LoRA r 16)",
}
RECIPE = """name: bench
model: {{ path: {model}, dtype: {dtype} }}
reward: {{ path: {reward}, normalize: false }}
{lora}data: {{ train: {prompts}, max_length: {length}, batch_size: {batch} }}
generation: {{ max_new_tokens: {tokens}, temperature: 1.0 }}
method: {{ beta: 0.05, epochs: {epochs}, minibatches: 1, missing_eos: null }}
trainer:
  learning_rate: 3.0e-6
  max_steps: {steps}
  per_device_train_batch_size: {micro}
  gradient_checkpointing: {checkpointing}
  bf16: {bf16}
  save_strategy: 'no'
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", help="Python of an environment with trl==1.12.0; without it, (a) is skipped")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--prompts", default="scripts/demo/data/red_team.jsonl")
    parser.add_argument("--batch", type=int, default=32, help="episodes per rollout")
    parser.add_argument("--rollouts", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--micro", type=int, default=8, help="episodes per micro-batch")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of every response")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps((of_trl if args.way == "trl" else of_align)(args)))
        return
    ways = [way for way in args.ways if way != "trl" or args.trl]
    found = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        make_reward_models(args, Path(folder))
        for _ in range(args.repeats):
            for way in ways:
                python = args.trl if way == "trl" else sys.executable
                found[way].append(json.loads(alone(python, way, folder, args.bf16)))
                print(WAYS[way], found[way][-1], file=sys.stderr, flush=True)
    table(args, found)


def table(args: argparse.Namespace, found: dict[str, list[dict]]) -> None:
    """Print the medians."""
    first = next(iter(found.values()))[0]
    print(
        f"{args.batch * args.rollouts} episodes in {args.rollouts} rollouts, {args.epochs} epochs, micro-batches of "
        f"{args.micro}, {args.tokens} tokens a response; median of {args.repeats}; "
        f"{'bf16 mixed precision' if args.bf16 else 'float32'}, gradient checkpointing "
        f"{'on' if args.checkpointing else 'off'}; {first['device']}; "
        f"{', '.join(f'{name} {number}' for name, number in found[list(found)[-1]][0]['versions'].items())}"
    )
    print("| way | episodes/s | speed | peak memory, MiB | memory |\n|---|---|---|---|---|")
    speed, peak = (
        {way: statistics.median(run[key] for run in runs) for way, runs in found.items()}
        for key in ("episodes_per_second", "peak_mib")
    )
    base = next(iter(found))
    for way in found:
        print(
            f"| {WAYS[way]} | {speed[way]:.3f} | {speed[way] / speed[base]:.2f}× | {peak[way]:.0f} | "
            f"{peak[way] / peak[base]:.2f}× |"
        )


def alone(python: str, way: str, folder: str, bf16: bool) -> str:
    """The last line that a variant prints when run in its own process."""
    from align_cli.run.environment import one_gpu

    one_gpu()
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if bf16:
        # `accelerate launch --mixed_precision bf16` sets this; needed because TRL's trainer builds its own Accelerator
        environment["ACCELERATE_MIXED_PRECISION"] = "bf16"
    line = [python, *sys.argv, "--way", way, "--folder", folder]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    return done.stdout.strip().splitlines()[-1]


def make_reward_models(args: argparse.Namespace, folder: Path) -> None:
    """Save a full reward model, and one that is an adapter on the policy."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for name in ("whole", "adapter"):
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype="float32")
        model.config.pad_token_id = tokenizer.pad_token_id
        if name == "adapter":
            config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
            model = get_peft_model(model, config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def figures(args: argparse.Namespace, seconds: float, packages: tuple[str, ...]) -> dict:
    """The measurements of a variant: episodes per second, peak memory in MiB, device and package versions."""
    from importlib.metadata import version

    import torch

    cuda = torch.cuda.is_available()
    # kibibytes on Linux, bytes on macOS
    unit = 1024 if sys.platform == "linux" else 2**20
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    )
    return {
        "episodes_per_second": args.batch * args.rollouts / seconds,
        "peak_mib": peak,
        "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
        "versions": {package: version(package) for package in packages},
    }


def of_align(args: argparse.Namespace) -> dict:
    """Run `align ppo` and time its training loop."""
    from align_cli.rl import rollouts
    from align_cli.run import environment, launch

    environment.quiet()
    from transformers import Trainer

    respond, train, spent = rollouts.respond, Trainer.train, []
    # no token ends a response
    rollouts.respond = lambda *given, **named: respond(*given, **named | {"ends": []})

    def timed(self, *given, **named):
        started = time.perf_counter()
        try:
            return train(self, *given, **named)
        finally:
            spent.append(time.perf_counter() - started)

    Trainer.train = timed
    shared = args.way == "shared"
    recipe = args.folder / f"{args.way}.yaml"
    recipe.write_text(
        RECIPE.format(
            model=args.model,
            dtype="bfloat16" if shared and args.bf16 else "float32",
            reward=args.folder / ("adapter" if shared else "whole"),
            lora="lora: { r: 16, alpha: 32 }\n" if shared else "",
            prompts=args.prompts,
            length=args.tokens + 192,
            batch=args.batch,
            tokens=args.tokens,
            epochs=args.epochs,
            steps=args.rollouts * args.epochs,
            micro=args.micro,
            bf16=str(args.bf16).lower(),
            checkpointing=str(args.checkpointing).lower(),
        )
    )
    run_dir = args.folder / f"run-{args.way}-{time.monotonic_ns()}"
    if launch.start("ppo", [f"recipe={recipe}", f"run_dir={run_dir}"], lambda text: None):
        sys.exit("align ppo failed")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lengths = [row["response_length"] for row in rows if "response_length" in row]
    assert set(lengths) == {float(args.tokens)}, lengths
    return figures(args, spent[0], ("align-cli", "torch", "trl", "transformers"))


def of_trl(args: argparse.Namespace) -> dict:
    """Run TRL's PPOTrainer with its defaults, except for the settings that all variants share."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    asked = [json.loads(line)["prompt"] for line in Path(args.prompts).read_text().splitlines()]
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for text in asked
    ]
    rows = [{"input_ids": row} for row in rows]
    whole = str(args.folder / "whole")
    policy, reference = (AutoModelForCausalLM.from_pretrained(args.model, dtype="float32") for _ in range(2))
    value, reward = (AutoModelForSequenceClassification.from_pretrained(whole, dtype="float32") for _ in range(2))
    import torch

    config = PPOConfig(
        output_dir=str(args.folder / "trl"),
        total_episodes=args.batch * args.rollouts,
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=args.batch // args.micro,
        local_rollout_forward_batch_size=args.micro,
        num_mini_batches=1,
        num_ppo_epochs=args.epochs,
        num_sample_generations=0,
        response_length=args.tokens,
        temperature=1.0,
        bf16=args.bf16,
        gradient_checkpointing=args.checkpointing,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[: args.micro]),
    )
    started = time.perf_counter()
    trainer.train()
    return figures(args, time.perf_counter() - started, ("torch", "trl", "transformers"))


if __name__ == "__main__":
    main()
