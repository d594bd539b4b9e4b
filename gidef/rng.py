"""Randomness that never depends on the number of ranks, threads or the order of work."""

import hashlib
import math

import torch
from torch import Tensor


def stream_seed(seed: int, *stream: int | str) -> int:
    """63-bit seed of the named stream: SHA-256 of the seed and the names, so streams never overlap by arithmetic."""
    text = "\x1f".join([repr(int(seed)), *(repr(part) for part in stream)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *stream: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one named stream, e.g. `generator(seed, "noise", round, client)`.

    Args:    seed: the run's seed.  stream: ints and strings that name the purpose.  device: where it draws
             (CPU and CUDA generators give different numbers from the same seed).
    Returns: torch.Generator; equal arguments give equal draws in any process and thread.
    """
    return torch.Generator(device=device).manual_seed(stream_seed(seed, *stream))


def unit_noise(
    shape: tuple[int, ...], *, law: str, generator: torch.Generator, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Independent entries of mean 0 and variance 1.

    Args:    law: "gaussian" or "laplace", of scale 1/√2, hence of equal power.  device: of the generator, which it is unless given.
    """
    device = generator.device if device is None else device
    if law == "gaussian":
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)
    # a difference of two exponentials is Laplace, and never meets the logarithm of zero as the inverse CDF does
    two = torch.empty((2, *shape), device=device, dtype=dtype).exponential_(generator=generator)
    return (two[0] - two[1]) / math.sqrt(2)
