"""`python -m align_cli.run.host [--greet [PORT]]`: starts the ranks of this host, as ordered through standard input.

See `run.hosts`, which starts it on each host. With --greet, it prints a line once it is ready; on rank 0's host it
checks before that its port is free.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from align_cli.errors import AlignError
from align_cli.recipe.sections import Launch
from align_cli.rewards import function
from align_cli.run import environment, launch
from align_cli.run.directory import RunDirectory


def _obey() -> None:
    """Turn lines of standard input into signals to this process; end the ranks if the command is gone."""
    for line in sys.stdin:
        if line.strip() == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(2):
        # the second one kills
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def main() -> int:
    """Start the ranks and wait for them. Returns the launcher's exit code."""
    try:
        if len(sys.argv) > 2:
            environment.check_port(int(sys.argv[2]))
        if len(sys.argv) > 1:
            print(environment.READY, flush=True)
        line = sys.stdin.readline()
        if not line:  # another host cannot start, or the command was stopped
            return 1
        order = json.loads(line)
        os.environ.update(order["environment"])
        environment.quiet()
        if order["code"]:
            function.allow()
        with tempfile.TemporaryDirectory() as folder:
            hostfile = Path(folder) / "hosts"
            hostfile.write_text(order["hosts"])
            settings = Launch(**order["launch"] | {"hostfile": str(hostfile)})
            threading.Thread(target=_obey, daemon=True).start()
            return launch.ranks(order["stage"], RunDirectory(order["run"]), settings)
    except AlignError as error:
        for line in error.lines:
            print(line, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # the thread that reads standard input would hold up a normal exit
    os._exit(code)
