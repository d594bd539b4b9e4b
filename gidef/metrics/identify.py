"""Identification: does a reconstruction point at its patient among others with the same label?"""

from __future__ import annotations

import torch
from torch import Tensor

from gidef.metrics.images import pairwise_mse

ROUNDING = 1e-12  # of MSEs in float64: ties within it are ties


def iip(reconstructions: Tensor, truth: Tensor, labels: Tensor, pool: Tensor, pool_labels: Tensor) -> Tensor:
    """Image identification: 1 where the nearest pool image with the same label (by MSE) is the true one, else 0.

    The mean is the IIP of a batch. It depends on the pool, so state the pool with it; a guess scores one over the number
    of pool images with that label. A tie counts as identified, so copies of an image in the pool are no protection.

    Args:    reconstructions, truth: (B, C, H, W), floating, paired, clamped to [0, 1] here.  labels: int64 (B,), true.
             pool: (N, C, H, W) that contains the true images.  pool_labels: int64 (N,).
    Returns: float32 (B,) of 0 and 1.
    Raises:  ValueError if shapes do not fit, or a true image is not in the pool under its label.
    Source:  the "image identification precision" of Yin et al. 2021 (GradInversion), by MSE instead of deep features.
    """
    if reconstructions.shape != truth.shape or labels.shape != truth.shape[:1] or pool_labels.shape != pool.shape[:1]:
        raise ValueError(
            f"iip: shapes do not fit: reconstructions {tuple(reconstructions.shape)}, truth {tuple(truth.shape)}, "
            f"labels {tuple(labels.shape)}, pool {tuple(pool.shape)}, pool_labels {tuple(pool_labels.shape)}"
        )
    hits = torch.zeros(len(truth), device=truth.device)
    for label in labels.unique():
        mine, same = labels == label, pool[pool_labels == label]
        if not len(same) or (pairwise_mse(truth[mine], same).amin(1) > ROUNDING).any():
            raise ValueError(f"iip: the pool lacks a true image of class {int(label)}: add the victims to the pool")
        to_truth = pairwise_mse(reconstructions[mine], truth[mine]).diagonal()
        hits[mine] = (to_truth <= pairwise_mse(reconstructions[mine], same).amin(1) + ROUNDING).float()
    return hits
