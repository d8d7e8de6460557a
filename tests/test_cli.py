"""The command line as a user meets it: a subprocess, its exit code, its lines, and what it leaves behind."""

import json
import subprocess
import sys
import time
from pathlib import Path

import project
import pytest
from project import align

from align_cli import cli
from align_cli.errors import AlignError
from align_cli.recipe import places

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.fixture
def home(tmp_path):
    """A folder with a model directory in name only: nothing here may need its weights."""
    folder = tmp_path / "models" / "x"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "chat_template.jinja").write_text("x")
    for stage in ("sft", "dpo"):
        text = f"name: t\nmodel: {{ path: models/x }}\ndata: {{ train: {stage}.jsonl }}\n"
        project.recipe(tmp_path, stage, text=text)
    project.write_rows(tmp_path / "dpo.jsonl", [PAIR | {"prompt": str(number)} for number in range(8)])
    return tmp_path


def refused(home, *words):
    """The lines of a refusal: exit code 2, no traceback, nothing written."""
    before = sorted(home.rglob("*"))
    done = align(*words, cwd=home)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(home.rglob("*")) == before
    return done.stderr.strip().splitlines()


def model(home, name, **config):
    folder = home / "models" / name
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "chat_template.jinja").write_text("x")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def finished(home):
    """A finished run of recipes/dpo/t.yaml, with the manifest that the worker would have written."""
    code = (
        "from align_cli.run import manifest, preflight, prepare\n"
        "plan = preflight.load('dpo', ['recipe=t'], starting=True)\n"
        "run = prepare.begin(plan, print)\n"
        "manifest.write(run, stage='dpo', name='t', seed=42, parents=[manifest.parent('policy', 'models/x')],\n"
        "    data=[count.as_manifest() for count in plan.counts], metrics={'loss': 0.5}, world_size=1, zero_stage=0,\n"
        "    started='now')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=home, check=True)
    return home / "runs" / "t" / "dpo"


@pytest.mark.parametrize("command", [["dpo"], ["check", "dpo"]])
def test_problems_of_every_kind_come_at_once(home, command):
    (home / "dpo.jsonl").write_text(json.dumps(PAIR) + '\n{"prompt": "a", "chosen"\n' + json.dumps(PAIR) + "\n")
    lines = refused(home, *command, "recipe=t", "+method.bta=1", "model.path=models/nope", "samples=none.jsonl")
    said = "\n".join(lines)
    assert "command line: method.bta: unknown key. Did you mean 'beta'?" in lines
    assert "model.path: models/nope: no such directory" in said
    assert "dpo.jsonl:2: not valid JSON" in said
    assert "samples.prompts: none.jsonl: no such file" in said
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": ""}], "dpo.jsonl:1: 'rejected' is empty"),
        (
            [{"question": "a", "good": "b"}],
            "no format has the columns question, good",
        ),
        ([PAIR, {**PAIR, "chosen": [{"role": "assistant", "content": "b"}]}], "dpo.jsonl:2"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "preferences need chosen and rejected"),
    ],
)
def test_rows_that_cannot_be_used(home, rows, said):
    project.write_rows(home / "dpo.jsonl", rows)
    assert said in "\n".join(refused(home, "dpo", "recipe=t"))


def test_parents_that_cannot_serve(home):
    model(home, "rm", architectures=["LlamaForSequenceClassification"])
    (line,) = refused(home, "dpo", "recipe=t", "model.path=models/rm")
    assert "is a reward model" in line
    adapter = model(home, "adapter")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/gone"}))
    (line,) = refused(home, "dpo", "recipe=t", "model.path=models/adapter")
    assert "an adapter whose base models/gone does not exist" in line
    (line,) = refused(home, "dpo", "recipe=t", "model.path=${stage:sft}")
    assert line == "model.path: runs/t/sft does not exist. Run `align sft recipe=t.yaml` first."
    half = home / "runs" / "t" / "sft"
    half.mkdir(parents=True)
    (half / "recipe.yaml").write_text("name: t\n")
    (line,) = refused(home, "dpo", "recipe=t", "model.path=${stage:sft}")
    assert line == "model.path: runs/t/sft is not finished; run `align sft recipe=runs/t/sft/recipe.yaml` first"
    bare = model(home, "bare", architectures=["LlamaForCausalLM"])
    (bare / "chat_template.jinja").unlink()
    (line,) = refused(home, "dpo", "recipe=t", "model.path=models/bare")
    assert "no chat template; set model.chat_template=" in line
    (line,) = refused(home, "dpo", "recipe=t", "model.chat_template=chatlm")
    assert "Did you mean 'chatml'?" in line


def test_a_batch_that_does_not_divide_names_the_numbers_that_would(home):
    words = ("data.batch_size=10", "trainer.per_device_train_batch_size=4", "launch.num_gpus=2")
    (line,) = refused(home, "dpo", "recipe=t", *words)
    assert "8 or 16 would" in line and "per_device_train_batch_size=1 or 5 would too" in line


def test_a_recipe_of_another_stage_and_a_stage_that_is_none(home):
    (line,) = refused(home, "dpo", "recipe=recipes/sft/t.yaml")
    assert "run `align sft recipe=recipes/sft/t.yaml`" in line
    (line,) = refused(home, "check", "dop", "recipe=t")
    assert "Did you mean 'dpo'?" in line
    (line,) = refused(home, "dpo", "recipe=t", "--beta=3")
    assert line == "command line: --beta=3 is not an option; write beta=3"


def test_check_plans_over_a_run_that_is_still_to_be_made(home):
    done = align("check", "dpo", "recipe=t", "model.path=${stage:sft}", "data.batch_size=4", cwd=home)
    assert done.returncode == 0, done.stderr
    assert "needs" in done.stdout and "`align sft recipe=t.yaml`" in done.stdout
    assert "8 rows read, 8 used" in done.stdout and "4 pairs per step" in done.stdout
    assert not (home / "runs").exists()


def test_recipes_can_be_listed_shown_and_copied(home):
    assert "dpo/zephyr" in align("recipes", cwd=home).stdout == align("recipes", "list", cwd=home).stdout
    assert align("recipes", "show", "dpo/zephyr", cwd=home).stdout.startswith("# align dpo recipe=zephyr.yaml")
    assert align("recipes", "copy", "dpo/zephyr", "mine.yaml", cwd=home).returncode == 0
    assert align("check", "dpo", "recipe=mine.yaml", cwd=home).returncode == 0
    (line,) = refused(home, "recipes", "copy", "dpo/zephyr", "mine.yaml")
    assert "exists already" in line
    (line,) = refused(home, "recipes", "show", "dpo/zepyr")
    assert "Did you mean 'dpo/zephyr'?" in line
    assert json.loads(align("schema", "dpo", cwd=home).stdout)["title"] == "align dpo recipe"


def test_problems_go_to_stderr_and_nothing_to_stdout(home):
    done = align("dpo", "recipe=t", "seed=x", "method.bta=1", cwd=home)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "command line: method.bta: unknown key. Did you mean 'beta'?",
        "command line: seed: expected an integer, found str 'x'",
    ]


def test_commands_and_options_that_are_none(home):
    assert refused(home, "dop", "recipe=t") == ["command line: unknown command 'dop'. Did you mean 'dpo'?"]
    assert refused(home, "recipes", "lits") == ["command line: unknown command 'lits'. Did you mean 'list'?"]
    assert refused(home, "check") == ["command line: missing argument 'STAGE'; see `align check --help`"]
    assert refused(home, "--quiet") == ["command line: no such option: --quiet; see `align --help`"]
    (line,) = refused(home, "show", "dpo", "recipe=t", "--rows=many")
    assert line.startswith("command line: invalid value for '--rows' / '-n'")
    (line,) = refused(home, "check", "dpo")
    assert line.startswith("command line: no recipe; add recipe=NAME.yaml")
    alone = align(cwd=home)
    assert "Usage: align [OPTIONS] COMMAND" in alone.stdout + alone.stderr


def test_what_cannot_be_merged(home):
    assert refused(home, "merge", "x") == ["x: no such directory; only a run trained with lora: needs merging"]
    (line,) = refused(home, "merge", "models/x")
    assert line == "models/x: holds a whole model; only a run trained with lora: needs merging"
    half = home / "runs" / "t" / "sft"
    half.mkdir(parents=True)
    (half / "recipe.yaml").write_text("name: t\n")
    assert refused(home, "merge", "runs/t/sft") == ["runs/t/sft: is an unfinished run; finish it first"]


def test_the_version(home):
    done = align("--version", cwd=home)
    assert (done.returncode, done.stdout) == (0, "0.1.0\n")


def test_the_launchers_option_is_taken_before_the_command(home):
    assert align("--local-rank=3", "check", "dpo", "recipe=t", cwd=home).returncode == 0
    (line,) = refused(home, "--local_rank=0", "dpo", "recipe=none")
    assert line.startswith("recipe=none: no such file or recipe")


def test_a_finished_unchanged_run_is_not_run_again(home):
    run = finished(home)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    done = align("dpo", "recipe=t", cwd=home)
    assert done.returncode == 0
    assert done.stdout == "runs/t/dpo is finished and unchanged; nothing to do (force=true runs it again)\n"
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before
    again = align("dpo", f"recipe={run}/recipe.yaml", cwd=home)
    assert again.returncode == 0 and "nothing to do" in again.stdout


def test_an_unfinished_run_of_another_recipe_is_left_alone(home):
    (finished(home) / "manifest.json").unlink()
    (line,) = refused(home, "dpo", "recipe=t", "method.beta=0.2")
    assert "holds an unfinished run of another recipe (method.beta 0.1 → 0.2)" in line


def test_lineage_of_a_run(home):
    finished(home)
    first, second, third = align("lineage", "runs/t/dpo", cwd=home).stdout.splitlines()
    assert first.startswith("runs/t/dpo  dpo, complete ") and "loss 0.5" in first
    assert "policy    models/x  model directory" in second and "dpo.jsonl  8 rows, 0 dropped" in third
    (home / "models" / "x" / "config.json").write_text('{"architectures": ["MistralForCausalLM"]}')
    done = align("lineage", "runs/t/dpo", cwd=home)
    assert done.returncode == 0 and "stale: runs/t/dpo: its policy models/x has changed since" in done.stdout


def test_what_ends_a_command(monkeypatch, capsys):
    def ending(error):
        def listing():
            raise error

        monkeypatch.setattr(places, "listing", listing)
        monkeypatch.setattr(sys, "argv", ["align", "recipes", "list"])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, capsys.readouterr().err

    assert ending(AlignError("a", "b")) == (2, "a\nb\n")
    assert ending(KeyboardInterrupt()) == (130, "")
    # a bug is shown with its traceback, and Python's own exit code for it is 1
    with pytest.raises(RuntimeError):
        ending(RuntimeError("x"))


def test_lineage_of_what_is_no_run(home):
    (line,) = refused(home, "lineage", "models/x")
    assert "is not a run" in line


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["check", "dpo", "recipe=zephyr.yaml"],
        ["check", "dpo", "recipe=t"],
        ["recipes"],
        ["schema", "sft"],
        ["lineage", "runs/t/dpo"],
        ["--local_rank=0", "recipes"],
        ["dpo", "recipe=t"],  # a finished run is looked at, not run
    ],
)
def test_torch_stays_out_of_the_way(home, words):
    code = (
        f"import sys\nfrom align_cli.cli import main\nsys.argv = ['align', *{words!r}]\n"
        "try:\n    main()\nexcept SystemExit as leaving:\n    assert not leaving.code, leaving.code\n"
        "assert not {'torch', 'transformers', 'trl', 'deepspeed'} & set(sys.modules)"
    )
    if words in (["lineage", "runs/t/dpo"], ["dpo", "recipe=t"]):
        finished(home)
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def loading():
    """Seconds in which this machine imports a trainer, which no command may wait for before it has looked."""
    return _seconds([sys.executable, "-c", "from trl import DPOTrainer"])


def _seconds(command, **how):
    started = time.monotonic()
    subprocess.run(command, capture_output=True, check=True, **how)
    return time.monotonic() - started


@pytest.mark.parametrize(("words", "share"), [(["--help"], 1 / 8), (["check", "dpo", "recipe=zephyr.yaml"], 1 / 2)])
def test_it_answers_at_once(home, words, share, loading):
    script = Path(sys.executable).parent / "align"
    # the machine is shared: the best of five counts, and the first that is good enough ends it
    times = (_seconds([script, *words], cwd=home) for _ in range(5))
    assert any(seconds < share * loading for seconds in times)
