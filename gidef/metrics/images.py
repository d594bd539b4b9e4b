"""Distances between an image and its reconstruction, one value per pair, after clamping to [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from gidef import similarity


def clamped(images: Tensor) -> Tensor:
    """Images as every metric sees them: clamped to [0, 1], dtype kept; NaN stays NaN.

    Args:    images: (B, C, H, W), floating.
    Raises:  ValueError for another rank or dtype (uint8 images are to be divided by 255 first).
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"expected floating images (B, C, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}")
    return images.detach().clamp(0, 1)


def clamped_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`clamped` of both; ValueError if their shapes differ, for broadcasting would compare the wrong images."""
    if x.shape != y.shape:
        raise ValueError(f"expected equal shapes, got {tuple(x.shape)} and {tuple(y.shape)}")
    return clamped(x), clamped(y)


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over channels and pixels.

    Args:    x, y: (B, C, H, W), floating, clamped to [0, 1] here.
    Returns: (B,) in [0, 1].
    Raises:  ValueError if shapes differ.
    """
    x, y = clamped_pair(x, y)
    return (x - y).square().mean((1, 2, 3))


def variance(images: Tensor) -> float:
    """Of a data set about its mean image, averaged over channels and pixels: what the mean image has for an MSE on these images.

    Args:    images: (N, C, H, W), floating, clamped to [0, 1] here; N ≥ 1.
    Returns: in [0, 1/4].
    """
    return float(clamped(images).var(0, correction=0).double().mean())


def nmse(x: Tensor, y: Tensor, *, variance: float) -> Tensor:
    """Normalised mean squared error MSE / σ², comparable between data sets of unlike contrast: 0 is an exact copy, and about 1 what knowing no more
    than the data set's mean image buys.

    Args:    x, y: (B, C, H, W), floating, clamped to [0, 1] here.  variance: σ² of the data set the images are from (`variance`), ≥ 0.
    Returns: (B,), ≥ 0; without variance infinite, and NaN for equal images.
    Raises:  ValueError if shapes differ.
    Source:  Weigend and Gershenfeld 1993 (the Santa Fe competition's NMSE, Σ (x − x̂)² / Σ (x − x̄)²).
    Deviates: x̄ is an image, and σ² one number of a reference set (the public images), not of the images that are scored: a mean over images
             is then the ratio of means, and no flat image dominates it. NMSE as ‖x − x̂‖² / ‖x‖² (fastMRI, arXiv:1811.08839) is another
             measure, which falls with brightness.
    """
    return mse(x, y) / torch.tensor(variance, dtype=x.dtype)


def psnr_db(x: Tensor, y: Tensor, *, cap: float = 100.0) -> Tensor:
    """Peak signal-to-noise ratio 10 log₁₀(1 / MSE) in dB for peak 1. A batch's PSNR is the mean of these values.

    Args:    x, y: (B, C, H, W), floating, clamped to [0, 1] here.  cap: the most an image can score. Equal images are
             at +∞, which would swallow any mean; cap=inf returns what the formula says.
    Returns: (B,) in [0, cap].
    Raises:  ValueError if shapes differ.
    """
    return (-10 * mse(x, y).log10()).clamp(max=cap)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """`similarity.ssim` (11×11 Gaussian, σ = 1.5) after clamping to [0, 1]: (B,) in [-1, 1]."""
    return similarity.ssim(*clamped_pair(x, y))


def pairwise_mse(x: Tensor, y: Tensor) -> Tensor:
    """MSE of every image of x with every image of y.

    Args:    x: (N, C, H, W), y: (M, C, H, W), floating, clamped to [0, 1] here.
    Returns: (N, M) float64 (a Gram matrix in double precision: exact to 1e-12, and never negative). It holds both
             batches in float64 meanwhile.
    Raises:  ValueError if the image shapes differ.
    """
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"expected images of one shape, got {tuple(x.shape[1:])} and {tuple(y.shape[1:])}")
    left, right = clamped(x).flatten(1).double(), clamped(y).flatten(1).double()
    squared = left.square().sum(1)[:, None] + right.square().sum(1) - 2 * left @ right.T
    return squared.clamp(min=0) / left.shape[1]
