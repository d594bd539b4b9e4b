"""The small convolutional net for quick runs."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from gidef.errors import InputError

POOLED = 2
"""Side of the pooled map. Pooling to one position took 40 federated rounds to 0.875 on BloodMNIST, to two 30 rounds to 0.902."""


class SmallNet(nn.Module):
    """Three strided convolutions, average pooling to 2×2, one linear layer; about 98 k parameters.

        blocks.0: in_channels → 32,  blocks.1: 32 → 64,  blocks.2: 64 → 128;  neck, an option: 512 → neck;  head: → num_classes

    Each block is a 3×3 convolution of stride 2, GroupNorm with 8 groups and LeakyReLU(0.01), the last one an option.
    The latent of the default cut, `blocks.1`, is 64×7×7 for 28-pixel images and 64×8×8 for 32.

    Args:    num_classes: K.  in_channels: C.  activation: "leaky_relu" or "none".
             neck: features of a linear layer before the head, a place for a late latent of few numbers; None for no such layer.
    Shapes:  images (B, C, H, W) of any size → logits (B, K).
    Raises:  InputError for another activation.
    """

    cuts = ("blocks.0", "blocks.1", "blocks.2")
    default_cut = "blocks.1"

    def __init__(self, num_classes: int, in_channels: int, activation: Literal["leaky_relu", "none"] = "leaky_relu", neck: int | None = None) -> None:
        super().__init__()
        if neck is not None and neck < 1:
            raise InputError(f"neck={neck} of the small net: expected at least 1 feature, or None.")
        if activation not in ("leaky_relu", "none"):
            raise InputError(f'activation={activation!r} of the small net is unknown: choose "leaky_relu" or "none".')
        self.blocks = nn.Sequential()
        for width in (32, 64, 128):
            block = nn.Sequential()
            block.add_module("conv", nn.Conv2d(in_channels, width, 3, stride=2, padding=1))
            block.add_module("norm", nn.GroupNorm(8, width))
            if activation == "leaky_relu":
                block.add_module("act", nn.LeakyReLU())
            self.blocks.append(block)
            in_channels = width
        features = POOLED**2 * in_channels
        self.neck = nn.Identity() if neck is None else nn.Linear(features, neck)
        if neck is not None:
            self.cuts = (*self.cuts, "neck")
        self.head = nn.Linear(neck or features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self._classify(self.blocks(images))

    def forward_from(self, cut: str, latent: Tensor) -> Tensor:
        """Logits (B, K) from what the module named `cut`, one of `cuts`, gives."""
        if cut == "neck":
            return self.head(latent)
        for block in self.blocks[self.cuts.index(cut) + 1 :]:
            latent = block(latent)
        return self._classify(latent)

    def get_classifier(self) -> nn.Module:
        return self.head

    def _classify(self, features: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        if height % POOLED or width % POOLED:
            return self.head(self.neck(F.adaptive_avg_pool2d(features, POOLED).flatten(1)))
        # the same mean; adaptive pooling has no batching rule of its own under vmap
        return self.head(self.neck(F.avg_pool2d(features, (height // POOLED, width // POOLED)).flatten(1)))
