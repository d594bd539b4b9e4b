"""Several hosts on one machine: network namespaces on a bridge, each with a host name of its own. Linux, root and iproute2."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.ranks.launch import ROOT, environment


def missing() -> str:
    """Why there can be no hosts here; "" if there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "iproute2 (ip) and util-linux (unshare) are needed: apt-get install iproute2"
    tried = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def sh(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


class Hosts:
    """Hosts 1 … count, on a bridge of their own. All names come from the folder, so that two test runs do not meet."""

    def __init__(self, folder: Path, count: int) -> None:
        digest = hashlib.sha256(str(folder).encode()).digest()
        self.tag, self.folder, self.count = "g" + digest.hex()[:5], folder, count
        self.net = f"10.{64 + digest[4] % 64}.{digest[5]}"
        self.processes: list[subprocess.Popen[bytes]] = []

    def name(self, i: int) -> str:
        return f"{self.tag}h{i}"

    def __enter__(self) -> Hosts:
        bridge = f"{self.tag}br"
        sh("ip", "link", "add", bridge, "type", "bridge")
        sh("ip", "link", "set", bridge, "up")
        table = "127.0.0.1 localhost\n" + "".join(f"{self.net}.{i} {self.name(i)}\n" for i in range(1, self.count + 1))
        for i in range(1, self.count + 1):
            here = self.name(i)
            Path("/etc/netns", here).mkdir(parents=True)
            Path("/etc/netns", here, "hosts").write_text(table)
            sh("ip", "netns", "add", here)
            sh("ip", "link", "add", self.cable(i), "type", "veth", "peer", "name", "eth0", "netns", here)
            sh("ip", "link", "set", self.cable(i), "master", bridge, "up")
            sh("ip", "-n", here, "addr", "add", f"{self.net}.{i}/24", "dev", "eth0")
            sh("ip", "-n", here, "link", "set", "eth0", "up")
            sh("ip", "-n", here, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for i in range(1, self.count + 1):
            self.kill(self.pids(i))
        for process in self.processes:
            process.wait()
        for i in range(1, self.count + 1):
            sh("ip", "netns", "del", self.name(i), check=False)
            shutil.rmtree(Path("/etc/netns", self.name(i)), ignore_errors=True)
            sh("ip", "link", "del", self.cable(i), check=False)
        sh("ip", "link", "del", f"{self.tag}br", check=False)

    def cable(self, i: int) -> str:
        return f"{self.tag}v{i}"

    def pids(self, i: int, word: str = "", without: str = "\0\0") -> list[int]:
        """Processes of a host whose command line holds a word and not another."""
        found = []
        for pid in sh("ip", "netns", "pids", self.name(i), check=False).split():
            with contextlib.suppress(OSError):
                line = Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found += [int(pid)] if word in line and without not in line else []
        return found

    def workers(self, i: int) -> list[int]:
        return self.pids(i, "recipes/", without="torch.distributed.run")

    def kill(self, pids: list[int], how: int = signal.SIGKILL) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)

    def link(self, i: int, state: str) -> None:
        sh("ip", "link", "set", self.cable(i), state)

    def limit(self, i: int, mbit: float) -> None:
        """Bandwidth of what a host sends. Its queue takes megabytes, or a long sum would lose packets and measure TCP's patience."""
        sh("tc", "-n", self.name(i), "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", f"{mbit:g}mbit", "burst", "32kbit", "limit", "4mb")

    def start(self, i: int, *command: str, log: Path, **more: str) -> subprocess.Popen[bytes]:
        inside = ["ip", "netns", "exec", self.name(i), "unshare", "--uts", "bash", "-c", f'hostname {self.name(i)}; exec "$@"', "_", *command]
        with log.open("ab") as file:
            process = subprocess.Popen(inside, env=environment(GLOO_SOCKET_IFNAME="eth0", PYTHONPATH=str(ROOT), **more), cwd=ROOT, stdout=file, stderr=file)
        self.processes.append(process)
        return process

    def torchrun(self, i: int, nodes: str, key: str, *script: str, restarts: int, log: Path, **more: str) -> subprocess.Popen[bytes]:
        """One host's agent with one worker; host 1 holds the rendezvous."""
        port = 20000 + int.from_bytes(hashlib.sha256(f"{self.folder}{key}".encode()).digest()[:2], "big") % 20000
        return self.start(
            i, sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1", f"--max-restarts={restarts}",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={self.name(1)}:{port}", f"--rdzv-id={self.tag}{key}",
            "--rdzv-conf=join_timeout=120,last_call_timeout=15", *script, log=log, **more,
        )  # fmt: skip


def until(ready, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
