"""Which reconstruction stands for which image: a gradient does not tell the order of its batch."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gidef.metrics.images import pairwise_mse


def pair(reconstructions: Tensor, truth: Tensor) -> Tensor:
    """The order of reconstructions that fits the truth best: linear assignment, least total MSE.

    Args:    reconstructions, truth: (B, C, H, W), floating, clamped to [0, 1] here.
    Returns: int64 (B,), a permutation p on the device of `reconstructions`: reconstructions[p] stands beside truth.
             Labels and other per-image results are to be permuted with it.
    Raises:  ValueError if shapes differ or a value is NaN.
    """
    if reconstructions.shape != truth.shape:
        raise ValueError(f"pair: expected equal shapes, got {tuple(reconstructions.shape)} and {tuple(truth.shape)}")
    cost = pairwise_mse(truth, reconstructions)
    if not cost.isfinite().all():
        raise ValueError("pair: an image holds NaN: replace failed reconstructions (say by mid-grey) before scoring")
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(columns, dtype=torch.int64, device=reconstructions.device)
