"""From a plan to a run directory: what is begun, left alone, moved aside or refused."""

import json
from pathlib import Path

import pytest
import yaml
from project import locked

from align_cli import driver
from align_cli.errors import AlignError, LaunchError, UpstreamError
from align_cli.run import environment, launch, manifest, preflight, worker
from align_cli.run.directory import RunDirectory
from align_cli.run.prepare import begin

HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


def write(file, text):
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)


@pytest.fixture
def project(here):
    folder = Path("models/x")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + b"\0" * 4)
    (folder / "chat_template.jinja").write_text("x")
    write("recipes/dpo/t.yaml", "name: t\nmodel: { path: models/x }\ndata: { train: a.jsonl }\n")
    write("a.jsonl", "".join(json.dumps({"prompt": f"{n}", "chosen": "b", "rejected": "c"}) + "\n" for n in range(9)))
    return here


def planned(*words):
    return preflight.load("dpo", ["recipe=t", *words], starting=True)


def begun(*words):
    said = []
    run = begin(planned(*words), said.append)
    if run is not None:
        run.unlock()
    return run, said


def finish(run, *words):
    """The manifest that the worker would write for this recipe."""
    plan = planned(*words)
    data = [count.as_manifest() for count in plan.counts]
    (run.path / "model.safetensors").write_bytes(b"weights")
    given = {"stage": "dpo", "name": "t", "seed": 42, "metrics": {}, "world_size": 1, "zero_stage": 0}
    manifest.write(run, **given, data=data, parents=[manifest.parent("policy", "models/x")], started="now")


def aside(run):
    return sorted(path.name for path in run.path.parent.iterdir() if "old" in path.name)


def test_an_absent_run_is_begun_with_its_recipe(project):
    run, said = begun("method.beta=0.3")
    assert said == [] and run.path == Path("runs/t/dpo") and run.state() == "unfinished"
    head, text = run.recipe.read_text().split("\n", 1)
    assert head.startswith("# align dpo recipe=runs/t/dpo/recipe.yaml")
    tree = yaml.safe_load(text)
    assert tree["method"]["beta"] == 0.3 and tree["seed"] == 42 and tree["data"]["max_length"] == 1024
    again = preflight.load("dpo", ["recipe=runs/t/dpo/recipe.yaml"], starting=True)
    assert again.recipe == planned("method.beta=0.3").recipe


def test_the_number_of_ranks_is_recorded(project, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    gpus = tuple(driver.Gpu(at, "T4", 16 << 30, capability=(7, 5)) for at in range(4))
    monkeypatch.setattr(driver, "present", lambda: gpus)
    run, _ = begun("launch.num_gpus=auto")
    assert yaml.safe_load(run.recipe.read_text())["launch"]["num_gpus"] == 4
    again = preflight.load("dpo", ["recipe=runs/t/dpo/recipe.yaml"], starting=True)
    assert again.ranks == 4
    finish(run)
    assert begun("launch.num_gpus=2")[0] is None, "the number of ranks does not affect results"


def test_a_finished_unchanged_run_is_left_alone(project):
    run, _ = begun()
    finish(run)
    before = {path: path.stat().st_mtime_ns for path in run.path.iterdir()}
    nothing, said = begun("launch.num_gpus=1", "force=false")
    assert nothing is None
    assert said == ["runs/t/dpo is finished and unchanged; nothing to do (force=true runs it again)"]
    assert {path: path.stat().st_mtime_ns for path in run.path.iterdir()} == before and aside(run) == []


def test_force_runs_a_finished_run_again_and_keeps_the_old_one(project):
    run, _ = begun()
    finish(run)
    new, (line,) = begun("force=true")
    assert "running again (force=true); the old run is now runs/t/dpo.old-1" in line
    assert new.state() == "unfinished" and aside(run) == ["dpo.old-1"]
    assert (run.path.parent / "dpo.old-1" / "model.safetensors").read_bytes() == b"weights"
    assert yaml.safe_load(new.recipe.read_text())["force"] is False, "the recipe repeats the run, not the forcing"


def change_recipe():
    return ["method.beta=0.2"], "method.beta 0.1 → 0.2"


def change_data():
    with Path("a.jsonl").open("a") as file:
        file.write('{"prompt": "more", "chosen": "b", "rejected": "c"}\n')
    return [], "data a.jsonl has changed since"


def change_parent():
    Path("models/x/model.safetensors").write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + b"\1" * 4)
    return [], "policy models/x has changed since"


def lose_weights():
    Path("runs/t/dpo/model.safetensors").unlink()
    return [], "model.safetensors is gone or was changed"


@pytest.mark.parametrize("change", [change_recipe, change_data, change_parent, lose_weights])
def test_a_finished_run_of_something_else_is_set_aside_and_told_why(project, change):
    run, _ = begun()
    finish(run)
    words, why = change()
    new, (line,) = begun(*words)
    assert why in line and "the old run is now runs/t/dpo.old-1" in line
    assert new.state() == "unfinished" and RunDirectory("runs/t/dpo.old-1").state() == "finished"


def test_an_unfinished_run_goes_on(project):
    run, _ = begun()
    (run.checkpoints / "checkpoint-3").mkdir(parents=True)
    again, said = begun("launch.num_gpus=2")
    assert said == [] and (again.checkpoints / "checkpoint-3").is_dir() and aside(run) == []


def test_an_unfinished_run_of_another_recipe_is_refused_with_both_ways_out(project):
    run, _ = begun()
    before = run.recipe.read_text()
    words = [f"trainer.max_steps={3}", "seed=1", "method.beta=0.2", "data.max_length=9"]
    with pytest.raises(UpstreamError) as caught:
        begun(*words)
    (line,) = caught.value.lines
    assert "data.max_length 1024 → 9" in line and line.count("→") == 3 and "and 1 more" in line
    assert "`align dpo recipe=runs/t/dpo/recipe.yaml`" in line and "force=true" in line
    assert run.recipe.read_text() == before
    new, (said,) = begun(*words, "force=true")
    assert "force=true" in said and aside(run) == ["dpo.old-1"] and new.recipe.read_text() != before


def test_a_directory_that_is_no_run_is_not_touched(project):
    write("runs/t/dpo/thesis.tex", "x")
    with pytest.raises(AlignError, match="run_dir: runs/t/dpo is not empty and not a run"):
        begun()
    assert [path.name for path in Path("runs/t/dpo").iterdir()] == ["thesis.tex"]


@pytest.fixture
def start(monkeypatch):
    """`align dpo recipe=t …` with something else for the stage, so that no test can begin to train."""

    def start(*words, stage=lambda stage, path: 0):
        monkeypatch.setattr(worker, "run", stage)
        return launch.start("dpo", ["recipe=t", *words], lambda _: None)

    monkeypatch.setattr(environment, "quiet", lambda: None)
    return start


def test_force_does_not_move_a_run_that_another_process_works_in(project, start):
    run, _ = begun()
    with locked(run), pytest.raises(LaunchError, match="another align"):
        start("force=true")
    assert aside(run) == []


def test_a_run_that_another_process_works_in_is_not_entered(project, start):
    run, _ = begun()
    with locked(run), pytest.raises(LaunchError, match="another align"):
        start()
    assert run.state() == "unfinished"
    assert start() == 0


def test_who_comes_second_does_not_take_away_what_the_first_began(project, start):
    run = RunDirectory("runs/t/dpo")
    # what the second of two commands started at the same moment sees: no recipe yet, and then the other one's lock
    with locked(run):
        with pytest.raises(LaunchError, match="another align"):
            start()
        assert run.path.is_dir()


def test_a_run_that_another_process_finished_meanwhile_is_not_written_over(project):
    run, _ = begun()
    plan = planned()
    finish(run)
    before = run.recipe.stat().st_mtime_ns
    with pytest.raises(LaunchError, match="run the same command again"):
        begin(plan, print)
    assert run.state() == "finished" and run.recipe.stat().st_mtime_ns == before
    assert begun()[0] is None


@pytest.mark.parametrize("text", ["name: [", "just text", ""])
def test_a_recipe_that_was_edited_to_pieces_is_not_resumed(project, text):
    run, _ = begun()
    run.recipe.write_text(text)
    with pytest.raises(UpstreamError, match="runs/t/dpo/recipe.yaml cannot be read"):
        begun()
    assert begun("force=true")[0].state() == "unfinished" and aside(run) == ["dpo.old-1"]


def test_a_run_that_never_began_leaves_nothing_and_one_that_did_stays(project, start):
    def fails(stage, path):
        raise UpstreamError("no weights")

    def stops(stage, path):
        (path / "checkpoints").mkdir()
        raise UpstreamError("no space")

    with pytest.raises(UpstreamError):
        start(stage=fails)
    assert not Path("runs").exists()
    with pytest.raises(UpstreamError):
        start(stage=stops)
    assert RunDirectory("runs/t/dpo").state() == "unfinished"


def test_a_template_with_todays_date_keeps_the_date_on_which_the_run_began(project):
    Path("models/x/chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    run, _ = begun()
    text = run.recipe.read_text()
    (today,) = [line for line in text.splitlines() if line.startswith("  date:")]
    assert len(today) == len("  date: '2026-01-31'")
    # the run is taken up again, or found finished, on another day
    run.recipe.write_text(text.replace(today, "  date: '2020-01-02'"))
    again, _ = begun()
    assert yaml.safe_load(again.recipe.read_text())["data"]["date"] == "2020-01-02"
    finish(again)
    assert begun()[0] is None
    # a date that the recipe names is another recipe
    assert preflight.unchanged(planned("data.date=2021-03-04"))[0] is False


def test_other_templates_are_given_no_date(project):
    run, _ = begun()
    assert yaml.safe_load(run.recipe.read_text())["data"]["date"] is None


def test_a_finished_run_on_two_folders_of_one_directory_is_left_alone(project):
    for part, extra in (("one", ""), ("two", "x")):
        write(f"d/{part}/a.jsonl", Path("a.jsonl").read_text().replace('"b"', f'"b{extra}"'))
    words = ["data.train=[{path: d, data_dir: one}, {path: d, data_dir: two}]"]
    run, _ = begun(*words)
    finish(run, *words)
    entries = manifest.read(run.path)["data"]
    assert [(entry["source"], entry["data_dir"]) for entry in entries] == [("d", "one"), ("d", "two")]
    assert begun(*words)[0] is None
    write("d/one/a.jsonl", Path("d/two/a.jsonl").read_text() + "\n")
    assert "data d has changed since" in begun(*words)[1][0]


def test_a_finished_run_of_a_version_that_did_not_know_a_key_is_left_alone(project):
    run, _ = begun()
    tree = yaml.safe_load(run.recipe.read_text())
    for key in ("subset", "data_dir", "revision"):
        assert tree["data"]["train"][0].pop(key) is None
    run.recipe.write_text(yaml.safe_dump(tree))
    finish(run)
    assert begun()[0] is None


def test_a_disk_that_is_too_small_for_the_checkpoints_is_refused_before_the_start(project, monkeypatch):
    from collections import namedtuple

    from align_cli.run import footprint

    space = namedtuple("space", "total used free")
    monkeypatch.setattr(footprint.shutil, "disk_usage", lambda place: space(1 << 40, 0, 331 << 30))
    sized = ["model.parameters=10e9"]  # 12 bytes each: 3 checkpoints are 335 GiB
    assert planned(*sized).storage.described() == (
        "≈ 111.8 GiB a checkpoint, at most 3 at a time; model 37.3 GiB; 331 GiB free, 335 needed"
    )
    with pytest.raises(LaunchError, match="331 GiB free, but 3 checkpoints of about 112 GiB and the model need 335"):
        begun(*sized)
    assert not Path("runs").exists()
    run, _ = begun("model.parameters=9e9")
    # what is finished needs no space
    finish(run, "model.parameters=9e9")
    monkeypatch.setattr(footprint.shutil, "disk_usage", lambda place: space(1 << 40, 0, 0))
    assert begun("model.parameters=9e9")[0] is None
