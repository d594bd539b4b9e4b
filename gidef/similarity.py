"""Differentiable similarity of images, shared by defence, attack and metrics.

Every function is pure and free of data-dependent Python, so it runs under `torch.func.vmap`, `grad`, grad of grad and
`torch.compile`. They compute in float32 or float64 whatever autocast says, and take half-precision inputs to float32:
SSIM's variances are differences of nearly equal numbers, which shorter mantissas destroy. Keep TF32 off, as PyTorch does.

A batch or an image without variance has no correlation with anything: it scores 0 and its gradient is exactly zero,
never NaN. "Without" means a root mean square below 8 machine epsilons once the mean is taken off (float32: 1e-6,
against 1e-5 for one grey level in one pixel of a 224 px RGB image), since rounding leaves more than nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from gidef.errors import InputError

# B samples, C channels, H, W
DEPENDENCE = ("pearson2", "ssim", "neg_mse", "dcor", "cka")
"""Names that `dependence` knows."""
COUPLES_BATCH = ("dcor", "cka")
"""Those of them that have no value per image."""


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _full_precision(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Outside autocast, with both inputs in float32 or both in float64; else ValueError."""

    @functools.wraps(function)
    def wrapped(x: Tensor, y: Tensor, *args: object, **options: object) -> Tensor:
        x, y = _widened(x), _widened(y)
        if x.dtype != y.dtype or x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"expected float32 or float64 on both sides, got {x.dtype} and {y.dtype}")
        with torch.autocast(x.device.type, enabled=False):
            return function(x, y, *args, **options)

    return wrapped


@_full_precision
def ssim(x: Tensor, y: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity with a Gaussian window, one value per image.

        SSIM = mean of (2 μx μy + c₁)(2 σxy + c₂) / ((μx² + μy² + c₁)(σx² + σy² + c₂)),   c₁ = 0.01², c₂ = 0.03²

    Args:    x, y: (B, C, H, W), data range 1.  window: odd.  sigma: of the Gaussian, in pixels.
    Returns: (B,) in [-1, 1]; 1 for equal images.
    Raises:  ValueError if shapes or dtypes do not fit, or the window is not odd and positive.
    Source:  Wang et al. 2004. Only windows that lie inside the image count, averaged over windows and channels, with
             population variances: the numbers of skimage.metrics.structural_similarity(gaussian_weights=True, sigma=1.5,
             use_sample_covariance=False, data_range=1). TorchMetrics also averages windows that hang over a reflected
             border, so its image means differ; its map agrees in the interior.
    Deviates: in an image with a side shorter than `window`, the window becomes the largest odd size that fits (28 px: 11,
             8 px: 7) and sigma stays.
    """
    _check_images(x, y)
    if window < 1 or window % 2 == 0 or not sigma > 0:
        raise ValueError(f"ssim: window={window}, sigma={sigma}: expected an odd window >= 1 and sigma > 0")
    height, width = x.shape[-2:]
    fitting = min(window, height - 1 + height % 2, width - 1 + width % 2)  # the largest odd sizes that fit
    rows = _gaussian_band(height, fitting, sigma, x)
    columns = _gaussian_band(width, fitting, sigma, x).T

    def blur(image: Tensor) -> Tensor:
        # Two products with band matrices: batch 64 of 3×28×28, forward and backward on one CPU thread, takes 3 ms
        # against 7 ms for depthwise convolutions; at 224 px it is the other way round, 150 ms against 90 ms for batch 8.
        return rows @ (image @ columns)

    mean_x, mean_y = blur(x), blur(y)
    cross, squares = 2 * mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    covariance = 2 * blur(x * y) - cross
    variances = blur(x * x + y * y) - squares
    c1, c2 = 0.01**2, 0.03**2
    return ((cross + c1) * (covariance + c2) / ((squares + c1) * (variances + c2))).mean((-3, -2, -1))


@_full_precision
def pearson2(x: Tensor, y: Tensor) -> Tensor:
    """Squared Pearson correlation r² over all pixels of an image, after each channel's mean is taken off.

    Squared, because a photographic negative (r = −1) tells everything. Each image's brightness per channel is ignored.

    Args:    x, y: (B, C, H, W).
    Returns: (B,) in [0, 1]; 0 where either image is constant in every channel.
    Raises:  ValueError if shapes or dtypes do not fit.
    """
    _check_images(x, y)
    x, y = _without_channel_means(x), _without_channel_means(y)
    return _cosine(x, y, _is_flat(x) | _is_flat(y)).square()


def total_variation(x: Tensor) -> Tensor:
    """Anisotropic total variation: mean |horizontal difference| + mean |vertical difference|, per image.

    Args:    x: (B, C, H, W), floating.
    Returns: (B,) in [0, 2] for images in [0, 1]; a side of one pixel adds 0. The gradient of |0| is 0.
    """
    return sum(
        step.abs().sum((-3, -2, -1)) / max(step.shape[-3] * step.shape[-2] * step.shape[-1], 1)
        for step in (x.diff(dim=-1), x.diff(dim=-2))
    )


@_full_precision
def distance_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Distance correlation of a batch: √(dCov² / √(dVar²(x) dVar²(y))), with Euclidean distances between samples.

    Args:    x, y: (B, ...) with equal B; what follows may differ, so that a latent can be held against an image.
    Returns: scalar in [0, 1]; 0 if all samples of x, or all of y, are equal.
    Raises:  ValueError if B or dtypes differ.
    Source:  Székely, Rizzo, Bakirov 2007, the plain (V-statistic) form, which NoPeek uses (Vepakomma et al. 2020). It is
             biased upwards: independent batches of a few dozen images score far above 0. Compare values at equal B only.
    """
    x, y = _centred_batches(x, y)
    squared = _cosine(_centred_distances(x), _centred_distances(y), _is_flat(x.flatten()) | _is_flat(y.flatten()))
    positive = squared > torch.finfo(x.dtype).eps  # below it √ has no finite slope, and rounding may leave −1e-9
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


@_full_precision
def cka(x: Tensor, y: Tensor) -> Tensor:
    """Centred kernel alignment HSIC(x, y) / √(HSIC(x, x) HSIC(y, y)) with linear kernels and unbiased HSIC.

    Args:    x, y: (B, ...) with equal B ≥ 4; what follows may differ.
    Returns: scalar, clamped to [0, 1] (independent batches scatter around 0, half of them below); 0 if either kernel
             is degenerate: equal samples, or samples at equal distances from one another.
    Raises:  ValueError if B < 4, where the unbiased HSIC does not exist, or if B or dtypes differ.
    Source:  Song et al. 2012, equation 5 (as U-centred matrices, Székely & Rizzo 2014); Kornblith et al. 2019.
    """
    x, y = _centred_batches(x, y)
    if x.shape[0] < 4:
        raise InputError(f"cka: a batch of {x.shape[0]}: unbiased HSIC needs at least 4 samples; use larger batches")
    left, degenerate_left = _u_centred_kernel(x)
    right, degenerate_right = _u_centred_kernel(y)
    return _cosine(left, right, degenerate_left | degenerate_right).clamp(0, 1)


def dependence(name: str, x: Tensor, y: Tensor, *, ssim_threshold: float = 0.1, mse_cap: float = 0.1) -> Tensor:
    """R(x, x̂) of the minimax: what the client lowers, larger where the reconstruction tells more.

    - "pearson2": mean of r².  "ssim": mean of max(0, SSIM − ssim_threshold).  "neg_mse": mean of −min(MSE, mse_cap).
    - "dcor": distance correlation of the batch.  "cka": unbiased CKA of the batch.

    Args:    x, y: (B, C, H, W) images in [0, 1].  mse_cap: bounds the reward for a reconstruction that blows up.
    Returns: scalar in [0, 1], "neg_mse" in [−mse_cap, 0]. An image without variance (for "dcor" and "cka": a batch)
             scores 0 with zero gradient, but for "neg_mse", which is no correlation and where 0 would be the worst score.
    Raises:  ValueError for an unknown name, shapes that differ, or "cka" on fewer than 4 images.
    """
    _check_images(x, y)
    x, y = _widened(x), _widened(y)
    match name:
        case "dcor":
            return distance_correlation(x, y)
        case "cka":
            return cka(x, y)
    return dependence_of_each(name, x, y, ssim_threshold=ssim_threshold, mse_cap=mse_cap).mean()


def dependence_of_each(name: str, x: Tensor, y: Tensor, *, ssim_threshold: float = 0.1, mse_cap: float = 0.1) -> Tensor:
    """The values (B,) whose mean is `dependence`, of the names that have one per image: "pearson2", "ssim" and "neg_mse".

    Raises:  ValueError for another name, and for shapes that differ.
    """
    _check_images(x, y)
    x, y = _widened(x), _widened(y)
    match name:
        case "pearson2":
            return pearson2(x, y)
        case "ssim":
            flat = _is_flat(_without_channel_means(x)) | _is_flat(_without_channel_means(y))
            return torch.where(flat, 0.0, (ssim(x, y) - ssim_threshold).clamp(min=0))
        case "neg_mse":
            return -(x - y).square().mean((-3, -2, -1)).clamp(max=mse_cap)
    raise InputError(f"dependence {name!r} is unknown: choose one of {', '.join(DEPENDENCE)}")


def _check_images(x: Tensor, y: Tensor) -> None:
    if x.dim() != 4 or x.shape != y.shape:
        raise ValueError(f"expected two image batches (B, C, H, W) of equal shape, got {tuple(x.shape)} and {tuple(y.shape)}")


def _centred_batches(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both as matrices (B, D) with the batch's mean taken off, which moves no distance and keeps Gram matrices exact."""
    if x.dim() < 2 or y.dim() < 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"expected two batches (B, ...) of equal B, got {tuple(x.shape)} and {tuple(y.shape)}")
    return tuple(batch.flatten(1) - batch.flatten(1).mean(0) for batch in (x, y))


def _without_channel_means(x: Tensor) -> Tensor:
    """(B, C·H·W)."""
    return (x - x.mean((-2, -1), keepdim=True)).flatten(1)


def _is_flat(centred: Tensor) -> Tensor:
    """Whether vectors (..., D) vanish but for rounding."""
    return centred.square().mean(-1) <= (8 * torch.finfo(centred.dtype).eps) ** 2


def _cosine(left: Tensor, right: Tensor, degenerate: Tensor) -> Tensor:
    """Cosine over the last dim; 0 with zero gradient where degenerate (the inner `where` keeps 0/0 out of the backward)."""
    norm_left = torch.where(degenerate, 1.0, left.square().sum(-1)).sqrt()
    norm_right = torch.where(degenerate, 1.0, right.square().sum(-1)).sqrt()
    return torch.where(degenerate, 0.0, (left * right).sum(-1) / (norm_left * norm_right))


def _gaussian_band(size: int, window: int, sigma: float, like: Tensor) -> Tensor:
    """(size − window + 1, size): row i holds the normalised Gaussian over pixels i … i + window − 1."""
    offset = torch.arange(size, device=like.device) - torch.arange(size - window + 1, device=like.device)[:, None]
    weights = torch.exp(-0.5 * ((offset - window // 2).to(like.dtype) / sigma).square())
    weights = weights * ((offset >= 0) & (offset < window))
    return weights / weights.sum(1, keepdim=True)


def _centred_distances(x: Tensor) -> Tensor:
    """Doubly centred Euclidean distances between rows, flattened (B·B,)."""
    gram = x @ x.T
    norms = gram.diagonal()
    squared = norms[:, None] + norms - 2 * gram
    apart = squared > 8 * torch.finfo(x.dtype).eps * (norms[:, None] + norms)  # else equal but for rounding
    distances = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)
    return (distances - distances.mean(0) - distances.mean(1, keepdim=True) + distances.mean()).flatten()


def _u_centred_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """U-centred linear kernel, flattened (B·B,), and whether it vanishes but for rounding (then HSIC(x, x) = 0)."""
    count = x.shape[0]
    outside = 1 - torch.eye(count, dtype=x.dtype, device=x.device)
    full = x @ x.T
    kernel = full * outside
    rows = kernel.sum(1) / (count - 2)
    kernel = ((kernel - rows[:, None] - rows + kernel.sum() / ((count - 1) * (count - 2))) * outside).flatten()
    rounding = (8 * torch.finfo(x.dtype).eps * full.diagonal().sum()).square()
    return kernel, _is_flat(x.flatten()) | (kernel.square().sum() <= rounding)
