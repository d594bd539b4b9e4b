"""For tests that call `gidef.main` in their own process; imported, the fixture serves the whole file."""

import signal

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
