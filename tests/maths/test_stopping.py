"""What SIGTERM leaves behind. In processes of their own, which import no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gidef

WAITING = """
import sys, time
from gidef.stopping import leave_on_sigterm
folder = sys.argv[1] or None
leave_on_sigterm(folder, clear=len(sys.argv) > 2)
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    time.sleep(0.3)  # saves what it has
    print("saved", flush=True)
"""


def stop(*arguments: str, times: int = 1, **more: str) -> tuple[int, str]:
    """(exit status, output) of a process that is told to end while it works."""
    environ = {name: value for name, value in os.environ.items() if name != "GIDEF_PREEMPTED"} | {"PYTHONPATH": str(Path(gidef.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", WAITING, *arguments], env=environ | more, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        for _ in range(times):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        return process.wait(timeout=30), process.stdout.read()


@pytest.mark.parametrize("times", [1, 3])
def test_a_run_that_is_told_to_end_saves_what_it_has_and_leaves_a_marker(times, tmp_path):
    """A second signal, of a scheduler beside the launcher's, does not interrupt the saving."""
    assert stop(str(tmp_path / "run"), times=times) == (143, "saved\n")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["preempted"]


def test_the_marker_may_have_another_place_and_none_is_left_where_no_folder_is_known(tmp_path):
    assert stop(str(tmp_path / "run"), GIDEF_PREEMPTED=str(tmp_path / "jobs" / "task-3"))[0] == 143
    assert (tmp_path / "jobs" / "task-3").exists() and not (tmp_path / "run").exists()
    assert stop("")[0] == 143
    (tmp_path / "file").touch()
    assert stop(str(tmp_path / "file")) == (143, "saved\n")  # a marker that cannot be written keeps nobody


def test_a_new_life_removes_the_marker_of_an_earlier_one(tmp_path):
    from gidef.stopping import leave_on_sigterm

    before = signal.getsignal(signal.SIGTERM)
    try:
        (tmp_path / "preempted").touch()
        leave_on_sigterm(tmp_path)  # of a rank that does not lead
        assert (tmp_path / "preempted").exists()
        leave_on_sigterm(tmp_path, clear=True)
        assert not (tmp_path / "preempted").exists()
        leave_on_sigterm(tmp_path, clear=True)
    finally:
        signal.signal(signal.SIGTERM, before)
