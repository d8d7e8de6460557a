"""align orpo and align simpo as whole runs: what is learned and saved, and that layouts, cuts, ranks and kills change
nothing."""

import json

import project
import pytest
import torch

RECIPE = """name: t
model: { path: models/tiny }
data: { train: dpo.jsonl, eval: 0.25, max_length: 128, batch_size: 8 }
trainer: { learning_rate: 3.0e-3, max_steps: 40, save_steps: 10, lr_scheduler_type: constant }
samples: [name colours 1]
"""
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Chosen responses use warm words, rejected ones cold words."""
    folder = project.build(tmp_path_factory.mktemp("preference"), rows=48)
    for stage in ("orpo", "simpo"):
        project.recipe(folder, stage, text=RECIPE)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """Both methods' runs by their recipe as it stands."""
    for stage in ("orpo", "simpo"):
        project.ok(stage, "recipe=t.yaml", cwd=folder)
    return {stage: folder / f"runs/t/{stage}" for stage in ("orpo", "simpo")}


def logged(run, name):
    return [row[name] for row in project.metrics(run) if name in row]


@pytest.mark.parametrize("stage", ["orpo", "simpo"])
def test_each_lowers_its_loss_and_orders_held_out_pairs(runs, stage):
    losses, final = project.losses(runs[stage]), project.manifest(runs[stage])["metrics"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert final["eval_rewards/accuracies"] > 0.9
    assert final["eval_longer_wins"] < 0.75
    assert final["eval_logps/margins"] > 0.1 and final["eval_rewards/margins"] > 0


@pytest.mark.parametrize("stage", ["orpo", "simpo"])
def test_figures_and_samples_are_kept(runs, stage):
    rows = project.metrics(runs[stage])
    assert {"rewards/accuracies", "rewards/margins", "logps/chosen", "tokens_per_second"} <= set(rows[0])
    assert ("loss/odds-ratio" in rows[0]) == (stage == "orpo")
    (sample,) = [json.loads(line) for line in (runs[stage] / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "before", "after"} <= set(sample)
    made = project.manifest(runs[stage])
    assert [entry["role"] for entry in made["parents"]] == ["policy"]
    assert made["metrics"]["peak_memory_mib"] > 50 and made["metrics"]["seconds"] > 0


def test_the_loss_is_the_formula_on_what_plain_transformers_computes(folder):
    """One step on all rows at once, so that the first loss is over known pairs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["data.eval=null", "data.batch_size=48", "trainer.max_steps=1", "samples=null"]
    project.ok("simpo", "recipe=t.yaml", "name=once", *words, cwd=folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "models/tiny")
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/tiny")

    def mean(prompt, answer):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
        start = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(whole, return_tensors="pt", add_special_tokens=False)["input_ids"]
        asked = len(tokenizer(start, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(-1)
        return logs.gather(1, ids[0, 1:, None])[asked - 1 :].mean()

    pairs = [json.loads(line) for line in (folder / "dpo.jsonl").read_text().splitlines()]
    margins = torch.stack([mean(row["prompt"], row["chosen"]) - mean(row["prompt"], row["rejected"]) for row in pairs])
    wanted = -torch.nn.functional.logsigmoid(2 * margins - 1).mean().item()
    run = folder / "runs/once/simpo"
    assert project.losses(run) == [pytest.approx(wanted, abs=1e-4)]
    assert logged(run, "logps/margins") == [pytest.approx(margins.mean().item(), abs=1e-4)]


def test_neither_the_layout_nor_the_cut_changes_what_is_learned(folder, runs):
    words = ["method.layout=rows", "method.batch_tokens=64", "trainer.per_device_train_batch_size=2"]
    project.ok("orpo", "recipe=t.yaml", "name=cut", *words, "trainer.max_steps=6", "samples=null", cwd=folder)
    cut = folder / "runs/cut/orpo"
    assert project.losses(cut) == pytest.approx(project.losses(runs["orpo"])[:6], rel=1e-4)
    assert logged(cut, "rewards/margins") == pytest.approx(logged(runs["orpo"], "rewards/margins")[:6], rel=1e-3)


def test_under_lora_the_reference_is_the_policy_with_its_adapter_off(folder):
    words = ["method.also=[{loss: dpo}]", "lora.r=4", "model.dtype=float32", "trainer.learning_rate=1e-2"]
    project.ok("simpo", "recipe=t.yaml", "name=lora", *words, "trainer.max_steps=12", "samples=null", cwd=folder)
    found = logged(folder / "runs/lora/simpo", "loss/dpo")
    assert found[0] == pytest.approx(0.693147, abs=1e-4) and found[-1] < 0.69
    weights = project.weights(folder / "runs/lora/simpo")
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        ("orpo", "zero3"),
        *(
            pytest.param(*case, marks=SLOW)
            for case in (("orpo", "zero2"), ("simpo", "zero2"), ("simpo", "zero3"), ("orpo", "none"))
        ),
    ],
)
def test_two_ranks_are_one_process(folder, runs, stage, zero):
    words = ["launch.num_gpus=2", f"zero={zero}", "trainer.max_steps=4", "samples=null"]
    project.ok(stage, "recipe=t.yaml", f"name={zero}", *words, cwd=folder)
    for name in ("loss", "rewards/accuracies", "logps/chosen", "rewards/margins"):
        found = logged(folder / f"runs/{zero}/{stage}", name)
        assert found == pytest.approx(logged(runs[stage], name)[:4], rel=1e-3, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_ranks_are_one_process_with_a_reference(folder, zero):
    words = ["method.also=[{loss: dpo}]", "trainer.max_steps=4", "samples=null"]
    one, two = folder / "runs/with/simpo", folder / f"runs/with-{zero}/simpo"
    if not (one / "manifest.json").is_file():
        project.ok("simpo", "recipe=t.yaml", "name=with", *words, cwd=folder)
    ranks = ["launch.num_gpus=2", f"zero={zero}"]
    project.ok("simpo", "recipe=t.yaml", f"name=with-{zero}", *words, *ranks, cwd=folder)
    assert logged(one, "loss/dpo")[0] == pytest.approx(0.693147, abs=1e-4)
    for name in ("loss", "loss/dpo", "eval_loss", "eval_rewards/margins"):
        assert logged(two, name) == pytest.approx(logged(one, name), rel=1e-3, abs=1e-4), name
    for name, tensor in project.weights(one).items():
        assert torch.allclose(tensor, project.weights(two)[name], atol=1e-4), name


def test_killed_and_run_again_it_ends_with_the_same_weights(folder, runs):
    run = folder / "runs/killed/orpo"
    project.kill_after_a_checkpoint("orpo", "recipe=t.yaml", "name=killed", run=run, cwd=folder)
    assert "resuming from step" in project.ok("orpo", "recipe=t.yaml", "name=killed", cwd=folder)
    calm = project.weights(runs["orpo"])
    assert all(torch.equal(tensor, calm[name]) for name, tensor in project.weights(run).items())


@pytest.mark.parametrize(
    ("words", "findings"),
    [
        (
            ["reference.path=models/tiny", "data.streaming=true", "trainer.label_smoothing_factor=0.1"],
            ["is not used by any loss of this recipe", "does not work here", "write method.label_smoothing"],
        ),
        (["method.weight=0", "lora.targets=[q_proj,lm_head]"], ["no loss remains", "includes lm_head"]),
        (["method.also=[{loss: simpo}]"], ["repeats the loss simpo"]),
        (
            ["method.also=[{loss: dop}]", "method.gamma_ratio=-1", "data.train=sft.jsonl"],
            ["Did you mean 'dpo'?", "greater than or equal to 0", "preferences need"],
        ),
    ],
)
def test_what_cannot_run_is_refused_a_line_a_problem(folder, words, findings):
    done = project.align("simpo", "recipe=t.yaml", "name=bad", *words, cwd=folder)
    assert done.returncode == 2 and all(finding in done.stderr for finding in findings), done.stderr
    assert "Traceback" not in done.stderr and not (folder / "runs/bad").exists()
