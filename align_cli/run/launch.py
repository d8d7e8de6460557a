"""One process, N local ranks, several hosts, or called by a launcher: how a prepared run is started.

The parent composes the recipe once and writes it into the run directory; ranks read that file, since resolvers that
are evaluated rank by rank disagree. The parent imports no torch unless it is the only process.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from align_cli.recipe.sections import Launch
from align_cli.rewards import function
from align_cli.run import devices, environment, preflight
from align_cli.run.directory import RunDirectory
from align_cli.run.prepare import begin
from align_cli.signals import caught_by

if TYPE_CHECKING:
    import psutil


def adopt_slurm() -> None:
    """Give the ranks of an `srun` step the variables that torch.distributed reads."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks < 2 or "RANK" in os.environ:
        return
    first = os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or _first_node(os.environ.get("SLURM_STEP_NODELIST", ""))
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": str(tasks),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", first),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000)),
    }


def _first_node(nodes: str) -> str:
    """The first name of a Slurm node list: `node[03-06,9],gpu1` -> `node03`, `rack[1-2]n[3,5]` -> `rack1n3`."""
    first = re.match(r"(\[[^\]]*\]|[^,\[])*", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first) or "127.0.0.1"


def called_by_launcher() -> bool:
    """Whether DeepSpeed's launcher, torchrun or Slurm made this process one of several ranks."""
    adopt_slurm()
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def start(stage: str, arguments: list[str], say: Callable[[str], None]) -> int:
    """Run a stage from its command line. Returns the exit code; raises AlignError for what the user must correct."""
    environment.quiet()
    if called_by_launcher():
        from align_cli.run import worker

        return worker.as_rank(stage, arguments, say)
    plan = preflight.load(stage, arguments, starting=True)
    launch = plan.recipe.launch
    if launch.node_rank:
        # rank 0's host prepares the run; this one only lends its ranks
        return _ranks(stage, RunDirectory(plan.recipe.run_dir), launch)
    run = begin(plan, say)
    if run is None:
        return 0
    code = 2
    try:
        if launch.num_gpus == 1 and launch.hostfile is None:
            from align_cli.run import worker

            code = worker.run(stage, run.path)
        else:
            code = _ranks(stage, run, launch)
    finally:
        if code == 2 and plan.state == "absent" and not run.begun():
            run.discard()
        run.unlock()
    return code


def command(stage: str, run: Path, launch: Launch) -> list[str]:
    """The DeepSpeed launcher's command line for a prepared run."""
    line = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if launch.hostfile is None:
        line += ["--num_gpus", str(launch.num_gpus), "--master_addr", launch.master_addr or "127.0.0.1"]
        line += ["--master_port", str(launch.master_port or environment.free_port())]
    else:
        line += ["--hostfile", launch.hostfile, "--master_port", str(launch.master_port or 29500)]
        if launch.num_gpus > 1:
            line += ["--num_gpus", str(launch.num_gpus)]
        if launch.num_nodes:
            line += ["--num_nodes", str(launch.num_nodes)]
        if launch.master_addr:
            line += ["--master_addr", launch.master_addr]
        if launch.node_rank is not None:
            line += ["--no_ssh", "--node_rank", str(launch.node_rank)]
    # other hosts do not inherit this one's environment
    allow = ["--allow-code"] if function.allowed() else []
    return [*line, "--quiet", "--no_local_rank", "--module", "align_cli.run.worker", stage, str(run), *allow]


def _ranks(stage: str, run: RunDirectory, launch: Launch) -> int:
    """Start the launcher and wait. A signal goes to the ranks themselves, which stop after their step with a
    checkpoint; the launcher alone would kill them after 30 seconds."""
    variables = os.environ | {environment.PARENT: environment.this_process()}
    if not devices.gpus():
        # ranks that share the cores of one machine slow each other down with a full set of threads each
        variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.num_gpus)))
        variables.setdefault("LOCAL_SIZE", str(launch.num_gpus))
    launcher = subprocess.Popen(command(stage, run.path, launch), env=variables, start_new_session=True)
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for rank in _rank_processes(launcher.pid):
            rank.send_signal(signal.SIGTERM if len(received) < 2 else signal.SIGKILL)

    with caught_by(pass_on):
        code = launcher.wait()
    if received and code:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def _rank_processes(launcher: int) -> list[psutil.Process]:
    import psutil

    try:
        below = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    # the launchers in between name the worker too, and kill it when they are told to stop
    return [
        child
        for child in below
        if child.is_running()
        and "align_cli.run.worker" in child.cmdline()
        and not any(word.startswith("deepspeed.launcher") for word in child.cmdline())
    ]
