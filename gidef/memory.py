"""How much memory a stretch of work took at its peak, in GiB."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

GIB = 2**30


def forget_peak(device: torch.device) -> None:
    """From now on the peak of a GPU's tensors is counted anew; that of a process cannot be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> dict[str, float]:
    """`process_peak_gib`: resident memory of this process, the most since it began, whatever it did then; `gpu_peak_gib`, on a GPU: bytes that PyTorch's
    allocator gave to tensors, the most since `forget_peak`, what other stretches left there included, and what CUDA and its libraries hold not."""
    found = {"process_peak_gib": _most_resident() / GIB}
    return found | ({"gpu_peak_gib": torch.cuda.max_memory_allocated(device) / GIB} if device.type == "cuda" else {})


def _most_resident() -> int:
    """Bytes. From the kernel's mark of this very program where there is one: getrusage's outlives an exec, and so may be a parent's."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # no Linux, or one without it
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
