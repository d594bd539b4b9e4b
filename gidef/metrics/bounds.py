"""What an attacker has without any gradient, as images to be scored like reconstructions.

Public images are those of the public split (never the clients'), floating (N, C, H, W) in [0, 1]. Results are fresh tensors
of the public images' dtype and device. An attack below these bounds has learned nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gidef.metrics.images import clamped, pairwise_mse


def grey(like: Tensor) -> Tensor:
    """Constant mid-grey, 0.5: shape, dtype and device of `like` (B, C, H, W)."""
    return torch.full_like(like, 0.5)


def mean_image(public: Tensor, count: int) -> Tensor:
    """The mean public image, `count` times: (count, C, H, W). ValueError if there is no public image."""
    if not len(public):
        raise ValueError("mean_image: there is no public image")
    return clamped(public).mean(0).repeat(count, 1, 1, 1)


def class_means(public: Tensor, public_labels: Tensor, labels: Tensor) -> Tensor:
    """For each victim the mean of the public images with its label: what a label alone buys.

    Args:    public: (N, C, H, W).  public_labels: int64 (N,).  labels: int64 (B,), the victims'.
    Returns: (B, C, H, W).
    Raises:  ValueError if a victim's class has no public image.
    """
    images, out = clamped(public), public.new_empty(len(labels), *public.shape[1:])
    for label in labels.unique():
        out[labels == label] = images[_of_class(public_labels, label)].mean(0)
    return out


def nearest_public(truth: Tensor, labels: Tensor, public: Tensor, public_labels: Tensor) -> Tensor:
    """For each victim the public image of its label that is nearest by MSE.

    A bound on any attack that returns real images: it is chosen with the truth in hand.

    Args:    truth: (B, C, H, W).  labels: int64 (B,).  public: (N, C, H, W).  public_labels: int64 (N,).
    Returns: (B, C, H, W); of equally near images the first.
    Raises:  ValueError if a victim's class has no public image, or image shapes differ.
    """
    images, out = clamped(public), public.new_empty(len(labels), *public.shape[1:])
    for label in labels.unique():
        same = images[_of_class(public_labels, label)]
        out[labels == label] = same[pairwise_mse(truth[labels == label], same).argmin(1)]
    return out


def _of_class(public_labels: Tensor, label: Tensor) -> Tensor:
    """Mask of the public images with that label; ValueError if there is none."""
    mask = public_labels == label
    if not mask.any():
        raise ValueError(f"class {int(label)} has no public image, so it has no class bound: take a larger public split")
    return mask
