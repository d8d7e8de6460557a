"""Hosts must share the run directory, and rank 0 decides what its files say."""

import os
import shutil

import project
import pytest
import ranks

CHECK = """
from pathlib import Path
from align_cli import distributed
from align_cli.errors import LaunchError
from align_cli.run import shared

shared.PATIENCE = 1.0
distributed.join()
try:
    shared.check(Path("{run}"), Path("cache"))
    print("shared")
except LaunchError as error:
    print(*error.lines)
distributed.leave()
"""


def test_folders_that_all_ranks_see_pass_and_stay_as_they_were(tmp_path):
    assert ranks.said(CHECK.format(run="run"), tmp_path, tmp_path) == ["shared"] * 2
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize("key", ["run_dir", "working directory"])
def test_a_folder_of_its_own_on_another_host_is_named(tmp_path, key):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    run = "run" if key == "run_dir" else tmp_path / "run"
    first, second = ranks.said(CHECK.format(run=run), tmp_path / "one", tmp_path / "two")
    assert len(first.splitlines()) == len(second.splitlines()) == 1
    assert first.startswith(f"{key}: ") and str(tmp_path / "one") in first and "share" in first


@pytest.mark.slow
def test_two_hosts_without_a_shared_folder_end_with_one_line(tmp_path):
    homes = [project.build(tmp_path / name) for name in ("one", "two")]
    words = ["sft", "recipe=t", "launch.hostfile=hosts", "launch.master_addr=127.0.0.1"]
    words += [f"launch.master_port={ranks.free_port()}"]
    nodes = []
    for rank, home in enumerate(homes):
        (home / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
        nodes.append(project.start(*words, f"launch.node_rank={rank}", cwd=home))
    said = [node.communicate(timeout=900)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], said
    assert said[0].count("run_dir: ") == 1 and "Traceback" not in "".join(said)
    assert not (homes[0] / "runs" / "t").exists()


STALE = """
import os, pathlib, sys

NAMES = {"complete", ".samples-before.json", "base", "manifest.json"}
if os.environ.get("RANK") == "1":
    for name in ("is_file", "is_dir", "exists"):
        def stale(self, look=getattr(pathlib.Path, name)):
            ours = sys._getframe(1).f_globals.get("__name__", "").startswith("align_cli.")
            late = self.name in NAMES and "stale" in self.parts or ".cache" in self.parts and self.suffix
            return False if ours and late and not self.name.startswith(".shared") else look(self)
        setattr(pathlib.Path, name, stale)
"""
"""A rank whose listing of the run directory and the cache is out of date, as on a network file system."""


@pytest.fixture
def stale(tmp_path):
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "sitecustomize.py").write_text(STALE)
    return os.environ | {"PYTHONPATH": f"{tmp_path / 'late'}:{os.environ.get('PYTHONPATH', '')}"}


@pytest.mark.slow
def test_a_rank_with_an_old_listing_follows_rank_0(tmp_path, stale):
    """It resumes with the others, from the merged parent, the reference's cache and the answers that rank 0 sees."""
    home = project.build(tmp_path / "home")
    project.ok("sft", "recipe=t", "lora.r=4", "trainer.max_steps=2", cwd=home)
    words = ("dpo", "recipe=t", "model.path=runs/t/sft", "launch.num_gpus=2", "samples=[name colours 1]")
    words += ("trainer.max_steps=12", "trainer.save_steps=2", "method.precompute_reference=true")
    project.kill_after_a_checkpoint(*words, "run_dir=runs/stale/dpo", run=home / "runs/stale/dpo", cwd=home)
    shutil.copytree(home / "runs/stale/dpo", home / "runs/fresh/dpo")
    recipe = home / "runs/fresh/dpo/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("runs/stale/dpo", "runs/fresh/dpo"))
    for name, how in (("fresh", {}), ("stale", {"env": stale})):
        done = project.align(*words, f"run_dir=runs/{name}/dpo", cwd=home, **how)
        assert done.returncode == 0 and "resuming from step" in done.stdout, done.stdout + done.stderr
    assert project.losses(home / "runs/stale/dpo") == project.losses(home / "runs/fresh/dpo")


@pytest.mark.slow
def test_rounds_follow_rank_0(tmp_path, stale):
    """A round that rank 0 sees as finished is skipped by all."""
    home = project.build(tmp_path / "home")
    project.recipe(
        home,
        "spin",
        "t",
        """name: t
model: { path: models/tiny }
data: { train: sft.jsonl, max_length: 128, batch_size: 8 }
generation: { max_new_tokens: 8 }
method: { iterations: 2, stop_when_alike: false }
trainer: { learning_rate: 1.0e-3, max_steps: 2 }
launch: { num_gpus: 2 }
""",
    )
    project.ok("spin", "recipe=t", "run_dir=runs/stale/spin", cwd=home)
    run = home / "runs/stale/spin"
    (run / "manifest.json").unlink()
    (run / "iteration-1" / "manifest.json").unlink()
    done = project.align("spin", "recipe=t", "run_dir=runs/stale/spin", cwd=home, env=stale)
    assert done.returncode == 0 and "iteration-0 is finished" in done.stdout, done.stdout + done.stderr
