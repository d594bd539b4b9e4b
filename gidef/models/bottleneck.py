"""Variational bottlenecks: a latent goes through a noisy code of its own, and back to its shape."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from gidef.errors import InputError
from gidef.models.seeding import seeded

SMALLEST_STD = 1e-8
"""In the logarithm of the KL term: a server that sends a level of nought gets a finite gradient."""


class Bottleneck(nn.Module, ABC):
    """z → μ(z) + σ(z) ⊙ ε → z̃, with ε ~ N(0, I): takes a Perturbation's place in a SplitModel, without a latent norm.

        μ = `mean`(z),   σ = softplus(`level`(z)),   z̃ = `back`(μ + σ ⊙ ε)

    Attributes: latent_shape, channel_dim: as models.Perturbation.  noise_shape: of one sample's code, and of its ε.
                mean, level, back: the layers, with PyTorch's usual initial weights. There is no floor: σ is what the weights say.
    """

    noise_only: ClassVar[tuple[str, ...]] = ("level.",)
    """Prefixes of the parameters that the net would not have without its noise."""
    noise_shape: tuple[int, ...]
    mean: nn.Module
    level: nn.Module
    back: nn.Module

    def __init__(self, latent_shape: tuple[int, ...], channel_dim: int) -> None:
        super().__init__()
        self.latent_shape, self.channel_dim = tuple(latent_shape), channel_dim

    @abstractmethod
    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(μ, σ) for z (B, *latent_shape), both (B, *noise_shape)."""

    @abstractmethod
    def restore(self, code: Tensor) -> Tensor:
        """z̃ (B, *latent_shape) from a code (B, *noise_shape)."""

    def draw(self, batch: int, *, generator: Generator, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """ε for `batch` images, standard normal (batch, *noise_shape)."""
        return torch.randn((batch, *self.noise_shape), generator=generator, device=generator.device if device is None else device, dtype=dtype)

    @abstractmethod
    def kl(self, mean: Tensor, std: Tensor) -> Tensor:
        """KL(N(μ, σ²) ‖ N(0, 1)), reduced as the source's; scalar."""


class LinearBottleneck(Bottleneck):
    """PRECODE's: linear layers from the flattened latent to a code of `width` entries and back.

    Args:    latent_shape, channel_dim: as models.Perturbation.  width: K ≥ 1.  seed: of the initial weights.
    Raises:  InputError for a width below 1.
    Source:  Scheliga, Mäder and Seeland, WACV 2022, arXiv:2108.04725; K = 256. In the authors' code μ and s are the halves of one linear
             layer, the KL term is summed over the code and divided by ln 2 (bits): so here, the two halves as two layers.
    """

    def __init__(self, latent_shape: tuple[int, ...], channel_dim: int, *, width: int = 256, seed: int = 0) -> None:
        super().__init__(latent_shape, channel_dim)
        if width < 1:
            raise InputError(f"width={width} of the bottleneck: expected at least 1.")
        self.noise_shape, entries = (width,), math.prod(self.latent_shape)
        with seeded(seed, "bottleneck"):
            self.mean, self.level, self.back = nn.Linear(entries, width), nn.Linear(entries, width), nn.Linear(width, entries)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        flat = latent.flatten(1)
        return self.mean(flat), F.softplus(self.level(flat))

    def restore(self, code: Tensor) -> Tensor:
        return self.back(code).reshape(-1, *self.latent_shape)

    def kl(self, mean: Tensor, std: Tensor) -> Tensor:
        """In bits, summed over the code, the mean over the batch."""
        return _divergence(mean, std).sum(1).mean() / math.log(2)


class ConvBottleneck(Bottleneck):
    """CVB's: convolutions from a map of C channels to a code of K = C // 2 (8 if C < 8) at every position, and a 1×1 convolution back.

        σ = softplus(clip(`level`(z), −5, 5))

    Args:    latent_shape: a map, (C, h, w), or (h, w, C) with channel_dim −1.  kernel: odd, of the convolutions.  seed: of the initial weights.
    Raises:  InputError for an even kernel, or a latent that is no map.
    Source:  Scheliga, Mäder and Seeland 2023, arXiv:2309.04515, and the authors' code: the KL term is summed over channels, and the mean
             over positions and batch.
    Deviates: the code's KL term takes σ for a log-variance, ½ Σ (e^σ + μ² − 1 − σ); here it is the divergence of N(μ, σ²). Their layers
             have no biases; these do, which lets a malicious server (A11) press the level to the clip's lower end, σ = 0.0067.
    """

    def __init__(self, latent_shape: tuple[int, ...], channel_dim: int, *, kernel: int = 5, seed: int = 0) -> None:
        super().__init__(latent_shape, channel_dim)
        if kernel < 1 or kernel % 2 == 0:
            raise InputError(f"kernel={kernel} of the bottleneck: expected an odd number, 1 or more.")
        if len(self.latent_shape) != 3:
            raise InputError(f"a convolutional bottleneck needs a map, not a latent of shape {self.latent_shape}: choose another cut, or Precode.")
        channels = self.latent_shape[0 if channel_dim == 1 else -1]
        sites, code = (self.latent_shape[1:] if channel_dim == 1 else self.latent_shape[:-1]), channels // 2 if channels >= 8 else 8
        self.noise_shape = (code, *sites)
        with seeded(seed, "bottleneck"):
            self.mean, self.level = (nn.Conv2d(channels, code, kernel, padding=kernel // 2) for _ in range(2))
            self.back = nn.Conv2d(code, channels, 1)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        maps = latent.movedim(self.channel_dim, 1)
        return self.mean(maps), F.softplus(self.level(maps).clamp(-5, 5))

    def restore(self, code: Tensor) -> Tensor:
        return self.back(code).movedim(1, self.channel_dim)

    def kl(self, mean: Tensor, std: Tensor) -> Tensor:
        """In nats, summed over channels, the mean over positions and batch."""
        return _divergence(mean, std).sum(1).mean()


def _divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) of every entry, in nats."""
    return 0.5 * (std.square() + mean.square() - 1) - std.clamp(min=SMALLEST_STD).log()
