"""Decoders from any latent to images: a small one for the loop, a larger one for afterwards."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gidef.errors import InputError
from gidef.models.seeding import seeded


def decoder_for(
    latent_shape: tuple[int, ...],
    channel_dim: int,
    image_shape: tuple[int, ...],
    *,
    size: Literal["loop", "posthoc"],
    width_factor: float = 1.0,
    seed: int = 0,
) -> Decoder:
    """A decoder (B, *latent_shape) → images (B, C, H, W) in [0, 1].

    Args:
        latent_shape: of one sample: a map (C, h, w), or (h, w, C) with channel_dim −1; tokens (N, C), where those that
                      exceed the largest grid of the image's aspect (class and register tokens) are fed to every
                      position; or a vector (C,). Vectors and 1×1 maps are spread over a grid of at most 8×8.
        size:         "loop": two convolutions at the latent's resolution and a pixel shuffle, 32 channels; 32 k
                      parameters from 64×7×7 to 28 pixels. "posthoc": mirrored upsampling by twos, 128 channels and
                      fewer; 0.8 M parameters for the same.
        width_factor: multiplies the channels, in steps of 8.
        seed:         of the initial weights; the global random state is as before when this returns.
    Raises:  InputError for another size, latents of other ranks, or a width_factor that is not above 0.
    """
    if size not in ("loop", "posthoc"):
        raise InputError(f'size={size!r} of the decoder is unknown: choose "loop" or "posthoc".')
    if not 0 < width_factor < math.inf:
        raise InputError(f"width_factor={width_factor} of the decoder: expected a number above 0.")
    if not 1 <= len(latent_shape) <= 3 or channel_dim not in (1, -1):
        raise InputError(f"a latent {tuple(latent_shape)} with channel_dim {channel_dim} has no decoder: expected a map, tokens or a vector.")
    with seeded(seed, "decoder", size):
        grid = LatentGrid(tuple(latent_shape), channel_dim, image_shape[1:])
        body = (_loop_body if size == "loop" else _posthoc_body)(grid, image_shape, width_factor)
        return Decoder(grid, body, image_shape[1:])


class Decoder(nn.Module):
    """grid, then body, then the image's size if the factors overshot it, then a sigmoid."""

    def __init__(self, grid: LatentGrid, body: nn.Module, image_size: tuple[int, ...]) -> None:
        super().__init__()
        self.grid, self.body, self.image_size = grid, body, tuple(image_size)

    def forward(self, latent: Tensor) -> Tensor:
        images = self.body(self.grid(latent))
        if images.shape[-2:] != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bilinear", align_corners=False)
        return images.sigmoid()


class LatentGrid(nn.Module):
    """Any latent as a map (B, channels, height, width); attributes channels, height and width say which.

    Attributes: prefix: tokens that lie outside the grid.
    """

    def __init__(self, latent_shape: tuple[int, ...], channel_dim: int, image_size: tuple[int, ...]) -> None:
        super().__init__()
        channels_last = channel_dim == -1 and len(latent_shape) > 1
        self.channel_at = -1 if channels_last else 1
        self.channels = latent_shape[-1] if channels_last else latent_shape[0]
        sites = latent_shape[:-1] if channels_last else latent_shape[1:]
        tokens = math.prod(sites)
        self.height, self.width = sites if len(sites) == 2 else _largest_grid(tokens, image_size)
        self.prefix = tokens - self.height * self.width
        self.spread, self.everywhere = None, None
        if self.height * self.width == 1:  # no position to tell apart: a linear layer makes the grid
            entries, self.channels = math.prod(latent_shape), 16
            self.height, self.width = (min(8, -(-side // 4)) for side in image_size)
            self.spread = nn.Linear(entries, self.channels * self.height * self.width)
        elif self.prefix:
            self.everywhere = nn.Linear(self.prefix * self.channels, 16)
            self.channels += 16

    def forward(self, latent: Tensor) -> Tensor:
        if self.spread is not None:
            return self.spread(latent.flatten(1)).reshape(-1, self.channels, self.height, self.width)
        sites = latent.movedim(self.channel_at, 1).flatten(2)  # (B, channels, tokens)
        grid = sites[..., self.prefix :].unflatten(-1, (self.height, self.width))
        if self.everywhere is None:
            return grid
        summary = self.everywhere(sites[..., : self.prefix].flatten(1))[..., None, None]
        return torch.cat([grid, summary.expand(-1, -1, self.height, self.width)], dim=1)


def _largest_grid(tokens: int, image_size: tuple[int, ...]) -> tuple[int, int]:
    """The largest height × width with at most so many tokens, in the image's aspect. timm puts class and register tokens first."""
    rows, columns = image_size
    height = max(1, math.isqrt(tokens * rows // columns))
    while height > 1 and height * max(1, height * columns // rows) > tokens:
        height -= 1
    return height, max(1, min(height * columns // rows, tokens // height))


def _loop_body(grid: LatentGrid, image_shape: tuple[int, ...], width_factor: float) -> nn.Sequential:
    """All work at low resolution, since the decoder takes a step beside each of its client's: pixel shuffles by at most 8 do the rest."""
    width = _width(32, width_factor)
    factor = max(-(-image_shape[1] // grid.height), -(-image_shape[2] // grid.width))
    body = nn.Sequential(*_conv(grid.channels, width, kernel=3 if grid.channels <= 256 else 1))
    while factor > 8:
        step = min(4, -(-factor // 8))
        body.extend([nn.Conv2d(width, width * step * step, 3, padding=1), nn.PixelShuffle(step), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)])
        factor = -(-factor // step)
    body.extend([nn.Conv2d(width, image_shape[0] * factor * factor, 3, padding=1), nn.PixelShuffle(factor)])
    return body


def _posthoc_body(grid: LatentGrid, image_shape: tuple[int, ...], width_factor: float) -> nn.Sequential:
    """An encoder's mirror: four convolutions on the grid, where they are cheap, and two after each doubling, with 64, 32, 32, … channels."""
    width = _width(160, width_factor)
    factor = max(image_shape[1] / grid.height, image_shape[2] / grid.width)
    doublings = max(0, math.ceil(math.log2(factor)))
    body = nn.Sequential(*_conv(grid.channels, width, kernel=3 if grid.channels <= 256 else 1))
    for _ in range(3):
        body.extend(_conv(width, width))
    for doubling in range(doublings):
        narrower = _width(max(32, 64 >> doubling), width_factor)
        body.extend([nn.Upsample(scale_factor=2, mode="nearest"), *_conv(width, narrower), *_conv(narrower, narrower)])
        width = narrower
    body.append(nn.Conv2d(width, image_shape[0], 3, padding=1))
    return body


def _conv(before: int, after: int, kernel: int = 3) -> list[nn.Module]:
    return [nn.Conv2d(before, after, kernel, padding=kernel // 2), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]


def _width(channels: int, factor: float) -> int:
    """A multiple of 8, for GroupNorm."""
    return max(8, 8 * round(channels * factor / 8))
