"""What models a stage takes and leaves: adapters as parents, merging, references, packing, streamed and real rows."""

import json
from pathlib import Path

import project
import pytest
import torch
from project import align, losses, manifest, metrics, ok, weights

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
LORA = "lora={r: 4, alpha: 8}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return project.build(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def adapter(home):
    ok("sft", "recipe=t", "run_dir=runs/lora/sft", LORA, "model.dtype=float32", cwd=home)
    return home / "runs" / "lora" / "sft"


def logits(model, ids=((5, 9, 33, 70, 2),)):
    with torch.no_grad():
        return model.eval()(torch.tensor(ids)).logits


def load(path, **kwargs):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **kwargs)


def test_an_adapter_run_learns_and_names_its_base(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "models/tiny"
    assert json.loads((adapter / "base.json").read_text())["fingerprint"]
    assert losses(adapter)[-1] < losses(adapter)[0]
    moved = [tensor for name, tensor in weights(adapter).items() if "lora_B" in name]
    assert moved and all(tensor.abs().sum() > 0 for tensor in moved)


def test_merge_gives_the_logits_of_base_and_adapter(adapter, home, monkeypatch):
    from peft import PeftModel

    ok("merge", "runs/lora/sft", cwd=home)
    monkeypatch.chdir(home)
    with_adapter = logits(PeftModel.from_pretrained(load("models/tiny"), str(adapter)))
    torch.testing.assert_close(logits(load("runs/lora/sft-merged")), with_adapter, rtol=1e-4, atol=1e-4)
    assert (with_adapter - logits(load("models/tiny"))).abs().max() > 1e-3
    again = align("merge", "runs/lora/sft", cwd=home)
    assert again.returncode == 2 and "exists already" in again.stderr
    whole = align("merge", "models/tiny", cwd=home)
    assert whole.returncode == 2 and "whole model" in whole.stderr


@pytest.mark.parametrize("extra", [(), (LORA,), ("zero=zero3", "launch.num_gpus=2")])
def test_dpo_from_an_adapter_starts_at_its_merged_model_not_at_its_base(adapter, home, extra, monkeypatch):
    name = f"from-adapter-{len(extra)}"
    ok(
        "dpo",
        "recipe=t",
        "model.path=runs/lora/sft",
        "model.dtype=float32",
        f"run_dir=runs/{name}/dpo",
        *extra,
        cwd=home,
    )
    run = home / "runs" / name / "dpo"
    first = metrics(run)[0]
    # a reference taken from the adapter's base would not give ln 2 here, nor a margin of 0
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert manifest(run)["parents"][0]["path"] == "runs/lora/sft"
    if extra == (LORA,):
        from peft import PeftModel

        monkeypatch.chdir(home)
        base = json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert base == f"runs/{name}/dpo/base"
        assert logits(PeftModel.from_pretrained(load(base), str(run))).isfinite().all()
        ok("lineage", f"runs/{name}/dpo", cwd=home)
    else:
        assert not (run / "base").exists()
        assert logits(load(run)).isfinite().all()


def test_lora_is_the_same_on_two_ranks(home, adapter):
    ok(
        *("sft", "recipe=t", "run_dir=runs/lora-zero3/sft", LORA, "model.dtype=float32"),
        *("launch.num_gpus=2", "zero=zero3"),
        cwd=home,
    )
    run = home / "runs" / "lora-zero3" / "sft"
    assert losses(run) == pytest.approx(losses(adapter), rel=1e-3)
    other = weights(run)
    for name, tensor in weights(adapter).items():
        torch.testing.assert_close(other[name], tensor, rtol=5e-2, atol=2e-3)


def test_precomputed_reference_gives_the_same_run_and_serves_the_next(home):
    ok("dpo", "recipe=t", "run_dir=runs/plain/dpo", cwd=home)
    cache = home / "runs" / ".cache" / "reference"
    words = ("dpo", "recipe=t", "method.precompute_reference=true")
    ok(*words, "run_dir=runs/precomputed/dpo", cwd=home)
    (file,) = cache.glob("*.safetensors")
    written = file.stat().st_mtime_ns
    plain = losses(home / "runs/plain/dpo")
    assert losses(home / "runs/precomputed/dpo") == pytest.approx(plain, rel=1e-4)
    ok(*words, "method.beta=0.3", "run_dir=runs/other-beta/dpo", cwd=home)
    assert [entry.stat().st_mtime_ns for entry in cache.glob("*.safetensors")] == [written]
    ok(*words, "data.max_length=40", "run_dir=runs/other-data/dpo", cwd=home)
    assert len(list(cache.glob("*.safetensors"))) == 2
    ok(*words, "run_dir=runs/ranks/dpo", "launch.num_gpus=2", "zero=zero3", cwd=home)
    assert losses(home / "runs/ranks/dpo") == pytest.approx(plain, rel=1e-3)


def test_another_reference_is_used(home, adapter):
    project.tiny.model(home / "models" / "other", seed=5)
    ok("dpo", "recipe=t", "reference.path=models/other", "run_dir=runs/reference/dpo", "trainer.max_steps=1", cwd=home)
    run = home / "runs" / "reference" / "dpo"
    assert abs(metrics(run)[0]["rewards/chosen"]) > 1e-3
    assert [entry["role"] for entry in manifest(run)["parents"]] == ["policy", "reference"]


def test_packed_rows_do_not_see_each_other(home):
    """One optimizer step over all 32 rows: packed into few sequences or one by one, the loss is the same."""
    words = ("trainer.max_steps=1", "trainer.per_device_train_batch_size=32", "data.batch_size=32")
    ok("sft", "recipe=t", "run_dir=runs/unpacked/sft", *words, cwd=home)
    # 32 short rows fit into fewer than 32 sequences of 128; a step takes all of them
    ok("sft", "recipe=t", "run_dir=runs/packed/sft", "method.packing=true", *words, cwd=home)
    plain, packed = (losses(home / "runs" / name / "sft")[0] for name in ("unpacked", "packed"))
    assert packed == pytest.approx(plain, rel=1e-4)
    sequences = metrics(home / "runs/packed/sft")[0]["epoch"]
    assert sequences == 1.0


def test_streamed_rows_train(home):
    said = ok("sft", "recipe=t", "run_dir=runs/streamed/sft", "data.streaming=true", "data.eval=0.2", cwd=home)
    assert losses(home / "runs/streamed/sft")[-1] < losses(home / "runs/streamed/sft")[0]
    (data,) = manifest(home / "runs/streamed/sft")["data"]
    assert data["rows_read"] == 32, said
    endless = align("sft", "recipe=t", "run_dir=runs/x/sft", "data.streaming=true", "trainer.max_steps=-1", cwd=home)
    assert endless.returncode == 2 and "trainer.max_steps" in endless.stderr


def test_a_base_model_gets_a_template_and_a_pad_token_that_is_not_eos(home):
    project.tiny.model(home / "models" / "base", template=None, pad_token="<|im_end|>")
    refused = align("sft", "recipe=t", "model.path=models/base", cwd=home)
    assert refused.returncode == 2 and "model.chat_template" in refused.stderr
    ok("sft", "recipe=t", "model.path=models/base", "model.chat_template=zephyr", "run_dir=runs/base/sft", cwd=home)
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(home / "runs/base/sft")
    assert saved.chat_template and saved.pad_token_id != saved.eos_token_id
    config = json.loads((home / "runs/base/sft/config.json").read_text())
    assert config["pad_token_id"] == saved.pad_token_id


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_embeddings_that_a_template_widened_are_sharded_like_the_others(home, stage):
    """Policy and reference get rows for the template's tokens before ZeRO-3 shards them; all rows are saved."""
    project.tiny.without_markers(home / "models" / "unmarked")
    words = (stage, "recipe=t", "model.path=models/unmarked", "model.chat_template=chatml")
    ok(*words, f"run_dir=runs/widened/{stage}", cwd=home)
    ok(*words, f"run_dir=runs/widened-zero3/{stage}", "launch.num_gpus=2", "zero=zero3", cwd=home)
    one, two = (home / "runs" / name / stage for name in ("widened", "widened-zero3"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    sizes = {run: load(run).get_input_embeddings().weight.shape[0] for run in (one, two)}
    assert sizes[one] == sizes[two] > load(home / "models/unmarked").get_input_embeddings().weight.shape[0]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize(
    ("stage", "file", "rows", "used"),
    [("dpo", "hh_harmless_pairs.jsonl", 800, 798), ("sft", "oasst_sft.jsonl", 207, 207)],
)
def test_published_files_train_as_they_are(home, stage, file, rows, used):
    # a byte a token: long rows, but they are the real ones
    said = ok(
        *(stage, "recipe=t", f"data.train={SHARED / file}", f"run_dir=runs/real/{stage}"),
        *("trainer.max_steps=2", "data.max_length=2048", "data.max_dropped=0.5"),
        cwd=home,
    )
    (data,) = manifest(home / "runs" / "real" / stage)["data"]
    assert data["rows_read"] == rows
    assert data["rows_used"] + sum(data["dropped"].values()) == rows
    assert data["rows_used"] <= used and f"{rows} rows read" in said
    if stage == "dpo":
        assert data["dropped"]["empty response"] == 2 and "empty response, first at" in said
