"""align ppo and align rloo as whole runs, with a reward model that counts warm words."""

import json
import random
import re

import project
import pytest
import torch
from project import COLD, WARM

RECIPE = """name: t
model: {{ path: models/tiny }}
reward: {{ path: runs/t/rm }}
data: {{ train: prompts.jsonl, max_length: 96, batch_size: 16 }}
generation: {{ max_new_tokens: 12 }}
method: {{ {method} }}
trainer: {{ learning_rate: 1.0e-3, max_steps: {steps}, per_device_train_batch_size: 8, logging_steps: 1 }}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = project.build(tmp_path_factory.mktemp("ppo"))
    draw = random.Random(1)
    rows = [
        {
            "prompt": f"name colours {n}",
            "chosen": " ".join(draw.choices(WARM, k=4)),
            "rejected": " ".join(draw.choices(COLD, k=4)),
        }
        for n in range(48)
    ]
    project.write_rows(folder / "rm.jsonl", rows)
    project.write_rows(folder / "prompts.jsonl", [{"prompt": f"name colours {n}"} for n in range(64)])
    project.recipe(
        folder,
        "rm",
        "t",
        """name: t
model: { path: models/tiny }
data: { train: rm.jsonl, max_length: 96, batch_size: 8 }
method: { center_on: sft.jsonl }
trainer: { learning_rate: 3.0e-3, max_steps: 12 }
""",
    )
    project.ok("rm", "recipe=t.yaml", cwd=folder)
    for stage, method in (("ppo", "epochs: 2, minibatches: 2"), ("rloo", "k: 4")):
        project.recipe(folder, stage, "t", RECIPE.format(method=method, steps=8))
    return folder


@pytest.fixture(scope="module", params=["ppo", "rloo"])
def run(request, folder):
    stage = request.param
    said = project.ok(stage, "recipe=t.yaml", cwd=folder)
    return stage, folder / f"runs/t/{stage}", said


def test_figures_of_every_rollout_are_kept(run):
    stage, path, _ = run
    rows = [row for row in project.metrics(path) if "loss" in row]
    assert len(rows) == 8
    for name in ("reward", "kl", "entropy", "response_length", "eos_rate", "distinct_2", "seconds_rollout", "beta"):
        assert name in rows[0], name
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    if stage == "ppo":
        assert {"value_loss", "explained_variance", "kl_k3"} <= set(rows[0])
        # the first minibatch is scored by the very policy that sampled it
        assert rows[0]["clip_ratio/region_mean"] == 0


def test_what_is_saved_loads_with_plain_transformers(run):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    stage, path, _ = run
    names = project.weights(path)
    assert not any(name.startswith("value_model") for name in names)
    AutoModelForCausalLM.from_pretrained(path)
    if stage == "ppo":
        value = AutoModelForSequenceClassification.from_pretrained(path / "value")
        start = project.weights(path.parent / "rm")
        moved = [name for name, tensor in value.state_dict().items() if not torch.equal(tensor, start[name])]
        assert "score.weight" in moved and len(moved) > 5


def test_the_manifest_names_its_parents(run):
    stage, path, _ = run
    roles = {entry["role"]: entry["path"] for entry in project.manifest(path)["parents"]}
    assert roles == {"policy": "models/tiny", "reward": "runs/t/rm"}


def test_the_value_function_is_one_of_the_runs_files(run, folder, monkeypatch):
    from align_cli.run.directory import RunDirectory
    from align_cli.run.manifest import missing_files

    stage, path, _ = run
    files = project.manifest(path)["files"]
    assert ("value/model.safetensors" in files) == (stage == "ppo")
    if stage == "ppo":
        monkeypatch.setitem(files, "value/other.safetensors", files["value/model.safetensors"])
        assert missing_files(RunDirectory(path), {"files": files}) == ["value/other.safetensors is gone or was changed"]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "zero"),
    [
        ("ppo", "zero2"),
        ("ppo", "zero3"),
        ("rloo", "zero3"),
        pytest.param("ppo", "none", marks=SLOW),
        pytest.param("rloo", "none", marks=SLOW),
        pytest.param("rloo", "zero2", marks=SLOW),
    ],
)
def test_two_ranks_are_one_process(folder, stage, zero):
    one = folder / f"runs/one/{stage}"
    if not (one / "manifest.json").is_file():
        project.ok(stage, "recipe=t.yaml", "name=one", "trainer.max_steps=4", cwd=folder)
    project.ok(
        *(stage, "recipe=t.yaml", f"name={zero}", "launch.num_gpus=2", f"zero={zero}", "trainer.max_steps=4"),
        "trainer.per_device_train_batch_size=4",
        cwd=folder,
    )
    two = folder / f"runs/{zero}/{stage}"
    for name in ("reward", "kl", "response_length", "loss", "entropy"):
        expected, found = ([row[name] for row in project.metrics(run) if name in row] for run in (one, two))
        assert expected
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-4), name
    for name, tensor in project.weights(one).items():
        assert torch.allclose(tensor, project.weights(two)[name], atol=5e-4), name


@pytest.mark.parametrize(
    ("stage", "ranks"), [("ppo", 1), pytest.param("ppo", 2, marks=SLOW), pytest.param("rloo", 1, marks=SLOW)]
)
def test_killed_in_its_second_epoch_and_run_again_it_ends_with_the_same_weights(folder, stage, ranks):
    # 16 updates an epoch
    settings = ["trainer.save_steps=18", "trainer.max_steps=40", f"launch.num_gpus={ranks}"]
    settings.append(f"trainer.per_device_train_batch_size={8 // ranks}")
    project.ok(stage, "recipe=t.yaml", f"name=calm{ranks}", *settings, cwd=folder)
    run = folder / f"runs/killed{ranks}/{stage}"
    words = [stage, "recipe=t.yaml", f"name=killed{ranks}", *settings]
    project.kill_after_a_checkpoint(*words, run=run, cwd=folder, wait=0.1)
    said = project.ok(*words, cwd=folder)
    assert int(re.search(r"resuming from step (\d+)", said)[1]) > 16
    for place in ("", "value") if stage == "ppo" else ("",):
        calm = project.weights(folder / f"runs/calm{ranks}/{stage}" / place)
        assert all(torch.equal(tensor, calm[name]) for name, tensor in project.weights(run / place).items()), place


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (["reward.path=models/tiny"], "without a trained scalar head"),
        (["reward.path=runs/none/rm"], "runs/none/rm does not exist"),
        (["generation.max_new_tokens=96"], "leaves no room for a prompt"),
        (["data.max_prompt_length=90"], "set data.max_prompt_length=84"),
        (["data.batch_size=15"], "do not divide by"),
        (["model.path=runs/t/rm"], "is a reward model"),
        (["guards=[{metric: kl}]"], "has no threshold"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(folder, words, finding):
    done = project.align("ppo", "recipe=t.yaml", "name=bad", *words, cwd=folder)
    assert done.returncode == 2 and finding in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (folder / "runs/bad").exists()


def test_rloo_wants_two_samples(folder):
    done = project.align("rloo", "recipe=t.yaml", "name=bad", "method.k=1", cwd=folder)
    assert done.returncode == 2 and "method.k" in done.stderr


def test_a_guard_ends_the_run_and_the_manifest_says_why(folder):
    said = project.ok(
        *("ppo", "recipe=t.yaml", "name=guarded", "trainer.max_steps=400", "trainer.learning_rate=1e-2"),
        *("method.beta=0", "guards=[{metric: kl, above: 0.5, act: stop, patience: 1}]"),
        cwd=folder,
    )
    made = project.manifest(folder / "runs/guarded/ppo")
    assert "guard: step" in said and "above 0.5" in made["stopped_by_guard"]
    assert made["metrics"]["steps"] < 400


def test_a_guard_takes_the_run_back_to_its_best_checkpoint(folder):
    said = project.ok(
        *("ppo", "recipe=t.yaml", "name=back", "trainer.max_steps=400", "trainer.learning_rate=1e-2", "method.beta=0"),
        *("trainer.save_steps=4", "guards=[{metric: kl, above: 0.5, act: rollback, patience: 2}]"),
        cwd=folder,
    )
    run = folder / "runs/back/ppo"
    best = said.split("rolled back to ")[1].split()[0]
    assert "above 0.5" in project.manifest(run)["stopped_by_guard"]
    kept = project.weights(folder / best)
    final = project.weights(run)
    assert final and all(torch.equal(tensor, kept[name]) for name, tensor in final.items())


@pytest.mark.slow
def test_ptx_rows_are_trained_beside(folder):
    project.ok("ppo", "recipe=t.yaml", "name=ptx", "method.ptx=sft.jsonl", "method.ptx_coef=5", cwd=folder)
    found = [row["ptx_loss"] for row in project.metrics(folder / "runs/ptx/ppo") if "ptx_loss" in row]
    assert found[-1] < found[0]


def test_samples_and_rows_are_counted(folder):
    project.write_rows(folder / "long.jsonl", [{"prompt": "x" * 300}, *({"prompt": f"name {n}"} for n in range(31))])
    said = project.ok(
        *("ppo", "recipe=t.yaml", "name=long", "data.train=long.jsonl", "trainer.max_steps=4", "samples=[name 1]"),
        cwd=folder,
    )
    assert "1 prompt over 84 tokens" in said
    (row,) = [json.loads(line) for line in (folder / "runs/long/ppo/samples.jsonl").read_text().splitlines()]
    assert {"prompt", "before", "after"} <= set(row)


# --- one backbone -------------------------------------------------------------------------------------------------

LORA = ["lora.r=4", "lora.alpha=8", "model.dtype=float32", "trainer.learning_rate=3e-3"]


@pytest.fixture(scope="module")
def reward_adapter(folder):
    """A reward model that is an adapter on the policy's own weights."""
    project.ok("rm", "recipe=t.yaml", "name=lora", *LORA, cwd=folder)
    return folder / "runs/lora/rm"


@pytest.fixture(scope="module")
def adapters(folder, reward_adapter):
    """PPO on one backbone with a reward model that is an adapter on it."""
    project.ok("ppo", "recipe=t.yaml", "name=lora", "reward.path=runs/lora/rm", *LORA, cwd=folder)
    return folder / "runs/lora/ppo"


def test_one_backbone_scores_what_the_reward_model_scores(adapters, folder):
    """The first rollout's rewards, scored again by the reward model itself."""
    from align_cli.model import load, reward_head
    from align_cli.model.lora import peft_config
    from align_cli.recipe.sections import Lora, Model
    from align_cli.rl.backbone import REWARD, SharedBackbone

    named = Model(path=str(folder / "models/tiny"))
    tokenizer = load.tokenizer(named)
    run = folder / "runs/lora/rm"
    config = json.loads((run / "adapter_config.json").read_text())
    base = str(folder / config["base_model_name_or_path"])
    alone = reward_head.load(named, tokenizer, dtype="float32", path=base, heads=1)
    from peft import PeftModel

    alone = PeftModel.from_pretrained(alone, run).eval()
    policy = load.policy(named, tokenizer, dtype="float32")
    shared = SharedBackbone(policy, peft_config(Lora(r=4)), reward=str(run), value=str(run))
    ids = tokenizer("name colours 3 red gold blue", return_tensors="pt")["input_ids"]
    seen, last = torch.ones_like(ids), torch.tensor([[ids.shape[1] - 1]])
    with torch.no_grad(), shared.role(REWARD):
        found = shared.scores(REWARD, ids, seen)[0, -1, 0]
    assert found.item() == pytest.approx(alone(input_ids=ids, attention_mask=seen, ends=last).item(), abs=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_adapters_get_their_own_gradient(adapters, folder, checkpointing):
    """PEFT's two silent traps: one backward for both trains one, and checkpointed blocks run under another adapter."""
    from align_cli.model import load
    from align_cli.model.lora import peft_config
    from align_cli.recipe.sections import Lora, Model
    from align_cli.rl.backbone import POLICY, VALUE, SharedBackbone

    named, run = Model(path=str(folder / "models/tiny")), str(folder / "runs/lora/rm")
    tokenizer = load.tokenizer(named)
    ids = tokenizer("name colours 3 red gold blue", return_tensors="pt")["input_ids"]

    def gradients(*roles, checkpointed=False):
        """Norms of the adapters' gradients after the losses of these roles, one after the other."""
        torch.manual_seed(0)
        policy = load.policy(named, tokenizer, dtype="float32")
        shared = SharedBackbone(policy, peft_config(Lora(r=4)), reward=run, value=run)
        for name, parameter in shared.model.named_parameters():
            if f"lora_B.{POLICY}" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        if checkpointed:
            shared.model.gradient_checkpointing_enable()
            shared.model.enable_input_require_grads()
        shared.model.train()
        if POLICY in roles:
            shared.model(input_ids=ids, labels=ids).loss.backward()
        if VALUE in roles:
            with shared.role(VALUE):
                shared.scores(VALUE, ids, torch.ones_like(ids)).square().mean().backward()
        found = {name: p.grad.norm() for name, p in shared.model.named_parameters() if p.grad is not None}
        assert not any(".reward" in name for name in found)
        return {role: float(sum(norm for name, norm in found.items() if f".{role}." in name)) for role in roles}

    both = gradients(POLICY, VALUE, checkpointed=checkpointing)
    for role in (POLICY, VALUE):
        assert both[role] == pytest.approx(gradients(role)[role], rel=1e-5), role
        assert both[role] > 0


def test_policy_and_value_are_adapters_that_plain_libraries_read(adapters, folder, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    monkeypatch.chdir(folder)
    policy = project.weights(adapters)
    assert all("lora_" in name and "value" not in name and "reward" not in name for name in policy)
    assert any(tensor.abs().max() > 0 for name, tensor in policy.items() if "lora_B" in name)
    AutoModelForCausalLM.from_pretrained(adapters)
    value, start = project.weights(adapters / "value"), project.weights(folder / "runs/lora/rm")
    assert set(value) == set(start)
    assert all(not torch.equal(value[name], start[name]) for name in start if "lora_B" in name or "score" in name)
    AutoModelForSequenceClassification.from_pretrained(adapters / "value", num_labels=1)


def test_the_reference_is_the_backbone_with_its_adapters_off(adapters):
    rows = [row["kl"] for row in project.metrics(adapters) if "kl" in row]
    assert rows[0] == pytest.approx(0.0, abs=1e-4) and rows[-1] > 1e-3


@pytest.mark.parametrize("zero", [pytest.param("none", marks=SLOW), "zero2", pytest.param("zero3", marks=SLOW)])
def test_two_ranks_are_one_process_on_one_backbone(adapters, folder, zero):
    settings = ["reward.path=runs/lora/rm", *LORA, "trainer.max_steps=4"]
    one = folder / "runs/lora-one/ppo"
    if not (one / "manifest.json").is_file():
        project.ok("ppo", "recipe=t.yaml", "name=lora-one", *settings, cwd=folder)
    project.ok(
        *("ppo", "recipe=t.yaml", f"name=lora-{zero}", *settings, "launch.num_gpus=2", f"zero={zero}"),
        "trainer.per_device_train_batch_size=4",
        cwd=folder,
    )
    two = folder / f"runs/lora-{zero}/ppo"
    for name in ("reward", "kl", "loss", "value_loss"):
        expected, found = ([row[name] for row in project.metrics(run) if name in row] for run in (one, two))
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-4), name
    for place in ("", "value"):
        expected = project.weights(one / place)
        for name, tensor in project.weights(two / place).items():
            assert torch.allclose(tensor, expected[name], atol=2e-3), name


@pytest.mark.slow
def test_a_killed_run_on_one_backbone_ends_the_same(adapters, folder):
    settings = ["reward.path=runs/lora/rm", *LORA, "trainer.save_steps=4", "trainer.max_steps=16"]
    project.ok("ppo", "recipe=t.yaml", "name=lora-calm", *settings, cwd=folder)
    run = folder / "runs/lora-killed/ppo"
    project.kill_after_a_checkpoint("ppo", "recipe=t.yaml", "name=lora-killed", *settings, run=run, cwd=folder)
    assert "resuming from step" in project.ok("ppo", "recipe=t.yaml", "name=lora-killed", *settings, cwd=folder)
    for place in ("", "value"):
        calm = project.weights(folder / "runs/lora-calm/ppo" / place)
        assert all(torch.equal(tensor, calm[name]) for name, tensor in project.weights(run / place).items()), place


def test_a_reward_model_on_another_base_cannot_share(adapters, folder):
    done = project.align("ppo", "recipe=t.yaml", "name=bad", *LORA, cwd=folder)
    assert done.returncode == 2 and "is not an adapter, so it cannot share" in done.stderr
    import tiny

    tiny.model(folder / "models/other", seed=5)
    words = ["reward.path=runs/lora/rm", "model.path=models/other", *LORA]
    done = project.align("ppo", "recipe=t.yaml", "name=bad", *words, cwd=folder)
    assert done.returncode == 2 and "is an adapter on models/tiny, not on models/other" in done.stderr


# --- a full policy, and a reward model that is an adapter -----------------------------------------------------------


def classifier(folder, run):
    """The reward model as plain libraries load it, on its base."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(folder / "models/tiny", num_labels=1)
    return PeftModel.from_pretrained(base, run).eval()


def test_the_value_function_is_the_whole_reward_model_and_trains(folder, reward_adapter, monkeypatch):
    from align_cli.model import load
    from align_cli.rl import value

    monkeypatch.chdir(folder)
    job = project.job("ppo", "name=whole", "reward.path=runs/lora/rm")
    made = value.model(job, load.tokenizer(job.recipe.model))
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in made.parameters())
    ids = torch.tensor([[5, 9, 33, 70, 2]])
    expected = classifier(folder, reward_adapter)(input_ids=ids).logits
    torch.testing.assert_close(made.eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    base = project.weights(folder / "models/tiny")
    assert set(base) - {"lm_head.weight"} | {"score.weight"} == set(made.state_dict())


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=SLOW)])
def test_a_full_policy_with_a_reward_adapter_saves_a_plain_value_function(folder, reward_adapter, ranks):
    from transformers import AutoModelForSequenceClassification

    words = ["ppo", "recipe=t.yaml", f"name=whole{ranks}", "reward.path=runs/lora/rm", "trainer.max_steps=4"]
    if ranks > 1:
        words += [f"launch.num_gpus={ranks}", "zero=zero3", "trainer.per_device_train_batch_size=4"]
    project.ok(*words, cwd=folder)
    run = folder / f"runs/whole{ranks}/ppo"
    value = AutoModelForSequenceClassification.from_pretrained(run / "value")
    assert value.num_labels == 1
    start = classifier(folder, reward_adapter).merge_and_unload().state_dict()
    moved = {name for name, tensor in value.state_dict().items() if not torch.equal(tensor, start[name])}
    assert "score.weight" in moved and len(moved) > 5
    # Adam moves a weight by about the learning rate per step
    assert all((tensor - start[name]).abs().max() < 0.02 for name, tensor in value.state_dict().items())
    first = project.metrics(run)[0]
    assert first["value_loss"] > 0 and first["kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_a_full_policy_with_a_reward_adapter_resumes(folder, reward_adapter):
    settings = ["reward.path=runs/lora/rm", "trainer.save_steps=4", "trainer.max_steps=8"]
    project.ok("ppo", "recipe=t.yaml", "name=whole-calm", *settings, cwd=folder)
    run = folder / "runs/whole-killed/ppo"
    project.kill_after_a_checkpoint("ppo", "recipe=t.yaml", "name=whole-killed", *settings, run=run, cwd=folder)
    assert "resuming from step" in project.ok("ppo", "recipe=t.yaml", "name=whole-killed", *settings, cwd=folder)
    for place in ("", "value"):
        calm = project.weights(folder / "runs/whole-calm/ppo" / place)
        assert all(torch.equal(tensor, calm[name]) for name, tensor in project.weights(run / place).items()), place


# --- the value function takes no part in rollouts -------------------------------------------------------------------

PROBE = """import json, os
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

enter = GatheredParameters.__enter__


def counted(self):
    if self.enabled:
        with open(f"gathered-{os.environ['RANK']}.jsonl", "a") as file:
            file.write(json.dumps(sum(parameter.ds_numel for parameter in self.params)) + "\\n")
    return enter(self)


GatheredParameters.__enter__ = counted


def rewards(prompts, responses):
    return [float(len(response)) for response in responses]
"""
"""A reward function that also writes down how many numbers each rank gathers."""


def test_rollouts_gather_the_policy_and_nothing_else(folder):
    (folder / "probe.py").write_text(PROBE)
    project.ok(
        *("ppo", "recipe=t.yaml", "name=gathered", "launch.num_gpus=2", "zero=zero3", "trainer.max_steps=4"),
        *("trainer.per_device_train_batch_size=4", "reward={path: null, python: 'probe:rewards'}", "samples=[name 1]"),
        "--allow-code",
        cwd=folder,
    )
    policy = sum(tensor.numel() for tensor in project.weights(folder / "models/tiny").values())
    for rank in (0, 1):
        gathered = [int(line) for line in (folder / f"gathered-{rank}.jsonl").read_text().splitlines()]
        # a rollout for every four updates, and the answers to the samples before and after
        assert [size for size in gathered if size >= policy] == [policy] * gathered.count(policy)
        assert gathered.count(policy) >= 3
    value = project.weights(folder / "runs/gathered/ppo/value")
    # its hooks are there again: it trains
    assert value["score.weight"].abs().max() > 0
