"""Spread and tail of per-image values: privacy fails per patient, not on average."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gidef.rng import generator

CHUNK = 1 << 22  # resampled values held at once, 64 MB with their indices


def bootstrap_interval(
    values: Tensor | Sequence[float], *, seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Args:    values: (n,), one per image (or per client); n ≥ 1, finite.  seed: equal seeds give equal intervals.
             level: in (0, 1).  resamples: ≥ 1, means of n values drawn with replacement.
    Returns: (low, high). One value, or equal values, give a width of zero: an interval says nothing of images that
             were not drawn, and below some twenty values it is too narrow.
    Raises:  ValueError if there is no value, one is not finite, or an argument is out of range.
    Source:  Efron 1979; percentile method, on a stream of `gidef.rng` of its own.
    """
    values = _finite(values, "bootstrap_interval")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"bootstrap_interval: level={level}, resamples={resamples}: expected 0 < level < 1, resamples >= 1")
    random, count = generator(seed, "bootstrap"), len(values)
    rows = max(1, CHUNK // count)
    means = torch.cat([
        values[torch.randint(count, (min(rows, resamples - start), count), generator=random)].mean(1)
        for start in range(0, resamples, rows)
    ])  # fmt: skip
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = means.quantile(tails).tolist()
    return low, high


def worst_decile(values: Tensor | Sequence[float], *, higher_is_leak: bool = True) -> float:
    """Mean over the tenth of the images, rounded up, that leak most.

    Args:    values: (n,), n ≥ 1, finite.  higher_is_leak: True for PSNR, SSIM, IIP; False for MSE and other distances.
    Returns: the mean of the ⌈n/10⌉ highest (else lowest) values; up to ten values, the single worst.
    Raises:  ValueError if there is no value or one is not finite.
    """
    values = _finite(values, "worst_decile")
    return float(values.sort(descending=higher_is_leak).values[: math.ceil(len(values) / 10)].mean())


def _finite(values: Tensor | Sequence[float], what: str) -> Tensor:
    """As float64 (n,) on the CPU, or ValueError."""
    values = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    if values.dim() != 1 or not len(values) or not values.isfinite().all():
        raise ValueError(f"{what}: expected finite values (n,), n >= 1, got shape {tuple(values.shape)} (or NaN, inf)")
    return values
