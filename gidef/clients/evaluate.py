"""Predictions of a trained client on a split, in chunks that ranks and threads can share out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CHUNK = 500
"""Images in one forward pass. A constant, so that nothing about a prediction depends on who computes it."""


def num_chunks(images: Tensor) -> int:
    return -(-len(images) // CHUNK)


@torch.no_grad()
def predict_chunk(model: nn.Module, images: Tensor, chunk: int, noise: Callable[[int, int], Tensor | None]) -> Tensor:
    """Logits float32 (n, num_classes) on the CPU of the chunk's images.

    Args:
        images: uint8 (N, C, H, W).  chunk: in [0, num_chunks(images)).
        noise:  noise(count, chunk) → (count, *latent_shape) on the model's device, or None for a net without noise.
    """
    device = next(model.parameters()).device
    batch = images[chunk * CHUNK : (chunk + 1) * CHUNK].to(device, torch.float32).div_(255)
    drawn = noise(len(batch), chunk)
    return (model(batch) if drawn is None else model(batch, drawn)).float().cpu()
