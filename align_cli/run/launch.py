"""Starts a run in one process, on N local ranks, on several hosts, or as a rank of an external launcher.

The parent composes the recipe once and writes it into the run directory. Ranks read that file, since resolvers could
give different values on each rank. The parent imports no torch unless it is the only process.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from align_cli.errors import LaunchError
from align_cli.recipe.sections import Launch
from align_cli.rewards import function
from align_cli.run import devices, environment, hosts, preflight
from align_cli.run.directory import RunDirectory
from align_cli.run.prepare import begin, check
from align_cli.signals import caught_by

if TYPE_CHECKING:
    import psutil


def adopt_slurm() -> None:
    """Set the variables of torch.distributed on the ranks of an `srun` step."""
    tasks, rank = devices.number("SLURM_STEP_NUM_TASKS"), devices.number("SLURM_PROCID")
    if tasks is None or tasks < 2 or rank is None or devices.outer_ranks():
        return
    first = os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or _first_node(os.environ.get("SLURM_STEP_NODELIST", ""))
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(devices.number("SLURM_LOCALID") or 0),
        "WORLD_SIZE": str(tasks),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or first,
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(20000 + (devices.number("SLURM_JOB_ID") or 0) % 20000),
    }


def _first_node(nodes: str) -> str:
    """The first host of a Slurm node list: `node[03-06,9],gpu1` -> `node03`, `rack[1-2]n[3,5]` -> `rack1n3`."""
    first = re.match(r"(\[[^\]]*\]|[^,\[])*", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first) or "127.0.0.1"


def called_by_launcher() -> bool:
    """Whether DeepSpeed's launcher, torchrun or Slurm started this process as one of several ranks."""
    adopt_slurm()
    if (ranks := devices.outer_ranks() or 1) < 2:
        return False
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise LaunchError(
                f"{name}: is not set, but WORLD_SIZE is {ranks}; start all ranks by one launcher, which sets it, or "
                "unset WORLD_SIZE and RANK"
            )
    if devices.number("LOCAL_RANK") is None:
        # libraries take a process without it for the only one; launchers that leave it out start one rank per host
        os.environ["LOCAL_RANK"] = "0"
    return True


def start(stage: str, arguments: list[str], say: Callable[[str], None]) -> int:
    """Run a stage from its command line. Returns the exit code; raises AlignError for user errors."""
    environment.quiet()
    if called_by_launcher():
        from align_cli.run import worker

        return worker.as_rank(stage, arguments, say)
    plan = preflight.load(stage, arguments, starting=True)
    launch = plan.recipe.launch
    if launch.node_rank:
        # the run is prepared on rank 0's host; this host only starts its ranks
        if check(plan, say) is None:
            return 0
        say(f"waiting for rank 0 at {launch.master_addr}:{launch.master_port or hosts.MASTER_PORT}")
        return ranks(stage, RunDirectory(plan.recipe.run_dir), launch)
    run = begin(plan, say)
    if run is None:
        return 0
    code = 2
    try:
        if launch.num_gpus == 1 and launch.hostfile is None:
            environment.one_gpu()
            from align_cli.run import worker

            code = worker.run(stage, run.path)
        elif launch.hostfile is None or launch.node_rank is not None:
            code = ranks(stage, run, launch)
        else:
            code = hosts.run(stage, run.path, launch, secrets=plan.recipe.secrets())
    finally:
        if code == 2 and plan.state == "absent" and not run.begun():
            run.discard()
        run.unlock()
    return code


def command(stage: str, run: Path, launch: Launch) -> list[str]:
    """Command line of the DeepSpeed launcher for a prepared run."""
    line = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if launch.hostfile is None:
        if gpus := devices.used(launch):
            # with --num_gpus the launcher would take the first GPUs, whatever CUDA_VISIBLE_DEVICES says. Among those
            # that HIP_VISIBLE_DEVICES leaves, ROCm counts from 0
            slots = [at if gpu.gfx is not None else gpu.index for at, gpu in enumerate(gpus)]
            line += ["--include", f"localhost:{','.join(map(str, slots))}"]
        else:
            line += ["--num_gpus", str(launch.num_gpus)]
        line += ["--master_addr", launch.master_addr or "127.0.0.1"]
        line += ["--master_port", str(launch.master_port or environment.free_port())]
    else:
        line += ["--hostfile", launch.hostfile, "--master_port", str(launch.master_port or hosts.MASTER_PORT)]
        if launch.num_gpus:
            # --num_gpus would start that many ranks on hosts with fewer slots, too
            slots = devices.slots(launch).items()
            line += ["--include", "@".join(f"{host}:{','.join(map(str, range(ranks)))}" for host, ranks in slots)]
        elif launch.num_nodes:
            line += ["--num_nodes", str(launch.num_nodes)]
        if launch.master_addr:
            line += ["--master_addr", launch.master_addr]
        # `run.hosts` starts one such command on each host
        line += ["--no_ssh", "--node_rank", str(launch.node_rank)]
    # a launcher passes on only some variables
    allow = ["--allow-code"] if function.allowed() else []
    return [*line, "--quiet", "--no_local_rank", "--module", "align_cli.run.worker", stage, str(run), *allow]


def ranks(stage: str, run: RunDirectory, launch: Launch) -> int:
    """Start this host's ranks and wait for them. Returns the exit code; raises LaunchError if rank 0's port is taken.

    Signals are sent to the ranks directly, which finish their step, write a checkpoint and stop; the launcher would
    kill them after 30 seconds. A second signal kills them.
    """
    import psutil

    if launch.master_port and not launch.node_rank:
        environment.check_port(launch.master_port)
    variables = environment.of_ranks(launch)
    if launch.hostfile is not None:
        variables.setdefault(environment.HOST, list(devices.hosts(launch.hostfile))[launch.node_rank or 0])
    launcher = subprocess.Popen(command(stage, run.path, launch), env=variables, start_new_session=True)
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        started = _rank_processes(launcher.pid)
        if len(received) > 1 or not started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
        for rank in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGTERM)

    with caught_by(pass_on):
        code = launcher.wait()
    if received and code:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def _rank_processes(launcher: int) -> list[psutil.Process]:
    import psutil

    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                words = child.cmdline()
                # intermediate launchers also have the worker's module in their command line, and kill it on a signal
                if "align_cli.run.worker" in words and not any(word.startswith("deepspeed.launcher") for word in words):
                    found.append(child)
    return found
