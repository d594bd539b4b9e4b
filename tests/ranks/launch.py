"""Start recipes as a user does, on some ranks, and read what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(ranks: int, recipe: str, *arguments: str) -> list[str]:
    script = [str(ROOT / "recipes" / recipe), *arguments]
    if ranks == 1:
        return [sys.executable, *script]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *script]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_")) and name not in ("RANK", "WORLD_SIZE")}
    return kept | {"OMP_NUM_THREADS": "1", "GIDEF_OFFLINE": "1", "MPLBACKEND": "Agg"} | more


def run(ranks: int, recipe: str, *arguments: str, check: bool = True, timeout: float = 240, **more: str) -> subprocess.CompletedProcess:
    done = subprocess.run(command(ranks, recipe, *arguments), env=environment(**more), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    if check:
        assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done


def run_until(ready, ranks: int, recipe: str, *arguments: str, timeout: float = 120, end: int = signal.SIGKILL) -> int:
    """Start, wait until ready() and send every process of it a signal; returns the exit status."""
    process = subprocess.Popen(
        command(ranks, recipe, *arguments), env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + timeout
        while not ready():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run did not get that far"
            time.sleep(0.02)
    finally:
        if end != signal.SIGKILL and process.poll() is None:
            os.killpg(process.pid, end)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)  # it must end soon, of its own accord
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def record(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
