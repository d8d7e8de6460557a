"""A small project in an empty folder: a tiny model, data that can be learned, recipes; and `align` as a subprocess."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import tiny
import warm

WARM, COLD = ["red", "orange", "amber", "gold", "pink"], ["blue", "green", "teal", "navy", "grey"]


def build(folder: Path, rows: int = 32) -> Path:
    """Chosen responses use warm words, rejected ones cold words."""
    tiny.model(folder / "models" / "tiny")
    draw = random.Random(0)

    def words(kind):
        return " ".join(draw.choices(kind, k=draw.randint(2, 9)))

    asks = [f"name colours {number}" for number in range(rows)]
    sft = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": words(WARM)}]} for ask in asks
    ]
    dpo = [{"prompt": ask, "chosen": words(WARM), "rejected": words(COLD)} for ask in asks]
    for stage, lines in (("sft", sft), ("dpo", dpo)):
        write_rows(folder / f"{stage}.jsonl", lines)
        recipe(folder, stage)
    return folder


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(folder: Path, stage: str, name: str = "t", text: str = "") -> Path:
    file = folder / "recipes" / stage / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        text
        or f"""name: {name}
model: {{ path: models/tiny }}
data: {{ train: {stage}.jsonl, max_length: 128, batch_size: 8 }}
trainer: {{ learning_rate: 1.0e-3, max_steps: 6, per_device_train_batch_size: 2 }}
"""
    )
    return file


def align(*words: str, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    """A finished command. With keywords of `subprocess.run`, it is a process of its own from the start."""
    if not kwargs and (server := warm.server()):
        return server.run(words, cwd)
    return subprocess.run(
        [sys.executable, "-m", "align_cli", *words], cwd=cwd, capture_output=True, text=True, timeout=900, **kwargs
    )


def start(*words: str, cwd: Path, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "align_cli", *words],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def kill_after_a_checkpoint(*words: str, run: Path, cwd: Path, wait: float = 0.0) -> None:
    """Start a command and end it by SIGKILL, `wait` seconds after the run has its first whole checkpoint."""
    process, until = start(*words, cwd=cwd), time.monotonic() + 900
    while not list(run.glob("checkpoints/checkpoint-*/complete")) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "manifest.json").exists()


def ok(*words: str, cwd: Path) -> str:
    """Output of a command that must succeed."""
    done = align(*words, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def manifest(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


def weights(run: Path) -> dict:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(run.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@contextlib.contextmanager
def locked(run):
    """Within, other processes are kept out of a run's directory."""
    run.lock()
    try:
        yield
    finally:
        run.unlock()


def job(stage: str, *words: str):
    """The job that `align STAGE recipe=t …` runs from the working directory, in this process."""
    from rich.console import Console

    from align_cli.model import precision
    from align_cli.recipe.check import load
    from align_cli.run import batch, devices
    from align_cli.run.directory import RunDirectory
    from align_cli.training.job import Job

    _, recipe = load(stage, ["recipe=t", *words])
    run, rows = RunDirectory(recipe.run_dir), batch.arithmetic(recipe, 1)
    run.path.mkdir(parents=True, exist_ok=True)
    return Job(
        recipe=recipe,
        run=run,
        precision=precision.choose(recipe, devices.machine(recipe.launch)),
        per_device=rows.per_device,
        accumulation=rows.accumulation,
        rank=0,
        ranks=1,
        console=Console(quiet=True),
        cache=Path("runs/.cache"),
        base=recipe.model.path,
    )
