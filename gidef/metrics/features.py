"""Distance of images in the features of a classifier."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gidef.metrics.images import clamped_pair


def feature_distance(
    features: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, batch_size: int = 256
) -> Tensor:
    """1 − cosine between the features of two images, half the squared distance of the features at unit length.

    Args:    features: images (b, C, H, W) → (b, ...), such as `judge.features`, in eval mode.  x, y: (B, C, H, W),
             floating, clamped to [0, 1] here.  batch_size: b at most.
    Returns: (B,) in [0, 2], in [0, 1] for features that are never negative; 0 for equal images. Features that are all
             zero have no direction: they are at 1 from anything, themselves included.
    Raises:  ValueError if shapes differ.
    """
    x, y = clamped_pair(x, y)
    distances = []
    with torch.no_grad():
        for left, right in zip(x.split(batch_size), y.split(batch_size), strict=True):
            left, right = (torch.nn.functional.normalize(features(part).flatten(1), eps=1e-12) for part in (left, right))
            distances.append((1 - (left * right).sum(1)).clamp(0, 2))
    return torch.cat(distances)
