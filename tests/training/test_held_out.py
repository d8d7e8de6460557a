"""Held-out figures are over rows or tokens of all ranks: the same for every batch size and number of ranks, and those
of a plain script."""

import math

import project
import pytest
import tiny
import torch
from project import manifest, ok

ROWS = 7
TEXT = """name: t
model: {{ path: models/tiny }}
{more}data: {{ train: {file}, eval: held_{file}, max_length: 128, batch_size: 8 }}
trainer: {{ learning_rate: 0.0, max_steps: 1, per_device_train_batch_size: 4 }}
"""
REFERENCE = "reference: {{ path: models/other }}\n".format()
FILES = {
    "sft": "sft.jsonl",
    "dpo": "dpo.jsonl",
    "kto": "kto.jsonl",
    "rm": "dpo.jsonl",
    "orpo": "dpo.jsonl",
    "simpo": "dpo.jsonl",
}
BATCH = {
    **dict.fromkeys(("sft", "dpo", "kto"), "trainer.per_device_eval_batch_size={}"),
    # these cut their batches by tokens
    **dict.fromkeys(("rm", "orpo", "simpo"), "method.batch_tokens={}00"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    import random

    folder = project.build(tmp_path_factory.mktemp("held"), rows=8)
    tiny.model(folder / "models" / "other", seed=5)
    draw = random.Random(3)

    def words():
        return " ".join(draw.choices(project.WARM + project.COLD, k=draw.randint(1, 12)))

    asks = [f"name colours please {number}" for number in range(ROWS)]
    chat = [[{"role": "user", "content": ask}, {"role": "assistant", "content": words()}] for ask in asks]
    pairs = [{"prompt": ask, "chosen": words(), "rejected": words()} for ask in asks]
    labels = [{"prompt": ask, "completion": words(), "label": number % 3 > 0} for number, ask in enumerate(asks)]
    project.write_rows(folder / "held_sft.jsonl", [{"messages": turns} for turns in chat])
    project.write_rows(folder / "held_dpo.jsonl", pairs)
    project.write_rows(folder / "held_kto.jsonl", labels)
    train = [{"prompt": f"name {n}", "completion": words(), "label": n % 2 == 0} for n in range(8)]
    project.write_rows(folder / "kto.jsonl", train)
    for stage, file in FILES.items():
        more = REFERENCE if stage in ("dpo", "kto") else ""
        project.recipe(folder, stage, text=TEXT.format(file=file, more=more))
    return folder, chat, pairs, labels


def figures(folder, stage, size, ranks):
    run = f"runs/{stage}-{size}-{ranks}"
    words = [BATCH[stage].format(size), f"run_dir={run}"] + ([f"launch.num_gpus={ranks}"] if ranks > 1 else [])
    ok(stage, "recipe=t", *words, cwd=folder)
    made = manifest(folder / run)["metrics"]
    return {key: value for key, value in made.items() if key.startswith("eval_")}


def log_probs(path, ask, answer):
    """log p of every token of an answer, from transformers' logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tok, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    prompt = tok(f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    response = tok(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(1).gather(1, torch.tensor(response)[:, None])[:, 0]


def ratio(folder, ask, answer):
    ours, theirs = (log_probs(folder / "models" / name, ask, answer).sum().item() for name in ("tiny", "other"))
    return 0.1 * (ours - theirs)


def sft(folder, chat, pairs, labels):
    every = torch.cat([log_probs(folder / "models/tiny", turns[0]["content"], turns[1]["content"]) for turns in chat])
    return {"eval_loss": -every.mean().item()}


def dpo(folder, chat, pairs, labels):
    good = torch.tensor([ratio(folder, row["prompt"], row["chosen"]) for row in pairs])
    bad = torch.tensor([ratio(folder, row["prompt"], row["rejected"]) for row in pairs])
    return {
        "eval_loss": -torch.nn.functional.logsigmoid(good - bad).mean().item(),
        "eval_rewards/accuracies": (good > bad).float().mean().item(),
        "eval_rewards/margins": (good - bad).mean().item(),
        "eval_rewards/chosen": good.mean().item(),
        "eval_rewards/rejected": bad.mean().item(),
    }


def kto(folder, chat, pairs, labels):
    rewards = torch.tensor([ratio(folder, row["prompt"], row["completion"]) for row in labels])
    good = torch.tensor([row["label"] for row in labels])
    before = [labels[-1], *labels[:-1]]
    shifted = [ratio(folder, row["prompt"], other["completion"]) for row, other in zip(labels, before, strict=True)]
    z = max(sum(shifted) / len(shifted), 0.0)
    losses = 1 - torch.where(good, (rewards - z).sigmoid(), (z - rewards).sigmoid())
    wins = (rewards[good][:, None] > rewards[~good][None]).float().mean().item()
    return {
        "eval_loss": losses.mean().item(),
        "eval_kl": z / 0.1,
        "eval_rewards/chosen": rewards[good].mean().item(),
        "eval_rewards/rejected": rewards[~good].mean().item(),
        "eval_rewards/accuracies": wins,
    }


@pytest.mark.parametrize("stage", FILES)
def test_one_value_for_every_batch_and_any_number_of_ranks(home, stage):
    folder, *rows = home
    first = figures(folder, stage, 1, 1)
    assert first
    for size, ranks in ((3, 1), (8, 1), (3, 2)):
        other = figures(folder, stage, size, ranks)
        assert set(other) == set(first)
        for key, value in first.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (key, size, ranks)
    oracle = {"sft": sft, "dpo": dpo, "kto": kto}.get(stage)
    for key, value in oracle(folder, *rows).items() if oracle else ():
        assert math.isclose(first[key], value, rel_tol=1e-5, abs_tol=1e-5), (key, first[key], value)


def test_packed_rows_have_the_loss_of_rows(home):
    folder, *rows = home
    wanted = sft(folder, *rows)["eval_loss"]
    for size in (1, 3):
        words = (BATCH["sft"].format(size), f"run_dir=runs/packed-{size}", "method.packing=true")
        ok("sft", "recipe=t", *words, cwd=folder)
        made = manifest(folder / f"runs/packed-{size}")["metrics"]["eval_loss"]
        assert made == pytest.approx(wanted, abs=1e-5)
