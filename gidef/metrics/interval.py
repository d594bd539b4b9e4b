"""Spread and tail of per-image values: privacy fails per patient, not on average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gidef.rng import generator

CHUNK = 1 << 22  # resampled values held at once, 64 MB with their indices


def bootstrap_interval(
    values: Tensor | Sequence[float], *, seed: int, batch: int = 1, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean.

    Args:    values: (n,), one per image (or per client); n ≥ 1, finite.  seed: equal seeds give equal intervals.
             batch: images of one observation, which stand side by side and leak together; n is a multiple of it.
             level: in (0, 1).  resamples: ≥ 1, means of n / batch observations drawn with replacement.
    Returns: (low, high); None of one observation of several images. One value, or equal values, give a width of zero: an interval
             says nothing of images that were not drawn, and below some twenty observations it is too narrow.
    Raises:  ValueError if there is no value, one is not finite, or an argument is out of range.
    Source:  Efron 1979; percentile method, on a stream of `gidef.rng` of its own. Whole batches: Davison, Hinkley 1997, section 3.8.
    """
    values = _observed(_finite(values, "bootstrap_interval"), batch, "bootstrap_interval")
    if values is None:
        return None
    means = torch.cat([values[chosen].mean(1) for chosen in _resampled(len(values), seed, level, resamples, "bootstrap_interval")])
    return _ends(means, level)


def bootstrap_change(
    ours: Tensor | Sequence[float], other: Tensor | Sequence[float], *, seed: int, batch: int = 1, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of mean(ours) / mean(other) − 1, paired: observations are drawn, each with the values of both.

    Args:    ours, other: (n,), of the same images in the same order; n ≥ 1, finite, other not negative.  The rest as in `bootstrap_interval`.
    Returns: (low, high); None where a drawn mean of `other` is 0, so that the change is not to be had, and of one observation of several images.
    Raises:  ValueError as `bootstrap_interval`, and for two lengths or a negative `other`.
    """
    ours, other = _finite(ours, "bootstrap_change"), _finite(other, "bootstrap_change")
    if len(ours) != len(other) or (other < 0).any():
        raise ValueError(f"bootstrap_change: {len(ours)} and {len(other)} values, the least of the latter {float(other.min())}: expected pairs, other >= 0")
    ours, other = (_observed(values, batch, "bootstrap_change") for values in (ours, other))
    if ours is None:
        return None
    drawn = [(ours[chosen].mean(1), other[chosen].mean(1)) for chosen in _resampled(len(ours), seed, level, resamples, "bootstrap_change")]
    above, below = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return _ends(above / below - 1, level) if (below > 0).all() else None


def _observed(values: Tensor, batch: int, what: str) -> Tensor | None:
    """The mean of each observation (n / batch,); None of one observation of several images, which does not say how another would differ."""
    if batch < 1 or len(values) % batch:
        raise ValueError(f"{what}: {len(values)} values in batches of {batch}: expected batch >= 1, and whole batches")
    return None if 1 < batch == len(values) else values.reshape(-1, batch).mean(1)


def _resampled(count: int, seed: int, level: float, resamples: int, what: str) -> Iterator[Tensor]:
    """Indices (some, count) drawn with replacement, `resamples` rows in all."""
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"{what}: level={level}, resamples={resamples}: expected 0 < level < 1, resamples >= 1")
    random = generator(seed, "bootstrap")
    rows = max(1, CHUNK // count)
    for start in range(0, resamples, rows):
        yield torch.randint(count, (min(rows, resamples - start), count), generator=random)


def _ends(means: Tensor, level: float) -> tuple[float, float]:
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
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
