"""What `align check` prints."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from align_cli import driver
from align_cli.report import plan as report
from align_cli.run import preflight

HEADER = json.dumps({"a": {"dtype": "F32", "shape": [1 << 14, 1 << 14], "data_offsets": [0, 1 << 30]}}).encode()
PAIRS = [{"prompt": f"question {n}", "chosen": "a", "rejected": "b"} for n in range(20)]


def write(file, text):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)


def rows(file, lines):
    write(file, "".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def project(here, monkeypatch):
    monkeypatch.setattr(driver, "present", tuple)
    write("models/x/config.json", '{"architectures": ["LlamaForCausalLM"]}')
    write("models/x/chat_template.jinja", "x")
    Path("models/x/model.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER)
    for stage in ("sft", "dpo"):
        write(f"recipes/{stage}/t.yaml", f"name: t\nmodel: {{ path: models/x }}\ndata: {{ train: {stage}.jsonl }}\n")
    rows("dpo.jsonl", PAIRS)
    return here


def printed(*words):
    """Label -> text of its lines."""
    console = Console(record=True, width=160, soft_wrap=True, file=io.StringIO())
    report.show(preflight.load("dpo", ["recipe=t", *words], starting=False), console)
    head, *lines = console.export_text().splitlines()
    found, label = {"": head.rstrip()}, ""
    for line in lines:
        width = 12
        label = line[:width].strip() or label
        found[label] = f"{found.get(label, '')}\n{line[width:].strip()}".strip()
    return found


def test_a_line_a_subject(project):
    said = printed("data.batch_size=8", "launch.num_gpus=2", "zero=zero2", "data.eval=0.1", "lora.r=4")
    assert said[""] == "align dpo recipe=recipes/dpo/t.yaml"
    assert said["model"] == "models/x · 0.268 B parameters"
    assert said["precision"] == "float32 weights, float32 products (CPU without bf16 units)"
    assert said["lora"] == "r 4, alpha 16, targets all-linear"
    assert said["reference"] == "the initial policy"
    assert "dpo.jsonl (preference): 20 rows read, 20 used, 0 dropped" in said["data.eval"]
    assert said["method"].startswith("loss sigmoid, beta 0.1, label_smoothing 0, pairs best-worst")
    assert said["batch"] == "8 pairs per step = 4 per device × 1 accumulated × 2 ranks"
    assert said["steps"] == "about 9"  # 18 of 20 rows are trained on: 3 steps, 3 epochs
    assert said["ranks"] == "2 ranks on the CPU, ZeRO stage 2"
    assert said["run"] == "runs/t/dpo (absent)"
    assert "needs" not in said


def test_ranks_name_their_devices(project, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    h100 = [driver.Gpu(at, "NVIDIA H100 80GB HBM3", 80 << 30, f"GPU-{at}", (9, 0)) for at in range(8)]
    assert printed()["ranks"] == "1 rank on the CPU, ZeRO stage 0"
    monkeypatch.setattr(driver, "unsupported", lambda: tuple(h100))
    unused = "1 rank on the CPU; torch is not built for 8 × NVIDIA H100 80GB HBM3, ZeRO stage 0"
    assert printed()["ranks"] == unused
    monkeypatch.setattr(driver, "present", lambda: tuple(h100))
    one = "1 rank on NVIDIA H100 80GB HBM3, 1 of 8 GPUs (launch.num_gpus=auto uses all), ZeRO stage 0"
    assert printed()["ranks"] == one
    assert printed("launch.num_gpus=auto")["ranks"] == "8 ranks on 8 × NVIDIA H100 80GB HBM3, ZeRO stage 0"
    write("hosts", "a slots=8\nb slots=8\n")
    assert printed("launch.hostfile=hosts")["ranks"] == "16 ranks over hosts, ZeRO stage 0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert printed()["ranks"] == "1 rank on NVIDIA H100 80GB HBM3, ZeRO stage 0"


def test_memory_in_gib(project):
    # 2^28 parameters in float32: 1 GiB of weights, 1 of gradients, 2 of Adam's moments, 1 of the reference
    expected = "≈ 5.0 GiB per rank (weights 1.00, gradients 1.00, optimizer 2.00, reference 1.00)"
    assert printed()["memory"] == expected


def test_what_must_run_before(project):
    said = printed("model.path=${stage:sft}", "model.chat_template=chatml")
    assert said["needs"] == "`align sft recipe=t.yaml`"
    assert said["model"].startswith("runs/t/sft  (not created yet) · 0.268 B parameters")
    said = printed("model.path=./runs/t/sft/", "model.chat_template=chatml")
    assert said["needs"] == "`align sft recipe=t.yaml`"
    assert said["model"].startswith("./runs/t/sft/  (not created yet) · 0.268 B parameters")


def test_another_reference_and_weighted_sources(project):
    said = printed("data.train=[dpo.jsonl,{path: dpo.jsonl,weight: 0.5}]", "reference.path=models/x")
    assert said["reference"] == "models/x"
    assert "dpo.jsonl × 0.5" in said["data.train"]


def test_steps_that_cannot_be_known(project):
    assert printed("data.train=org/pairs")["steps"] == "unknown until the rows are read"


def test_a_model_that_is_there_is_not_still_to_be_made(project):
    said = printed("reference.path=${stage:sft}")
    assert said["needs"] == "`align sft recipe=t.yaml`" and said["model"].startswith("models/x · ")


def test_a_source_that_is_named_twice_has_two_lines(project):
    said = printed("data.train=[dpo.jsonl,dpo.jsonl]", "data.batch_size=8", "trainer.num_train_epochs=1")
    assert said["data.train"].count("20 rows read, 20 used, 0 dropped") == 2
    assert said["steps"] == "5"


def test_dropped_rows_are_counted_with_their_first(project):
    rows("dpo.jsonl", [*PAIRS, PAIRS[0] | {"rejected": "a"}])
    said = printed("data.max_dropped=0.5")
    assert "21 rows read, 20 used, 1 dropped" in said["data.train"]
    assert "1 chosen equals rejected, first at dpo.jsonl:21: question 0" in said["data.train"]


def test_a_finished_run_shows_as_one(project):
    write("runs/t/dpo/recipe.yaml", "name: t\n")
    assert printed()["run"] == "runs/t/dpo (unfinished)"
    write("runs/t/dpo/manifest.json", '{"status": "complete"}')
    assert printed()["run"] == "runs/t/dpo (finished)"


def test_brackets_in_rows_are_letters(project):
    rows("dpo.jsonl", [*PAIRS, {"prompt": "[INST] hi [/INST]", "chosen": "a", "rejected": "a"}])
    assert "[INST] hi [/INST]" in printed()["data.train"]


def test_brackets_in_names_are_letters(project):
    rows("dpo[en].jsonl", PAIRS)
    write("recipes/dpo/b.yaml", "name: t\nmodel: { path: models/x }\ndata: { train: 'dpo[en].jsonl' }\n")
    console = Console(record=True, width=160, file=io.StringIO())
    report.show(preflight.load("dpo", ["recipe=b"], starting=False), console)
    assert "dpo[en].jsonl" in console.export_text()


def test_files_in_gib(project):
    # 2^28 parameters in float32: 1 GiB of weights, 2 of Adam's moments
    assert printed()["disk"].startswith("≈ 3.0 GiB a checkpoint, at most 3 at a time; model 1.0 GiB; ")
