"""Initial weights that depend on a seed alone, although layers draw them from PyTorch's global generator."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gidef.rng import stream_seed

_LOCK = threading.RLock()  # the global generator is one per process, while worker threads build models at once


@contextmanager
def seeded(seed: int, *stream: int | str) -> Iterator[None]:
    """Inside, the global CPU generator is that of the named stream; afterwards it is as before. One thread at a time.

    CUDA generators are left alone: models are built on the CPU.
    """
    with _LOCK, torch.random.fork_rng(devices=[], device_type="cpu"):
        torch.default_generator.manual_seed(stream_seed(seed, *stream))
        yield
