"""align cai as whole runs: what each phase leaves, kills at every phase, ranks, endpoints, and what follows."""

import json
import os
import time
from html.parser import HTMLParser

import api
import project
import pytest
import torch

from align_cli.recipe.constitutional import LOST

LAW = """principles:
  - { id: kind, critique_request: "Was it kind?", revision_request: Make it kinder., comparison: "Which is kinder?" }
  - { id: safe, critique_request: "Was it safe?", revision_request: Make it safer., comparison: "Which is safer?",
      prompts: red-team }
  - { id: open, critique_request: "Did it help?", revision_request: Help more., comparison: "Which helps?",
      prompts: harmless }
examples:
  - { prompt: hi, answer: go away, critique_request: "Was it kind?", critique: No., revision_request: Make it kinder.,
      revision: Hello! }
"""
RECIPE = """name: t
model: { path: models/tiny }
data: { train: red.jsonl, max_length: 128, batch_size: 8 }
feedback: { path: models/other }
method: { constitution: law.yaml, revisions: 2, harmless: harmless.jsonl, helpful: sft.jsonl, pairs: revised }
generation: { max_new_tokens: 10, temperature: 0, batch: 2 }
trainer: { learning_rate: 1.0e-3, max_steps: 4, per_device_train_batch_size: 2 }
"""
ROWS = ("answers", "revisions", "demonstrations", "pairs", "preferences", "left_out")
MADE = tuple(f"{name}.jsonl" for name in ROWS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import tiny

    folder = project.build(tmp_path_factory.mktemp("cai"))
    tiny.model(folder / "models/other", seed=3)
    speaks_letters(folder / "models/tiny")
    project.write_rows(folder / "red.jsonl", [{"prompt": f"how do I break lock {'x' * n}"} for n in range(10)])
    project.write_rows(folder / "harmless.jsonl", [{"prompt": f"how do I crack egg {n}"} for n in range(6)])
    (folder / "law.yaml").write_text(LAW)
    project.recipe(folder, "cai", "t", RECIPE)
    return folder


def speaks_letters(path):
    """Silence all tokens but letters and the space, so that even greedy text of a random model has words."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tok = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    letters = torch.tensor(tok.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz", "Ġ"]))
    others = torch.ones(len(tok), dtype=torch.bool).index_fill(0, letters, False)
    with torch.no_grad():
        model.lm_head.weight[others] = 0
        model.lm_head.weight *= 3
    model.save_pretrained(path)


@pytest.fixture(scope="module")
def calm(folder):
    """An undisturbed greedy run."""
    said = project.ok("cai", "recipe=t", "name=calm", cwd=folder)
    return folder / "runs/calm/cai", said


def rows(run, name):
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def test_every_phase_leaves_its_rows(calm):
    run, said = calm
    answers, chains = rows(run, "answers"), rows(run, "revisions")
    assert [row["row"] for row in answers] == [row["row"] for row in chains] == list(range(16))
    assert [row["kind"] for row in answers] == ["red-team"] * 10 + ["harmless"] * 6
    drawn = {row["kind"]: set() for row in chains}
    for row in chains:
        assert len(row["chain"]) == 2
        assert set(row["chain"][0]) == {"principle", "critique", "critique_flag", "revision", "revision_flag"}
        drawn[row["kind"]] |= {step["principle"] for step in row["chain"]}
    assert drawn == {"red-team": {"kind", "safe"}, "harmless": {"kind", "open"}}
    kept = sum(step["revision_flag"] not in LOST for row in chains for step in row["chain"])
    assert len(rows(run, "demonstrations")) == kept
    assert "answers 16/16" in said and "preferences.jsonl" not in os.listdir(run.parent)
    assert not [name for name in os.listdir(run) if ".part-" in name or name.startswith(".critiques")]


def test_labels_average_both_orders(calm):
    run, _ = calm
    labels, left_out = rows(run, "preferences"), rows(run, "left_out")
    assert len(labels) + len(left_out) == 16 and labels
    for row in labels:
        first, second = (order["p"] for order in row["orders"])
        assert row["probability"] == pytest.approx(
            max((first + 1 - second) / 2, 1 - (first + 1 - second) / 2), abs=2e-6
        )
        assert row["probability"] >= 0.5 and row["chosen"] != row["rejected"]
    assert all(row["why"] for row in left_out)


def test_the_manifest_says_what_was_made_of_what(calm, folder):
    import hashlib

    run, _ = calm
    made = project.manifest(run)
    assert made["constitution"]["sha256"] == hashlib.sha256((folder / "law.yaml").read_bytes()).hexdigest()
    assert {entry["source"]: entry["rows_read"] for entry in made["data"]} == {
        "red.jsonl": 10,
        "harmless.jsonl": 6,
        "sft.jsonl": 32,
        "runs/calm/cai/demonstrations.jsonl": len(rows(run, "demonstrations")),
        "law.yaml": 3,
    }
    assert {entry["role"]: entry["path"] for entry in made["parents"]} == {
        "policy": "models/tiny",
        "feedback": "models/other",
    }
    assert {*MADE, "report.html", "constitution.yaml", "model.safetensors"} <= set(made["files"])
    assert made["usage"]["model"]["completion_tokens"] > 0 and made["cai"]["revisions"]["rows"] == 32
    assert made["metrics"]["steps"] == 4


def test_it_is_done_once_and_again_when_the_constitution_changes(calm, folder):
    assert "finished and unchanged" in project.ok("cai", "recipe=t", "name=calm", cwd=folder)
    law = folder / "law.yaml"
    try:
        law.write_text(LAW.replace("kinder", "nicer"))
        from align_cli.run import preflight

        before = os.getcwd()
        os.chdir(folder)
        try:
            plan = preflight.load("cai", ["recipe=t", "name=calm"], starting=False)
            assert preflight.unchanged(plan) == (False, ["data law.yaml has changed since"])
            assert plan.steps() == 4
        finally:
            os.chdir(before)
    finally:
        law.write_text(LAW)


class Page(HTMLParser):
    """Checks that what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.chains, self.outside = [], [], 0, []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.chains += tag == "details"
        self.outside += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "input", "br", "td", "th", "tr", "option"):
            self.open.append(tag)
        assert tag != "details" or "data-marks" in given

    def handle_endtag(self, tag):
        if tag not in ("td", "th", "tr", "option"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_audit_page_holds_every_chain(calm):
    run, _ = calm
    page = Page()
    page.feed((run / "report.html").read_text())
    assert page.open == [] and page.chains == 16 and page.outside == []
    text = " ".join(" ".join(page.text).split())
    assert "position bias" in text and "Was it safe?" in text and "how do I crack egg 5" in text


def until(condition, process, limit=120.0):
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.002)


def lines(file):
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def test_kill_9_at_any_phase_and_the_same_command_end_with_the_same_files(calm, folder):
    run, words = folder / "runs/killed/cai", ("cai", "recipe=t", "name=killed")
    moments = [
        lambda: lines(run / ".answers.part-0.jsonl") >= 4,
        lambda: lines(run / ".revisions-2.part-0.jsonl") >= 4,
        lambda: lines(run / "metrics.jsonl") >= 2,
        lambda: lines(run / ".judged.part-0.jsonl") >= 4,
    ]
    judged = sum("orders" in row for name in ("preferences", "left_out") for row in rows(calm[0], name))
    before = {}
    for moment in [*moments, None]:
        process = project.start(*words, cwd=folder)
        if moment is not None:
            until(moment, process)
            process.kill()
        said = process.communicate()[0]
        for name, there in before.items():
            # what was on disk at the kill is taken from there
            assert f"{name}: {there} of" in said
        before = {}
        for part in run.glob(".*.part-0.jsonl"):
            # answers are made two at a time, labels one at a time
            name, size, total = ("judged", 1, judged) if "judged" in part.name else (part.name.split(".")[1], 2, 16)
            if 0 < (there := lines(part) // size * size) < total:
                before[name] = there
            with part.open("a") as stream:
                stream.write('{"row": 15, "torn')
    assert process.returncode == 0 and not before, said
    for name in MADE:
        assert (run / name).read_bytes() == (calm[0] / name).read_bytes(), name
    whole = project.weights(calm[0])
    assert all(torch.equal(tensor, whole[name]) for name, tensor in project.weights(run).items())


def test_kill_9_while_pairs_are_sampled(calm, folder):
    words = ["cai", "recipe=t", "method.phases=[pairs,preferences]", "method.rows=runs/calm/cai"]
    words += ["method.pairs=sampled", "generation.temperature=1"]
    project.ok(*words, "name=drawn", cwd=folder)
    run = folder / "runs/torn/cai"
    process = project.start(*words, "name=torn", cwd=folder)
    until(lambda: lines(run / ".pairs.part-0.jsonl") >= 4, process)
    process.kill()
    process.communicate()
    assert not (run / "pairs.jsonl").exists()
    assert "pairs: " in project.ok(*words, "name=torn", cwd=folder)
    for name in ("pairs.jsonl", "preferences.jsonl", "left_out.jsonl"):
        assert (run / name).read_bytes() == (folder / "runs/drawn/cai" / name).read_bytes(), name
    assert len({row["row"] for row in rows(run, "pairs")}) == len(rows(run, "pairs")) == 16


def test_refusals_of_harmless_prompts_can_be_left_out_of_training(calm, folder):
    made = [json.loads(line) for line in (calm[0] / "revisions.jsonl").read_text().splitlines()]
    refusal = "I'm sorry, but I can't help with that."
    for row in made[:2] + made[-2:]:  # two of either kind, in their last revision
        row["revision"] = row["chain"][-1]["revision"] = refusal
        row["chain"][-1]["revision_flag"] = ""
    (folder / "mended").mkdir()
    project.write_rows(folder / "mended/revisions.jsonl", made)
    assert [row["kind"] for row in made[:2] + made[-2:]] == ["red-team"] * 2 + ["harmless"] * 2
    words = ["cai", "recipe=t", "name=kept", "method.phases=[train]", "method.rows=mended", "trainer.max_steps=1"]
    said = project.ok(*words, "method.drop_refusals=true", cwd=folder)
    assert "2 revisions refuse a harmless prompt and are not trained on" in said
    trained = (folder / "runs/kept/cai/demonstrations.jsonl").read_text()
    assert trained.count(refusal) == 2


def test_two_ranks_give_the_rows_of_one_process(calm, folder):
    project.ok("cai", "recipe=t", "name=two", "launch.num_gpus=2", "zero=zero2", cwd=folder)
    for name in MADE:
        assert (folder / "runs/two/cai" / name).read_bytes() == (calm[0] / name).read_bytes(), name


def test_dpo_and_rm_take_the_labels_as_they_stand(calm, folder):
    for stage in ("rm", "dpo"):
        project.recipe(
            folder,
            stage,
            "after",
            """name: after
model: { path: "${stage:cai,calm}" }
data: { train: "${stage:cai,calm}/preferences.jsonl", max_length: 128, batch_size: 4 }
trainer: { learning_rate: 1.0e-3, max_steps: 2, per_device_train_batch_size: 2 }
""",
        )
    project.ok("rm", "recipe=after", cwd=folder)
    parents = {entry["role"]: entry["path"] for entry in project.manifest(folder / "runs/after/rm")["parents"]}
    assert parents == {"policy": "runs/calm/cai", "data": "runs/calm/cai"}
    said = project.ok("check", "dpo", "recipe=after", cwd=folder)
    assert f"{len(rows(calm[0], 'preferences'))} used, 0 dropped" in said
    planned = project.ok("check", "dpo", "recipe=after", "data.train=runs/t/cai/preferences.jsonl", cwd=folder)
    assert "preferences.jsonl  (not created yet)" in planned and "`align cai recipe=t.yaml`" in planned


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero3", "none"])
def test_other_ways_to_shard(calm, folder, zero):
    words = ("cai", "recipe=t", f"name={zero}", "launch.num_gpus=2", f"zero={zero}")
    project.ok(*words, "method.pairs=sampled", "generation.temperature=0.8", "feedback=null", cwd=folder)
    assert len(rows(folder / f"runs/{zero}/cai", "pairs")) == 16


@pytest.mark.slow
def test_lora_sampled_pairs_reasoning_and_rows_of_another_run(calm, folder):
    words = ["method.pairs=sampled", "generation.temperature=1", "feedback=null", "lora.r=4"]
    words += ["method.phases=[train,pairs,preferences]", "method.rows=runs/calm/cai", "method.chain_of_thought=true"]
    project.ok("cai", "recipe=t", "name=lora", *words, cwd=folder)
    run = folder / "runs/lora/cai"
    assert (run / "adapter_config.json").is_file()
    assert (run / "revisions.jsonl").read_bytes() == (calm[0] / "revisions.jsonl").read_bytes()
    pairs, labels = rows(run, "pairs"), rows(run, "preferences")
    assert sum(row["answers"][0] != row["answers"][1] for row in pairs) > 12
    assert labels and all(0.5 <= row["probability"] <= 0.6 for row in labels)
    assert all("reasoning" in order for row in labels for order in row["orders"])
    roles = [(entry["role"], entry["path"]) for entry in project.manifest(run)["parents"]]
    assert ("data", "runs/calm/cai") in roles


# --- an endpoint writes and judges --------------------------------------------------------------------------------


@pytest.fixture
def server():
    server = api.Server()
    yield server
    server.shutdown()
    server.server_close()


def served(server, name, *more):
    generator = f"{{endpoint: '{server.address}', model: m, key_env: THE_KEY, retries: 2, concurrency: 4"
    return (
        *("cai", "recipe=t", f"name={name}", "method.phases=[answers,revisions,pairs,preferences]"),
        *(f"writer={generator}}}", f"feedback={generator}, path: null, price: {{prompt: 1.0, completion: 2.0}}}}"),
        *more,
    )


def test_an_endpoint_that_fails_on_the_way_loses_nothing(server, folder):
    environment = os.environ | {"THE_KEY": api.KEY}
    server.trouble, server.dies_after = ["429", "cut", "500"], 20
    done = project.align(*served(server, "served"), cwd=folder, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("writer.endpoint: http://127.0.0.1") and "3 times" in line and "continues" in line
    server.dies_after, server.log_probabilities = None, False
    done = project.align(*served(server, "served"), cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(server.asked.values()) == 1, "no row is paid for twice"
    run = folder / "runs/served/cai"
    usage = project.manifest(run)["usage"]
    assert usage["writer"]["requests"] == 16 * 5 and usage["writer"]["retries_rate_limit"] == 1
    assert usage["writer"]["retries_truncated"] == 1 and usage["writer"]["retries_server"] >= 1
    judged = usage["feedback"]["requests"]
    assert judged == 2 * (16 - len(rows(run, "left_out"))) > 0
    assert usage["feedback"]["cost"] == pytest.approx(judged * (10 * 1.0 + 4 * 2.0) / 1e6)
    # a judge that gives no log-probabilities is taken by its word
    assert {order["p"] for row in rows(run, "preferences") for order in row["orders"]} <= {0.0, 1.0}
    for file in (file for file in folder.rglob("*") if file.is_file() and file.stat().st_size < 1 << 20):
        assert api.KEY.encode() not in file.read_bytes(), file


def test_an_endpoint_that_cannot_be_reached_is_one_line_before_anything_is_made(server, folder):
    words = [word.replace(server.address, "http://127.0.0.1:1/v1") for word in served(server, "gone")]
    done = project.align(*words, cwd=folder, env=os.environ | {"THE_KEY": api.KEY})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["writer.endpoint", "feedback.endpoint"]
    assert "cannot be reached (Connection refused)" in done.stderr
    assert not (folder / "runs/gone").exists()


def test_a_wrong_key_and_a_key_that_is_not_set_are_one_line(server, folder):
    wrong = os.environ | {"THE_KEY": "sk-wrong"}
    done = project.align(*served(server, "wrong"), cwd=folder, env=wrong)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "sk-wrong" not in done.stderr
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["writer.endpoint", "feedback.endpoint"]
    assert not (folder / "runs/wrong").exists()
    unset = {key: value for key, value in os.environ.items() if key != "THE_KEY"}
    done = project.align("check", *served(server, "wrong"), cwd=folder, env=unset)
    assert done.returncode == 2 and done.stderr.count("THE_KEY is not set") == 2
