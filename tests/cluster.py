"""Two hosts on one machine: network namespaces joined by a cable, each with its own host name, the second one with an
sshd and process numbers of its own. Without the permission for that, two loopback addresses, which need no ssh."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil


def missing() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    for program in ("ip", "sshd", "ssh", "ssh-keygen", "unshare"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"{program} is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"align{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"network namespaces: {done.stderr.strip()}" if done.returncode else None


class Cluster:
    """Hosts `first` and `second`. `start` runs `align` on the first one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.real = missing() is None
        self.server: subprocess.Popen | None = None
        self.names = [f"align{os.getpid()}-{host}" for host in ("a", "b")]
        self.hosts = ["198.18.77.1", "198.18.77.2"] if self.real else ["127.0.0.1", "127.0.0.2"]
        self.first, self.second = self.hosts
        self.settings = []
        if self.real:
            self._cable()
            self._ssh()

    def _cable(self) -> None:
        ends = [f"al{os.getpid()}{end}" for end in "ab"]
        for name in self.names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(self.names, ends, self.hosts, strict=True):
            _run("ip", "link", "set", end, "netns", name)
            _run("ip", "-n", name, "addr", "add", f"{address}/30", "dev", end)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", end, "up")
        self.end = ends[0]

    def pull_the_cable(self) -> None:
        _run("ip", "-n", self.names[0], "link", "set", self.end, "down")

    def plug_it_in(self) -> None:
        _run("ip", "-n", self.names[0], "link", "set", self.end, "up")

    def _ssh(self) -> None:
        home = self.folder / "ssh"
        home.mkdir()
        home.chmod(0o700)
        for key in ("host", "user"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / key))
        (home / "sshd_config").write_text(
            f"Port 2222\nListenAddress {self.second}\nHostKey {home / 'host'}\nAuthorizedKeysFile {home / 'user.pub'}\n"
            "PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
            # without it a session outlives a connection that is cut, for as long as TCP tries
            "ClientAliveInterval 10\nClientAliveCountMax 3\n"
        )
        (home / "known").write_text(f"[{self.second}]:2222 {(home / 'host.pub').read_text()}")
        (home / "config").write_text(
            f"Host *\n  Port 2222\n  IdentityFile {home / 'user'}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {home / 'known'}\n"
        )
        self.settings = [f"launch.ssh='ssh -F {home / 'config'}'"]
        Path("/run/sshd").mkdir(exist_ok=True)
        sshd = shutil.which("sshd", path="/usr/sbin:/sbin")
        inside = f"hostname second && exec {sshd} -D -e -f {home / 'sshd_config'}"
        self.server = subprocess.Popen(
            ["ip", "netns", "exec", self.names[1]]
            + ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", inside],
            stderr=(self.folder / "sshd.log").open("w"),
        )
        _until(lambda: "listening" in (self.folder / "sshd.log").read_text().lower(), "sshd starts")
        self.idle = set(self.processes(self.second))

    def close(self) -> None:
        if not self.real:
            return
        if self.server is not None:
            self.server.kill()
            self.server.wait()
        for name in self.names:
            for pid in _run("ip", "netns", "pids", name).split():
                os.kill(int(pid), signal.SIGKILL)
            _run("ip", "netns", "del", name)

    # -- what runs

    def hostfile(self, home: Path) -> Path:
        (home / "hosts").write_text(f"{self.first} slots=1\n{self.second} slots=1\n")
        return home / "hosts"

    def start(self, *words: str, cwd: Path, **kwargs) -> subprocess.Popen:
        """`align` on the first host, with the ranks of the recipe on both."""
        self.hostfile(cwd)
        line = [sys.executable, "-m", "align_cli", words[0], "launch.hostfile=hosts", *self.settings, *words[1:]]
        if self.real:
            inside = ["sh", "-c", 'hostname first && exec "$@"', "sh", *line]
            line = ["ip", "netns", "exec", self.names[0], "unshare", "--uts", *inside]
        return subprocess.Popen(line, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)

    def align(self, *words: str, cwd: Path, **kwargs) -> tuple[int, str]:
        """(exit code, output) of a command on the first host."""
        process = self.start(*words, cwd=cwd, **kwargs)
        said = process.communicate(timeout=900)[0]
        return process.returncode, said

    def processes(self, host: str) -> list[int]:
        """The processes on a host, without its sshd."""
        if self.real:
            pids = map(int, _run("ip", "netns", "pids", self.names[self.hosts.index(host)]).split())
            return [pid for pid in pids if pid not in getattr(self, "idle", ())]
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("ALIGN_HOST") == host and str(self.folder) in process.cwd():
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def ranks(self, host: str) -> list[int]:
        """The ranks on a host."""
        found = []
        for pid in self.processes(host):
            try:
                words = psutil.Process(pid).cmdline()
            except psutil.Error:
                continue
            if "align_cli.run.worker" in words and not any(word.startswith("deepspeed.launcher") for word in words):
                found.append(pid)
        return found

    def nothing_is_left(self) -> None:
        """Wait until no process of a run is left on any host."""
        for host in self.hosts:
            _until(lambda host=host: not self.processes(host), f"{host} has no processes")


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def _until(state, what: str) -> None:
    until = time.monotonic() + 120
    while not state():
        assert time.monotonic() < until, f"waited in vain until {what}"
        time.sleep(0.1)
