"""A scheduler's SIGTERM while worker threads are busy: tasks that would take half a minute, on two threads of a process of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch

from gidef.checkpoint import load_file
from tests.ranks.launch import ROOT, environment

pytestmark = pytest.mark.ranks

JOB = """
import signal, sys, time
from pathlib import Path
from types import SimpleNamespace

import torch

from gidef import audit
from gidef.cells import Task
from gidef.checkpoint import save_file
from gidef.config import Speed
from gidef.parallel import World
from gidef.report import Console

signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
folder, slow = Path(sys.argv[1]), sys.argv[2] == "slow"


def task(number):
    path = folder / f"{number}.safetensors"

    def do(worker, report):
        for step in range(600 if slow and number >= 2 else 1):
            if step == 1:
                (folder / f"running-{number}").touch()
            time.sleep(0.05)
            report(1.0)
        save_file(path, {"number": torch.tensor(number)}, {})

    return Task(str(number), 600.0, path, do)


run = SimpleNamespace(world=World(), console=Console(rank=1), recipe=SimpleNamespace(speed=Speed(workers=2)))
audit._work(run, [task(number) for number in range(4)], "attack")
"""


def test_a_signal_ends_running_tasks_at_once_and_a_resumed_run_repeats_only_those(tmp_path):
    command = [sys.executable, "-c", JOB, str(tmp_path)]
    process = subprocess.Popen([*command, "slow"], env=environment(), cwd=ROOT)
    try:
        deadline = time.monotonic() + 100
        while len(list(tmp_path.glob("running-*"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert before.keys() == {"0.safetensors", "1.safetensors"} and not list(tmp_path.glob("*.tmp"))
    subprocess.run([*command, "fast"], env=environment(), cwd=ROOT, check=True, timeout=100)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(after) == 4 and before.items() <= after.items()
    assert torch.equal(load_file(tmp_path / "3.safetensors")[0]["number"], torch.tensor(3))
