"""`align` in a process forked from one that has imported the libraries of every stage: 5 s less per run of a test.

Nothing else is shared: each command gets its own working directory, environment, output and random state. A command
whose environment differs in what libraries read on import is started anew, and so is everything on several ranks.
`ALIGN_TESTS_COLD=1` starts every command anew.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 900
"""Time limit of a command."""
PER_TEST = ("PYTEST_CURRENT_TEST",)
MODULES = ("deepspeed", "hydra", "align_cli.cli", "align_cli.run.preflight", "align_cli.run.worker")
"""What every run imports, besides its stage."""


class Server:
    """The parent's end: starts the importing process, and sends it commands."""

    def __init__(self) -> None:
        self.environment = _environment()
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.process.kill)

    def serves(self) -> bool:
        """Whether a command started now would import the libraries under the same environment."""
        return self.process.poll() is None and _environment() == self.environment

    def run(self, words: tuple[str, ...], cwd: Path) -> subprocess.CompletedProcess:
        """The finished command, as `subprocess.run` returns it."""
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder, name) for name in ("stdout", "stderr")]
            request = {"words": words, "cwd": str(cwd), "outputs": [str(file) for file in outputs]}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            out, err = (file.read_text(encoding="utf-8") for file in outputs)
        return subprocess.CompletedProcess(words, code, out, err)


_server: list[Server] = []


def server() -> Server | None:
    """This process's server, started when first asked for; None if commands are to be started anew."""
    if os.environ.get("ALIGN_TESTS_COLD") == "1":
        return None
    if not _server:
        _server.append(Server())
    return _server[0] if _server[0].serves() else None


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in PER_TEST}


def _preload() -> None:
    """Import what a run imports, as `align` does: after its variables are set."""
    from align_cli.run import environment

    kept = dict(os.environ)
    environment.quiet()
    with contextlib.redirect_stdout(sys.stderr):
        from align_cli.recipe.stages import STAGES

        for name in (*MODULES, *(f"align_cli.stages.{stage}" for stage in STAGES)):
            importlib.import_module(name)
    os.environ.clear()
    os.environ.update(kept)


def _command(request: dict) -> None:
    """Run the command in this forked process, and end it."""
    import signal

    signal.alarm(SECONDS)
    os.chdir(request["cwd"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, file in enumerate(request["outputs"], 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["align", *request["words"]]
    code = 1
    try:
        from align_cli.cli import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    _preload()
    # replies go to the pipe, whatever a command prints
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _command(json.loads(line))
        _, status = os.waitpid(child, 0)
        replies.write(f"{os.waitstatus_to_exitcode(status)}\n")
        replies.flush()


if __name__ == "__main__":
    _serve()
