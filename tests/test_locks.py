"""Locks, on file systems with flock and without, between real processes."""

import errno
import os
import subprocess
import sys
import threading

import pytest
from project import locked

from align_cli import locks
from align_cli.errors import LaunchError
from align_cli.run.directory import RunDirectory

WITHOUT = """
import errno, fcntl, os, sys
def flock(file, how):
    raise OSError(errno.{name}, os.strerror(errno.{name}))
fcntl.flock = flock
"""
"""What a file system without flock does."""
HOLD = """
from align_cli.run.directory import RunDirectory
run = RunDirectory('runs/t/sft')
run.lock()
print('locked', flush=True)
input()
run.unlock()
print('released', flush=True)
input()
"""
WAIT = """
from pathlib import Path
from align_cli import locks
with locks.waiting(Path('build/.align-lock')):
    print('inside', flush=True)
    input()
"""


@pytest.fixture(params=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def name(request, here, monkeypatch):
    """The name of the error, which flock raises in this process, too."""

    def flock(file, how):
        raise OSError(getattr(errno, request.param), os.strerror(getattr(errno, request.param)))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    return request.param


@pytest.fixture
def without(name):
    """Starts Python code in another process in which flock is missing as well."""
    started = []

    def start(code):
        words = [sys.executable, "-c", WITHOUT.format(name=name) + code]
        started.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def hidden(folder):
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith("."))


def test_without_flock_one_process_at_a_time_has_the_run(without):
    run = RunDirectory("runs/t/sft")
    with locked(run):  # nobody holds it
        assert run.state() == "absent"
    holder = without(HOLD)
    assert holder.stdout.readline() == "locked\n"
    said = (
        rf"sft: another align \(process {holder.pid}, last seen \d+ s ago\) is using it.*remove runs/t/sft/.lock.held"
    )
    with pytest.raises(LaunchError, match=said), locked(run):
        pass
    print(file=holder.stdin, flush=True)
    assert holder.stdout.readline() == "released\n"
    with locked(run):
        pass
    assert hidden(run.path) == [".lock"]


def test_without_flock_a_killed_process_holds_nothing(without):
    run, holder = RunDirectory("runs/t/sft"), without(HOLD)
    assert holder.stdout.readline() == "locked\n"
    holder.kill()
    holder.communicate()
    with locked(run):
        assert (run.path / ".lock.held").read_text().split("\n")[0].endswith(f":{os.getpid()}")
    assert hidden(run.path) == [".lock"]


@pytest.mark.parametrize("name", ["ENOLCK"], indirect=True)
def test_another_machine_holds_it_as_long_as_its_heart_beats(name):
    run = RunDirectory("runs/t/sft")
    run.path.mkdir(parents=True)
    held = run.path / ".lock.held"
    # a process id that runs here says nothing about a process there
    held.write_text(f"node3:{os.getpid()}\nnode3 another-boot\nsome-id\n")
    with pytest.raises(LaunchError, match=rf"another align \(process {os.getpid()} on node3, last seen \d+ s ago\)"):
        run.lock()
    then = held.stat().st_mtime - locks.STALE - 1
    os.utime(held, (then, then))
    with locked(run):
        assert held.read_text().split("\n")[0].endswith(f":{os.getpid()}")
    assert not held.exists()


@pytest.mark.parametrize("name", ["ENOLCK"], indirect=True)
def test_the_heart_beats_while_the_run_is_locked(name, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    run = RunDirectory("runs/t/sft")
    with locked(run):
        held = run.path / ".lock.held"
        os.utime(held, (1, 1))
        beaten = threading.Event()
        while held.stat().st_mtime < 2:
            beaten.wait(0.01)


@pytest.mark.parametrize("name", ["ENOLCK"], indirect=True)
def test_who_was_silent_for_so_long_that_another_has_the_run_ends(without):
    holder = without(f"from align_cli import locks\nlocks.BEAT = 0.01\n{HOLD}")
    assert holder.stdout.readline() == "locked\n"
    # in one step, as the other machine does it
    RunDirectory("runs/t/sft").path.joinpath("new").write_text("node3:7\nnode3\nsome-id\n")
    os.replace("runs/t/sft/new", "runs/t/sft/.lock.held")
    assert holder.wait(timeout=300) == 1


@pytest.mark.parametrize("name", ["ENOLCK"], indirect=True)
def test_a_run_set_aside_is_locked_by_nobody(name):
    run = RunDirectory("runs/t/sft")
    run.lock()
    run.recipe.write_text("name: t\n")
    aside = run.set_aside()
    assert hidden(aside) == [".lock"]
    with locked(run):
        assert (run.path / ".lock.held").exists()


@pytest.mark.parametrize("name", ["ENOSYS"], indirect=True)
def test_without_flock_a_build_waits_for_another(without, here):
    (here / "build").mkdir()
    one = without(WAIT)
    assert one.stdout.readline() == "inside\n"
    inside = threading.Event()

    def enter():
        with locks.waiting(here / "build/.align-lock"):
            inside.set()

    waits = threading.Thread(target=enter)
    waits.start()
    assert not inside.wait(3 * locks.POLL)
    one.kill()
    one.communicate()
    assert inside.wait(300)
    waits.join()


def test_a_lock_that_fails_for_another_reason_is_not_another_align(here, monkeypatch):
    def flock(file, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(LaunchError, match=r"runs/t/sft: cannot be locked \(Input/output error\)"):
        RunDirectory("runs/t/sft").lock()
