"""Check this machine's GPUs with real runs of every stage, and write what was measured to docs/gpu/<device>.md.

    python scripts/gpu_check.py                      # everything; about 20 minutes on one GPU
    python scripts/gpu_check.py --only sft,dpo       # some stages
    python scripts/gpu_check.py --device cpu         # the same lines on CPU ranks, at small dimensions

Random weights and generated rows: no network is needed. Every check is a row in <work>/results.jsonl as soon as it is
done; a second call goes on where the first was cut, and repeats what failed. The float32 losses of one CPU process are
the reference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "vllm", "flash-attn")
HALF = ["trainer.bf16=true", "trainer.gradient_checkpointing=true"]
LORA = "lora={r: 8, alpha: 32}"
WAYS = {
    "full": ("float32 weights, bf16 products, gradient checkpointing", HALF),
    "lora": ("bf16 weights, LoRA, gradient checkpointing", [LORA, *HALF]),
}
TOLERANCE = 0.02
"""Relative difference of a first loss in bfloat16 from the one in float32."""
ALIKE = 0.05
"""Difference of a loss on several ranks from that on one, as a share of the first loss: rounding adds up over steps."""


@dataclass
class Row:
    """One measured line of the table."""

    section: str
    check: str
    wanted: str
    found: str
    ok: bool | None
    """None if it was measured, but nothing was promised, or if the machine cannot run it."""
    seconds: float = 0.0


@dataclass
class Machine:
    """What the checks run on, and where."""

    work: Path
    device: str
    gpus: int
    name: str
    done: dict[str, Row] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether checks on several ranks can run."""
        return self.device == "cpu" or self.gpus > 1

    def environment(self, *, cpu: bool = False) -> dict[str, str]:
        """Of a command: without GPUs on the CPU."""
        hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if cpu or self.device == "cpu" else {}
        return (
            os.environ
            | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
            | hidden
        )


# -- projects: models of random weights, and rows that can be learned

OFFLINE = "trainer: {{ learning_rate: {rate}, max_steps: 12, per_device_train_batch_size: 4, logging_steps: 1 }}\n"
ONLINE = """data: {{ train: prompts.jsonl, max_length: 96, batch_size: 16 }}
generation: {{ max_new_tokens: 8 }}
trainer: {{ learning_rate: {rate}, max_steps: 4, per_device_train_batch_size: 8, logging_steps: 1 }}
"""
HEAD = "name: t\nmodel: {{ path: models/tiny }}\n"
PAIRS = "data: {{ train: dpo.jsonl, max_length: 96, batch_size: 8 }}\n"
ROWS = "data: {{ train: sft.jsonl, max_length: 96, batch_size: 8 }}\n"
REWARD = "reward: {{ path: runs/{reward}/rm }}\n"
RECIPES = {
    "sft": HEAD + ROWS + OFFLINE,
    "rm": HEAD + PAIRS + OFFLINE,
    "dpo": HEAD + PAIRS + OFFLINE,
    "orpo": HEAD + PAIRS + OFFLINE,
    "simpo": HEAD + PAIRS + OFFLINE,
    "kto": HEAD + PAIRS + OFFLINE,
    "spin": HEAD
    + ROWS
    + "generation: {{ max_new_tokens: 8 }}\n"
    + "method: {{ iterations: 1, stop_when_alike: false, learning_rate: {rate} }}\n"
    + "trainer: {{ max_steps: 12, per_device_train_batch_size: 4, logging_steps: 1 }}\n",
    "ppo": HEAD + REWARD + "method: {{ epochs: 2, minibatches: 1 }}\n" + ONLINE,
    "rloo": HEAD + REWARD + "method: {{ k: 4 }}\n" + ONLINE,
    "grpo": HEAD + REWARD + "method: {{ k: 4 }}\n" + ONLINE,
}
SAMPLED = ("ppo", "rloo", "grpo")
RATES = {"lora": "1.0e-2", "full": "3.0e-3"}


def build(folder: Path) -> Path:
    """A project with a tiny model, pairs, demonstrations, prompts, and a recipe a stage and way."""
    import project

    if not (folder / "prompts.jsonl").is_file():
        project.build(folder, rows=48)
        draw, sides = random.Random(1), (("chosen", project.WARM), ("rejected", project.COLD))
        rows = [
            {"prompt": f"name colours {n}"} | {side: " ".join(draw.choices(words, k=4)) for side, words in sides}
            for n in range(48)
        ]
        project.write_rows(folder / "dpo.jsonl", rows)
        project.write_rows(folder / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(64)])
    for stage, text in RECIPES.items():
        for way, rate in RATES.items():
            project.recipe(folder, stage, way, text.format(rate=rate, reward=f"{way}-float32"))
    return folder


def large(folder: Path, device: str) -> Path:
    """A model of 1.1 B parameters (small on a CPU), saved in bfloat16."""
    import tiny
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / "models/large"
    if (path / "tokenizer_config.json").is_file():
        return path
    tok = tiny.tokenizer()
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    if device == "cpu":
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **heads, **ends, max_position_embeddings=2048)
    with torch.device("cuda" if device == "cuda" else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)
    tok.save_pretrained(path)
    return path


# -- running the command that users call


class Failed(Exception):
    """A command that did not end as it should; the message is its last line."""


def align(machine: Machine, *words: str, cpu: bool = False, timeout: float = 900) -> str:
    """Run `align`. Returns what it printed; raises Failed."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "align_cli", *words],
            **{"cwd": machine.work, "env": machine.environment(cpu=cpu), "timeout": timeout},
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"no end after {timeout:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise Failed(f"exit code {done.returncode}: {lines[-1] if lines else ''}")
    return done.stdout


def finished(machine: Machine, stage: str, way: str, name: str, *words: str, cpu: bool = False) -> Path:
    """The directory of a finished run, which is run only once."""
    run = machine.work / f"runs/{name}/{stage}"
    if not (run / "manifest.json").is_file():
        if stage in SAMPLED:
            reference(machine, "rm", way)
        align(machine, stage, f"recipe={way}.yaml", f"name={name}", *words, cpu=cpu)
    return run / "iteration-0" if stage == "spin" else run


def reference(machine: Machine, stage: str, way: str) -> Path:
    """The run of a stage in float32 on the CPU, in one process."""
    lora = [LORA] if way == "lora" else []
    plain = ["trainer.bf16=false", "model.dtype=float32", *lora]
    return finished(machine, stage, way, f"{way}-float32", *plain, cpu=True)


def logged(run: Path, name: str) -> list[float]:
    """A metric's values."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row and "loss" in row]


def manifest(run: Path) -> dict:
    """The run's manifest."""
    return json.loads((run / "manifest.json").read_text())


# -- checks


def learns(machine: Machine, stage: str, way: str, ranks: str = "one") -> Row:
    """A stage in bfloat16 against the float32 losses of the CPU, and on several ranks against one."""
    title, words = WAYS[way]
    count = 1 if ranks == "one" else 2 if machine.device == "cpu" else min(machine.gpus, 4)
    where = [] if ranks == "one" else [f"zero={ranks}", f"launch.num_gpus={count}"]
    run = finished(machine, stage, way, f"{way}-{ranks}", *words, *where)
    before, name = reference(machine, stage, way), "reward" if stage in SAMPLED else "loss"
    theirs, ours = logged(before, name), logged(run, name)
    faults = [] if all(map(_finite, (*ours, *logged(run, "grad_norm")))) else ["not finite"]
    if not any(norm > 1e-6 for norm in logged(run, "grad_norm") if _finite(norm)):
        faults.append("no gradients")
    if way == "lora" and not _adapter_moved(run):
        faults.append("lora_B is 0")
    alone = logged(finished(machine, stage, way, f"{way}-one", *words), name) if ranks != "one" else theirs
    if stage in SAMPLED:
        # a token that flips by rounding changes its whole response
        promise, shown = "finite, adapters move, first reward within 0.5", "first reward"
        faults += [] if abs(ours[0] - theirs[0]) <= 0.5 and abs(ours[0] - alone[0]) <= 0.5 else ["another reward"]
    else:
        promise, shown = "finite, learns, adapters move, first loss within 2 %", "loss"
        faults += [] if max(abs(ours[0] / of[0] - 1) for of in (theirs, alone)) <= TOLERANCE else ["another loss"]
        # KTO estimates its z0 from the rows that all ranks compute at a time, so that ranks change its losses
        apart = max(abs(a - b) for a, b in zip(ours, alone, strict=True)) / alone[0]
        if ranks != "one" and stage != "kto":
            promise += "; each within 5 % of the first of one rank's"
            faults += [] if apart <= ALIKE else [f"{apart:.1%} from one rank"]
        faults += [] if sum(ours[-3:]) < 0.9 * sum(ours[:3]) else ["does not learn"]
    found = f"{shown} {ours[0]:.4f}, last {ours[-1]:.4f}; float32 {theirs[0]:.4f}, {theirs[-1]:.4f}"
    found += f"; one rank {alone[0]:.4f}, {alone[-1]:.4f}" if ranks != "one" else ""
    label = f"{stage}, {title}" + (f", {ranks} on {count} ranks" if ranks != "one" else "")
    return Row("Correctness", label, promise, "; ".join([found, *faults]), not faults)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _adapter_moved(run: Path) -> bool:
    from safetensors.torch import load_file

    weights = {name: tensor for file in run.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return all(tensor.abs().max() > 1e-6 for name, tensor in weights.items() if "lora_B" in name)


def engine(machine: Machine, name: str) -> Row:
    """GRPO's rollouts by another engine."""
    title = {"batched": "continuous batching (transformers)", "vllm": "vLLM, colocated"}[name]
    if name == "vllm" and find_spec("vllm") is None:
        return Row("Rollouts", title, "runs", "vllm is not installed", None)
    reference(machine, "rm", "full")
    run = finished(machine, "grpo", "full", name, f"generation.engine={name}", *HALF)
    rewards, lengths = logged(run, "reward"), logged(run, "response_length")
    own = logged(finished(machine, "grpo", "full", "full-one", *HALF), "response_length")
    found = f"rewards {rewards[0]:.2f} … {rewards[-1]:.2f}, first responses {lengths[0]:.1f} tokens (hf {own[0]:.1f})"
    return Row("Rollouts", title, "runs, responses as long as hf's ± 50 %", found, 0.5 < lengths[0] / own[0] < 1.5)


def resumes(machine: Machine, stage: str) -> Row:
    """Killed with SIGKILL after a checkpoint, then run again, against the run that nothing stopped."""
    import project

    words = [stage, "recipe=full.yaml", *HALF, "trainer.save_steps=2", *(["trainer.max_steps=8"])]
    whole = finished(machine, stage, "full", f"whole-{stage}", *words[2:])
    run = machine.work / f"runs/killed-{stage}/{stage}"
    if not (run / "manifest.json").is_file():
        if not run.exists():
            os.environ |= machine.environment()
            project.kill_after_a_checkpoint(*words, f"name=killed-{stage}", run=run, cwd=machine.work)
        align(machine, *words, f"name=killed-{stage}")
    ours, theirs = project.weights(run), project.weights(whole)
    apart = max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs)
    return Row("Kill and resume", stage, "weights within 1e-3 of the uninterrupted run's", f"{apart:.1e}", apart < 1e-3)


MEMORY = {
    "sft": ("sft", []),
    "sft, checkpointing": ("sft", ["trainer.gradient_checkpointing=true"]),
    "sft, LoRA": ("sft", ["lora={r: 16}"]),
    "rm": ("rm", []),
    "dpo, LoRA": ("dpo", ["lora={r: 16}"]),
    "dpo": ("dpo", []),
}


def memory(machine: Machine, label: str) -> Row:
    """Peak memory at 1 B dimensions against the plan of `align check`."""
    stage, words = MEMORY[label]
    large(machine.work, machine.device)
    tokens = 64 if machine.device == "cpu" else 512
    import project

    text, data = " ".join(["red"] * (tokens // 4)), f"{stage}-long.jsonl"
    sides = {"completion": text} if stage == "sft" else {"chosen": text, "rejected": text.replace("red", "blue", 1)}
    project.write_rows(machine.work / data, [{"prompt": f"say {n}"} | sides for n in range(16)])
    given = [
        f"data={{train: {data}, max_length: {tokens}}}",
        "model.path=models/large",
        *("trainer.max_steps=3", "trainer.per_device_train_batch_size=2", "trainer.save_strategy='no'"),
        *("trainer.gradient_checkpointing=false", *words),
    ]
    name = f"name=memory-{re.sub('[^a-z]+', '-', label.lower())}"
    said = align(machine, "check", stage, "recipe=full.yaml", name, *given)
    planned = float(re.search(r"≈ ([\d.]+) GiB per rank", said)[1])
    align(machine, stage, "recipe=full.yaml", name, *given)
    peak = manifest(machine.work / f"runs/{name.removeprefix('name=')}/{stage}")["metrics"]["peak_memory_mib"] / 1024
    if machine.device == "cpu":
        found = f"{peak:.2f} GiB of the whole process, {planned:.2f} planned of tensors"
    else:
        found = f"{peak:.2f} GiB allocated at most, {planned:.2f} planned ({peak / max(planned, 0.01):.2f}×)"
    return Row("Memory", f"{label}, 2 × {tokens} tokens", "measured", found, None)


def bench(machine: Machine, script: str, *words: str) -> Row:
    """A benchmark script at 1 B dimensions."""
    import project

    model, small = large(machine.work, machine.device), machine.device == "cpu"
    draw, data = random.Random(2), machine.work / f"{script}.jsonl"
    k, length = 4 if script == "bench_rm" else 2, 8 if small else 60
    answers = [[" ".join(draw.choices(project.WARM, k=length)) for _ in range(k)] for _ in range(8 if small else 64)]
    rows = (
        [{"prompt": f"say {n}", "responses": of, "ranks": list(range(1, k + 1))} for n, of in enumerate(answers)]
        if script == "bench_rm"
        else [{"prompt": f"say {n}", "chosen": of[0], "rejected": of[1]} for n, of in enumerate(answers)]
    )
    project.write_rows(data, rows)
    line = [sys.executable, str(ROOT / f"scripts/{script}.py"), str(data), "--model", str(model), "--bf16", *words]
    done = subprocess.run(line, cwd=machine.work, env=machine.environment(), capture_output=True, text=True)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["no output"])[-1])
    table = [line for line in done.stdout.splitlines() if line.startswith("| ") and "---" not in line][1:]
    return Row(
        "Benchmarks", script, "measured", "; ".join(line.strip("| ").replace(" | ", ", ") for line in table), None
    )


Check = Callable[[], Row]


def checks(machine: Machine, stages: list[str]) -> Iterator[tuple[str, Check]]:
    """(key, check) of everything that this machine can run, the most important first."""
    for stage in stages:
        for way in WAYS:
            yield f"{stage} {way}", lambda stage=stage, way=way: learns(machine, stage, way)
    for stage in stages if machine.several else ():
        for way in WAYS:
            for ranks in ("zero2", "zero3"):
                yield (
                    f"{stage} {way} {ranks}",
                    lambda stage=stage, way=way, ranks=ranks: learns(machine, stage, way, ranks),
                )
    for stage in ("sft", "dpo", "ppo"):
        if stage in stages:
            yield f"resume {stage}", lambda stage=stage: resumes(machine, stage)
    if "grpo" in stages:
        for name in ("batched", "vllm"):
            yield f"engine {name}", lambda name=name: engine(machine, name)
    for label, (stage, _) in MEMORY.items():
        if stage in stages:
            yield f"memory {label}", lambda label=label: memory(machine, label)
    for script, words in (("bench_rm", ["--groups", "32"]), ("bench_preference", ["--rows", "32"])):
        if {"rm", "dpo"} & set(stages):
            yield script, lambda script=script, words=words: bench(machine, script, *words)


def measured(key: str, check: Check) -> Row:
    """The check's row; a check that fails is a row as well."""
    started = time.monotonic()
    try:
        row = check()
    except (Failed, OSError, AssertionError, KeyError, IndexError, TypeError) as error:
        row = Row("Failed", key, "runs", f"{type(error).__name__}: {error}"[:300], False)
    row.seconds = round(time.monotonic() - started, 1)
    return row


def page(machine: Machine) -> str:
    """The Markdown page of all rows."""
    rows = list(machine.done.values())
    good, bad = sum(row.ok is True for row in rows), sum(row.ok is False for row in rows)
    lines = [
        f"# {machine.name}",
        "",
        f"`python scripts/gpu_check.py --device {machine.device}`: {good} checks hold, {bad} do not, "
        f"{len(rows) - good - bad} only measured; {sum(row.seconds for row in rows) / 60:.0f} minutes of runs.",
        "",
        f"- Devices: {machine.gpus or 'no GPU'}{f' × {machine.name}' if machine.gpus else ''}; {os.cpu_count()} CPU "
        f"cores ({_cpu()})",
        f"- Versions: Python {platform.python_version()}, {', '.join(_versions())}",
        "- Correctness: a random two-layer Llama; the reference is the same stage in float32 in one CPU process.",
    ]
    for section in dict.fromkeys(row.section for row in rows):
        lines += ["", f"## {section}", "", "| check | wanted | found | holds | s |", "|---|---|---|---|---|"]
        for row in rows:
            if row.section == section:
                holds = {True: "yes", False: "**no**", None: ""}[row.ok]
                cells = (row.check, row.wanted, row.found, holds, f"{row.seconds:.0f}")
                lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _versions() -> Iterator[str]:
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def found_machine(device: str | None, work: Path) -> Machine:
    """This machine; exits if `--device cuda` finds no GPU."""
    import torch

    count = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not count:
        sys.exit("--device cuda: torch sees no GPU; install a CUDA build of torch, or use --device cpu")
    name = torch.cuda.get_device_name(0) if count else f"CPU ranks, {_cpu()}"
    return Machine(work, "cuda" if count else "cpu", count, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if torch sees a GPU")
    parser.add_argument("--only", help="stages, separated by commas")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu-check"), help="where runs and results are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/gpu")
    parser.add_argument("--minutes", type=float, default=30, help="start no check after this time")
    args = parser.parse_args()
    stages = args.only.split(",") if args.only else list(RECIPES)
    if unknown := [stage for stage in stages if stage not in RECIPES]:
        parser.error(f"--only: unknown stage {unknown[0]}; known: {', '.join(RECIPES)}")
    args.work.mkdir(parents=True, exist_ok=True)
    machine = found_machine(args.device, args.work.resolve())
    build(machine.work)
    results, started = machine.work / f"results-{machine.device}.jsonl", time.monotonic()
    for line in results.read_text().splitlines() if results.is_file() else ():
        entry = json.loads(line)
        key = entry.pop("key")
        machine.done[key] = Row(**entry)
    left = [
        (key, check)
        for key, check in checks(machine, stages)
        if key not in machine.done or machine.done[key].ok is False
    ]
    for number, (key, check) in enumerate(left):
        if time.monotonic() - started > args.minutes * 60:
            print(f"{len(left) - number} checks are left; the same command goes on")
            break
        row = measured(key, check)
        mark = {True: "ok", False: "FAIL", None: "--"}[row.ok]
        print(f"[{mark}] {row.check}: {row.found} ({row.seconds:.0f} s)", flush=True)
        machine.done[key] = row
        with results.open("a") as stream:
            stream.write(json.dumps({"key": key, **asdict(row)}) + "\n")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{re.sub('[^a-z0-9]+', '-', machine.name.lower()).strip('-')}.md"
    file.write_text(page(machine))
    print(f"written: {file}")
    sys.exit(any(row.ok is False for row in machine.done.values()))


if __name__ == "__main__":
    main()
