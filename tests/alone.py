"""For tests that call `gidef.main` in their own process; imported, the fixture serves the whole file."""

import contextlib
import io
import signal
from types import SimpleNamespace

import pytest
import torch

from gidef.report import pictures


@pytest.fixture(autouse=True)
def by_itself(monkeypatch):
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pictures, "_DPI", 10)
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


def ended(start, *arguments, check=True):
    """The exit status and stderr of a command in this process, where one of its own takes seconds more."""
    said, status = io.StringIO(), 0
    with contextlib.redirect_stderr(said):
        try:
            start(*arguments)
        except SystemExit as left:
            status = left.code or 0
    assert not check or status == 0, said.getvalue()
    return SimpleNamespace(returncode=status, stderr=said.getvalue())
