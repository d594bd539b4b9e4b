"""Which reconstruction stands for which image: a gradient does not tell the order of its batch."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gidef.metrics.images import pairwise_mse


def pair(reconstructions: Tensor, truth: Tensor) -> Tensor:
    """The order of reconstructions that fits the truth best: linear assignment, least total MSE.

    Args:    reconstructions: (A, C, H, W), truth: (B, C, H, W), floating, clamped to [0, 1] here; A ≥ B: of what was recovered of a sum
             over clients, the best fitting stand for one client's images.
    Returns: int64 (B,), distinct, a permutation p if A = B, on the device of `reconstructions`: reconstructions[p] stands beside truth.
             Labels and other per-image results are to be permuted with it.
    Raises:  ValueError if image shapes differ, A < B, or a value is NaN.
    """
    if reconstructions.shape[1:] != truth.shape[1:] or len(reconstructions) < len(truth):
        raise ValueError(f"pair: expected images of one shape, as many or more than true ones, got {tuple(reconstructions.shape)} and {tuple(truth.shape)}")
    cost = pairwise_mse(truth, reconstructions)
    if not cost.isfinite().all():
        raise ValueError("pair: an image holds NaN: replace failed reconstructions (say by mid-grey) before scoring")
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(columns, dtype=torch.int64, device=reconstructions.device)
