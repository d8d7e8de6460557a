"""A run's directory: states, checkpoints, the lock, and files written whole."""

import json
import os
import socket
import subprocess
import sys

import pytest
from project import locked

from align_cli import locks
from align_cli.errors import LaunchError
from align_cli.run.directory import COMPLETE, RunDirectory, trim_metrics, write_atomically


@pytest.fixture
def run(here):
    made = RunDirectory("runs/t/sft")
    made.path.mkdir(parents=True)
    return made


def test_only_status_complete_is_finished(run):
    run.recipe.write_text("name: t\n")
    run.manifest.write_text('{"status": "running"}')
    assert run.state() == "unfinished"
    run.manifest.write_text('{"status": "complete"}')
    assert run.state() == "finished"


def test_a_file_in_the_place_is_foreign(here):
    (here / "x").write_text("")
    assert RunDirectory("x").state() == "foreign"


@pytest.mark.parametrize("text", ['{"status": "comp', "[]"])
def test_a_manifest_that_cannot_be_read_is_no_finish(run, text):
    run.recipe.write_text("name: t\n")
    run.manifest.write_text(text)
    assert run.state() == "unfinished"


def test_checkpoints_are_ordered_by_number_and_named_exactly(run):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-12-old", "checkpoint-x"):
        (run.checkpoints / name).mkdir(parents=True)
        if name != "checkpoint-11":
            (run.checkpoints / name / COMPLETE).touch()
    assert run.latest_checkpoint() == run.checkpoints / "checkpoint-10"


def test_dropping_takes_the_unmarked_only(run):
    run.drop_half_written()
    for name in ("checkpoint-1", "checkpoint-2", "tmp-checkpoint-3"):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "weights").touch()
    (run.checkpoints / "checkpoint-1" / COMPLETE).touch()
    (run.checkpoints / "note.txt").touch()
    run.drop_half_written()
    assert sorted(entry.name for entry in run.checkpoints.iterdir()) == ["checkpoint-1", "note.txt"]
    assert (run.checkpoints / "checkpoint-1" / "weights").is_file()


def test_setting_aside_overwrites_nothing(run):
    for number in (1, 2):
        run.path.mkdir(parents=True, exist_ok=True)
        run.recipe.write_text(f"seed: {number}\n")
        aside = run.set_aside()
        assert aside.name == f"sft.old-{number}" and (aside / "recipe.yaml").read_text() == f"seed: {number}\n"
    assert not run.path.exists()


def test_what_never_began_leaves_no_empty_folders_and_takes_no_neighbour(run):
    other = run.path.parent.parent / "u"
    other.mkdir()
    (other / "x").touch()
    run.discard()
    assert not run.path.parent.exists() and (other / "x").is_file()


LOCK = """
from align_cli.run.directory import RunDirectory
run = RunDirectory('runs/t/sft')
run.lock()
print('locked', flush=True)
input()
"""


def test_the_lock_names_its_process_and_goes_with_it(run):
    holder = subprocess.Popen([sys.executable, "-c", LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(LaunchError, match=rf"another align \(process {holder.pid}\) is using it"), locked(run):
        pass
    holder.kill()
    holder.communicate()
    with locked(run):
        assert (run.path / ".lock").read_text() == f"{socket.gethostname()}:{os.getpid()}"
    with locked(run):
        pass


def test_a_lock_in_a_directory_that_was_moved_while_it_was_taken_is_none(run, monkeypatch):
    taken = []

    def flock(lock, how):
        if not taken:
            run.path.rename(run.path.with_name("moved"))  # by the process that has just released it
        taken.append(lock.name)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locked(run):
        assert len(taken) == 2 and (run.path / ".lock").read_text().endswith(f":{os.getpid()}")
    assert (run.path.with_name("moved") / ".lock").read_text() == ""


def test_files_are_replaced_whole(run):
    file = run.path / "a.json"
    write_atomically(file, "old")
    with file.open() as reader:
        write_atomically(file, "néw\n")
        assert reader.read() == "old", "who has the old file open reads it to its end"
    assert file.read_text(encoding="utf-8") == "néw\n"
    assert [entry.name for entry in run.path.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_the_old_file(run):
    file = run.path / "a.json"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "\ud800")
    assert file.read_text() == "old"


def test_trimming_metrics(run):
    trim_metrics(run.metrics, 3)
    assert not run.metrics.exists()
    rows = [{"step": step, "loss": step / 10, "note": "é\u2028"} for step in range(1, 6)]
    lines = [json.dumps(row) for row in rows]
    run.metrics.write_text("\n".join([*lines, '{"loss": 1}', '{"step": 2, "lo']))
    trim_metrics(run.metrics, 3)
    assert run.metrics.read_text() == "".join(f"{line}\n" for line in lines[:3])
    trim_metrics(run.metrics, 0)
    assert run.metrics.read_text() == ""
