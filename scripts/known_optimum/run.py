"""Run PPO, RLOO and PPO without KL on a task whose optimum is known.

    python scripts/known_optimum/run.py [--folder known-optimum] [--seeds 1 2 3]        about 10 minutes on 2 cores

`align sft` trains a random two-layer model to write random letters. Then each method optimises the proxy reward of
`letters.py` with the ordinary `align` commands; the gold reward is only monitored. The script prints the tables of
docs/known-optimum.md and, if matplotlib is installed, draws its plot. When started again, it skips finished runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import letters

BUDGET = 12.0
"""KL budget, in nats per response."""
BETA = 0.0225
"""KL coefficient β. Its optimum is at 10.9 nats."""
ROLLOUTS, EPISODES, LAST = 150, 128, 10
WAYS = {
    "ppo": ("ppo", {"method.beta": BETA}, f"PPO, β {BETA}"),
    "rloo": ("rloo", {"method.beta": BETA}, f"RLOO, β {BETA}"),
    "no-kl": ("ppo", {"method.beta": 0.0}, "PPO, β 0"),
    "guarded": ("ppo", {"method.beta": 0.0}, "PPO, β 0, guard on gold"),
}
METHOD = {"ppo": "epochs: 2, minibatches: 2, lam: 0.95, vf_coef: 0.5", "rloo": "k: 4, epochs: 2, minibatches: 2"}
RECIPE = """name: {name}
model: {{ path: runs/letters/sft }}
reward: {{ python: "letters:proxy" }}
gold: {{ python: "letters:gold" }}
data: {{ train: prompts.jsonl, max_length: 32, batch_size: {episodes} }}
generation: {{ max_new_tokens: {length} }}
method: {{ {method}, missing_eos: null }}
{guards}trainer:
  learning_rate: 5.0e-4
  lr_scheduler_type: constant_with_warmup
  warmup_steps: 8
  max_steps: {steps}
  per_device_train_batch_size: 64
  logging_steps: 4
  save_strategy: 'no'
"""
GUARD = "guards: [{ metric: gold_reward, drop: 0.1, act: stop }]\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("known-optimum"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    started = time.perf_counter()
    prepare(args.folder)
    align(args.folder, "sft", "recipe=letters.yaml")
    jobs = [(way, seed) for way in args.ways for seed in args.seeds]
    # each run of a model of this size uses one core
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1))) as pool:
        list(pool.map(lambda job: train(args.folder, *job), jobs))
    curves = {job: read(args.folder, *job) for job in jobs}
    passed = report(curves)
    try:
        draw(curves, args.folder / "known-optimum.png")
    except ImportError:
        print("no plot: pip install matplotlib")
    print(f"{time.perf_counter() - started:.0f} s")
    sys.exit(not passed)


def prepare(folder: Path) -> None:
    """Write the model, data and recipes."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    model(folder / "model")
    draw = random.Random(0)
    # longer than a response, so that the model learns no end and every response has the same length
    texts = ["".join(draw.choices(letters.ALPHABET, k=letters.LENGTH + 8)) for _ in range(4096)]
    asked = [f"{number % 10}{number // 10 % 10}" for number in range(4096)]
    rows = [{"prompt": ask, "completion": text} for ask, text in zip(asked, texts, strict=True)]
    write(folder / "demonstrations.jsonl", rows)
    write(folder / "prompts.jsonl", [{"prompt": ask} for ask in asked[:1024]])
    (folder / "recipes/sft").mkdir(exist_ok=True)
    (folder / "recipes/sft/letters.yaml").write_text(
        f"""name: letters
model: {{ path: model }}
data: {{ train: demonstrations.jsonl, max_length: {letters.LENGTH + 4}, batch_size: 64 }}
trainer: {{ learning_rate: 1.0e-3, max_steps: 192, per_device_train_batch_size: 64, logging_steps: 16 }}
"""
    )
    for way, (stage, _, _) in WAYS.items():
        (folder / "recipes" / stage).mkdir(exist_ok=True)
        text = RECIPE.format(
            name=way,
            episodes=EPISODES,
            length=letters.LENGTH,
            method=METHOD[stage],
            guards=GUARD if way == "guarded" else "",
            steps=ROLLOUTS * 4,
        )
        (folder / "recipes" / stage / f"{way}.yaml").write_text(text)


def model(folder: Path) -> None:
    """Save a random Llama of 0.1 M parameters and a tokenizer with one token per character."""
    if (folder / "model.safetensors").is_file():
        return
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *letters.ALPHABET, *"0123456789"]
    raw = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def align(folder: Path, *words: str) -> str:
    """Run `align` and return its output. Exits if the command fails."""
    here = str(Path(__file__).parent.resolve())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-m", "align_cli", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"align {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def train(folder: Path, way: str, seed: int) -> None:
    stage, settings, _ = WAYS[way]
    words = [f"{key}={value}" for key, value in settings.items()]
    run = f"run_dir=runs/{way}-{seed}/{stage}"
    align(folder, stage, f"recipe={way}.yaml", f"seed={seed}", run, "--allow-code", *words)
    print(f"{way}, seed {seed}: done", flush=True)


def read(folder: Path, way: str, seed: int) -> dict:
    """A run's metrics per rollout, and why a guard stopped it."""
    run = folder / f"runs/{way}-{seed}/{WAYS[way][0]}"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "gold_reward" in row]
    manifest = json.loads((run / "manifest.json").read_text())
    return {
        "kl": [row["kl"] for row in rows],
        "proxy": [row["reward"] for row in rows],
        "gold": [row["gold_reward"] for row in rows],
        "stopped": manifest.get("stopped_by_guard"),
    }


def report(curves: dict) -> bool:
    """Print the table. Returns whether PPO and RLOO reach 90 % of the optimum within the budget and the guard fires."""
    optimum = letters.best_within(BUDGET)
    kl, proxy = letters.best(1 / (letters.LENGTH * BETA))
    print(f"\noptimum within {BUDGET:g} nats: proxy {optimum:.3f}; at β {BETA}: proxy {proxy:.3f} at {kl:.1f} nats\n")
    print("| way | seed | rollouts | KL, nats | proxy | of the optimum | gold | gold at its best |")
    print("|---|---|---|---|---|---|---|---|")
    passed = True
    for (way, seed), curve in curves.items():
        last = {name: fmean(curve[name][-LAST:]) for name in ("kl", "proxy", "gold")}
        share = last["proxy"] / optimum
        if way in ("ppo", "rloo"):
            passed &= share >= 0.9 and last["kl"] <= BUDGET
        elif way == "guarded":
            passed &= curve["stopped"] is not None
        print(
            f"| {WAYS[way][2]} | {seed} | {len(curve['kl'])} | {last['kl']:.1f} | {last['proxy']:.3f} | {share:.0%} | "
            f"{last['gold']:.3f} | {max(curve['gold']):.3f} |"
        )
    for (way, seed), curve in curves.items():
        if curve["stopped"]:
            print(f"\n{WAYS[way][2]}, seed {seed}, ended at {curve['stopped']}")
    return passed


def draw(curves: dict, file: Path) -> None:
    """Plot proxy and gold over √KL, one panel per variant, with the best proxy that any policy can reach."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    ways = [way for way in WAYS if any(key[0] == way for key in curves) and way != "guarded"]
    figure, panels = pyplot.subplots(1, len(ways), figsize=(4 * len(ways), 3.6), sharey=True, squeeze=False)
    frontier = [letters.best(tilt / 10) for tilt in range(400)]
    for panel, way in zip(panels[0], ways, strict=True):
        panel.plot([kl**0.5 for kl, _ in frontier], [proxy for _, proxy in frontier], "k--", lw=1, label="best proxy")
        for number, curve in enumerate(curve for (name, _), curve in curves.items() if name == way):
            distance = [max(kl, 0.0) ** 0.5 for kl in curve["kl"]]
            for name, colour in (("proxy", "tab:blue"), ("gold", "tab:orange")):
                label = {"label": name} if number == 0 else {}
                panel.plot(distance, curve[name], ".", color=colour, ms=3, alpha=0.6, **label)
        panel.set(title=WAYS[way][2], xlabel="√KL, √nats", xlim=(0, 7.2), ylim=(0, 1.02))
    panels[0][0].set_ylabel("mean reward of a rollout")
    panels[0][0].legend(loc="upper left", frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    print(f"drawn: {file}")


if __name__ == "__main__":
    main()
