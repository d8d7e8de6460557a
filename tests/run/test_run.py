"""Run directories, manifests, batches and launch lines."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from align_cli.errors import LaunchError, RecipeError, UpstreamError
from align_cli.model import kind, memory, templates
from align_cli.model.zero import deepspeed_config
from align_cli.recipe.sections import Launch, Zero
from align_cli.report import lineage
from align_cli.run import batch, devices, launch, manifest
from align_cli.run.directory import COMPLETE, RunDirectory, trim_metrics


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def arithmetic(total=None, ranks=1, **trainer):
    recipe = SimpleNamespace(trainer=trainer, data=SimpleNamespace(batch_size=total))
    made = batch.arithmetic("dpo", recipe, ranks)
    return made.per_device, made.accumulation, made.total


def test_the_global_batch_stays_what_it_is_on_any_number_of_ranks():
    per = {"per_device_train_batch_size": 8}
    assert arithmetic(128, 8, **per) == (8, 2, 128)
    assert arithmetic(128, 1, **per) == (8, 16, 128)
    assert arithmetic(None, 2, gradient_accumulation_steps=4, **per) == (8, 4, 64)
    assert arithmetic(12, 2) == (6, 1, 12)
    with pytest.raises(RecipeError, match="126 or 128"):
        arithmetic(127, 2, per_device_train_batch_size=1)
    with pytest.raises(RecipeError, match=r"8 × accumulation 3 × 2 ranks = 48"):
        arithmetic(128, 2, gradient_accumulation_steps=3, **per)


def test_hostfiles(here):
    file = here / "hosts"
    file.write_text("# two\none slots=4\ntwo slots=8\n")
    assert devices.hosts("hosts") == {"one": 4, "two": 8}
    assert devices.world_size(Launch(hostfile="hosts")) == 12
    assert devices.world_size(Launch(hostfile="hosts", num_nodes=1)) == 4
    assert "needs" not in str(devices.problems(Launch(hostfile="hosts")))
    file.write_text("one slot=4\none slots=1\none slots=2\n")
    with pytest.raises(LaunchError) as caught:
        devices.hosts("hosts")
    assert [line.split(": ")[0] for line in caught.value.lines] == ["hosts:1", "hosts:3"]


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(devices, "gpus", lambda: 2)
    assert devices.problems(Launch(num_gpus=2)) == []
    (line,) = devices.problems(Launch(num_gpus=3))
    assert "this machine has 2; set launch.num_gpus=2" in line
    monkeypatch.setattr(devices, "gpus", lambda: 0)
    assert devices.problems(Launch(num_gpus=3)) == []


def test_launch_lines(here):
    line = launch.command("dpo", here, Launch(num_gpus=4, master_port=1))
    assert line[:8] == [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "4",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
    ]
    assert line[-4:] == ["--module", "align_cli.run.worker", "dpo", str(here)]
    many = launch.command("dpo", here, Launch(hostfile="h", node_rank=1, master_addr="a", master_port=5))
    assert " ".join(many[3:11]) == "--hostfile h --master_port 5 --master_addr a --no_ssh --node_rank"
    assert "--num_gpus" not in many


def test_ranks_of_an_srun_step_find_each_other(here, monkeypatch):
    for name, value in {"STEP_NUM_TASKS": "4", "PROCID": "3", "LOCALID": "1", "LAUNCH_NODE_IPADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setattr("os.environ", dict(__import__("os").environ))
    assert launch.called_by_launcher()
    found = __import__("os").environ
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("3", "1", "4")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "20077")


def test_states_of_a_run_directory(here):
    run = RunDirectory("runs/a/sft")
    assert run.state() == "absent"
    run.path.mkdir(parents=True)
    (run.path / ".lock").touch()
    assert run.state() == "absent"
    (run.path / "notes.txt").touch()
    assert run.state() == "foreign"
    run.recipe.write_text("name: a\n")
    assert run.state() == "unfinished"
    run.manifest.write_text('{"status": "complete"}')
    assert run.state() == "finished"
    assert run.set_aside().name == "sft.old-1" and run.state() == "absent"


def test_only_whole_checkpoints_count(here):
    run = RunDirectory("r")
    for step in (8, 16, 100):
        (run.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    assert run.latest_checkpoint() is None
    for step in (8, 16):
        (run.checkpoints / f"checkpoint-{step}" / COMPLETE).touch()
    assert run.latest_checkpoint().name == "checkpoint-16"
    run.drop_half_written()
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == ["checkpoint-16", "checkpoint-8"]


def test_one_process_a_run(here):
    code = "from align_cli.run.directory import RunDirectory\nwith RunDirectory('r').locked(): pass"
    with RunDirectory("r").locked():
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another align" in other.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_metrics_after_the_checkpoint_and_a_torn_line_are_forgotten(here):
    file = here / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    trim_metrics(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def made(path, parents=(), **extra):
    run = RunDirectory(path)
    run.path.mkdir(parents=True)
    run.recipe.write_text("name: a\n")
    (run.path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    given = {"stage": "sft", "name": "a", "seed": 1, "data": [], "metrics": {"loss": 0.5}}
    given |= {"world_size": 1, "zero_stage": 0, "started": "now", "parents": list(parents)}
    return manifest.write(run, **given | extra)


def test_a_changed_parent_is_found_and_drawn(here):
    made("runs/a/sft")
    made("runs/a/dpo", [manifest.parent("policy", "runs/a/sft")], stage="dpo")
    console = Console(record=True, width=120)
    assert lineage.show("runs/a/dpo", console)
    said = console.export_text()
    assert said.index("runs/a/dpo") < said.index("policy    runs/a/sft") and "loss 0.5" in said
    assert manifest.changed_parents(manifest.read("runs/a/dpo")) == []
    file = RunDirectory("runs/a/sft").manifest
    file.write_text(file.read_text().replace("0.5", "0.6"))
    assert manifest.changed_parents(manifest.read("runs/a/dpo")) == ["policy runs/a/sft has changed since"]
    console = Console(record=True, width=120)
    assert not lineage.show("runs/a/dpo", console)
    assert "stale: runs/a/dpo: its policy runs/a/sft has changed since" in console.export_text()
    RunDirectory("runs/a/sft").set_aside()
    assert manifest.changed_parents(manifest.read("runs/a/dpo")) == ["policy runs/a/sft is gone"]
    with pytest.raises(UpstreamError):
        lineage.show("runs/none", console)


def test_what_differs_and_what_is_missing(here):
    old = {"seed": 1, "force": False, "method": {"beta": 0.1}, "launch": {"num_gpus": 1}}
    new = {"seed": 1, "force": True, "method": {"beta": 0.2}, "launch": {"num_gpus": 8}}
    assert manifest.differing_keys(old, new) == ["method.beta 0.1 → 0.2"]
    found = made("r")
    assert manifest.missing_files(RunDirectory("r"), found) == []
    (here / "r" / "model.safetensors").unlink()
    assert manifest.missing_files(RunDirectory("r"), found) == ["model.safetensors is gone or was changed"]


def test_what_a_directory_holds(here):
    def folder(name, config=None, adapter=None, files=()):
        path = here / "models" / name
        path.mkdir(parents=True)
        if config:
            (path / "config.json").write_text(json.dumps({"architectures": [config]}))
        if adapter:
            (path / "adapter_config.json").write_text(json.dumps(adapter))
        for file in files:
            (path / file).touch()
        return kind.look(f"models/{name}")

    assert folder("lm", "LlamaForCausalLM", files=["model.safetensors"]).kind == "causal-lm"
    assert folder("rm", "LlamaForSequenceClassification", files=["model.safetensors"]).kind == "reward-model"
    assert "pytorch_model.bin but no safetensors" in folder("old", "X", files=["pytorch_model.bin"]).finding
    held = folder("ad", adapter={"base_model_name_or_path": "models/lm", "task_type": "SEQ_CLS"})
    assert (held.kind, held.base, held.reward) == ("adapter", "models/lm", True)
    assert kind.look("models/nope").kind == "missing" and kind.look("org/name").kind == "hub"
    assert kind.look("./org/name").kind == "missing"


def test_parameters_and_fingerprint_of_weights(here):
    import torch
    from safetensors.torch import save_file

    (here / "m").mkdir()
    (here / "m" / "config.json").write_text("{}")
    weights = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
    save_file(weights, here / "m" / "model.safetensors")
    before = kind.fingerprint("m")
    assert kind.parameters("m") == 17 and kind.fingerprint("m") == before
    weights["b"][4] = 1e-3
    save_file(weights, here / "m" / "model.safetensors")
    assert kind.fingerprint("m") != before


def test_memory_is_sharded_as_in_the_zero_paper():
    size = memory.Sizes(parameters=1_000_000)

    def plan(stage, **more):
        given = {"dtype": "bfloat16", "mixed": True, "trainable": 1_000_000, "world_size": 4, "frozen_copies": 1}
        given |= {"offload_optimizer": False, "offload_param": False, "rows": 1, "tokens": 1, "checkpointing": True}
        return {part.name: part.bytes for part in memory.plan(size, zero_stage=stage, **given | more)}

    # bfloat16 weights and gradients 2 bytes, Adam 8, the float32 master copy 4
    assert plan(0) == {"weights": 2e6, "gradients": 2e6, "optimizer": 12e6, "reference": 2e6}
    assert plan(1)["optimizer"] == 3e6 and plan(1)["gradients"] == 2e6
    assert plan(2)["gradients"] == 5e5 and plan(2)["weights"] == 2e6
    assert plan(3) == {"weights": 5e5, "gradients": 5e5, "optimizer": 3e6, "reference": 5e5}
    assert plan(3, offload_optimizer=True)["optimizer"] == 0


def test_zero_configs():
    assert deepspeed_config(Zero()) is None
    config = deepspeed_config(Zero(stage=3, offload_param=True, config={"zero_optimization": {"x": 1}, "y": 2}))
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert config["zero_optimization"]["x"] == 1 and config["y"] == 2
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert "train_batch_size" not in config


def test_templates_close_turns_with_eos():
    from jinja2 import Environment

    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    for name, text in templates.BUILT_IN.items():
        given = {"messages": talk, "eos_token": "</s>", "bos_token": ""}
        said = Environment().from_string(text).render(**given).rstrip()
        asked = Environment().from_string(text).render(**given | {"messages": talk[:1], "add_generation_prompt": True})
        assert said.endswith("</s>" if name != "chatml" else "<|im_end|>"), name
        assert said.startswith(asked), name
