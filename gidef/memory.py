"""How much memory a stretch of work took at its peak, in GiB."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

GIB = 2**30


def forget_peak(device: torch.device) -> bool:
    """From now on the peak of a GPU's tensors is counted anew; and that of the process, where its system lets it: whether it did."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark begins again at what is resident now (Linux)
    except OSError:
        return False
    return _mark() is not None


def peaks(device: torch.device) -> dict[str, float]:
    """`process_peak_gib`: resident memory of this process, the most since the last `forget_peak` that returned True, else since it began, what other
    stretches left there included; `gpu_peak_gib`, on a GPU: bytes that PyTorch's allocator gave to tensors, the most since `forget_peak`, what other
    stretches left there included, and what CUDA and its libraries hold not."""
    found = {"process_peak_gib": _most_resident() / GIB}
    return found | ({"gpu_peak_gib": torch.cuda.max_memory_allocated(device) / GIB} if device.type == "cuda" else {})


def _most_resident() -> int:
    """Bytes. From the kernel's mark of this very program where there is one: getrusage's outlives an exec, and so may be a parent's."""
    mark = _mark()
    if mark is not None:
        return mark
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _mark() -> int | None:
    """The kernel's mark of the most resident bytes; None without Linux, or in one without it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
