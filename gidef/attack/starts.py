"""Where attacks begin: named starts, and starts from images that the attacker already has."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gidef.errors import InputError
from gidef.rng import generator

# B images, C channels, H, W
NamedStart = Callable[[tuple[int, ...], Generator], Tensor]
"""start(shape (B, C, H, W), generator) → float32 images in [0, 1]. All randomness comes from the generator."""


def normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """0.5 + 0.2 N(0, 1), clipped."""
    return (0.5 + 0.2 * torch.randn(shape, generator=generator)).clamp(0, 1)


def uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform on [0, 1)."""
    return torch.rand(shape, generator=generator)


def constant(shape: tuple[int, ...], generator: Generator, *, level: float = 0.5) -> Tensor:
    """One level everywhere: all restarts are the same, and nothing tells two images of one class apart."""
    return torch.full(shape, level)


def coloured(shape: tuple[int, ...], generator: Generator, *, channel: int) -> Tensor:
    """One channel at 1 and the others at 0. Raises InputError unless images have three channels."""
    if shape[-3] != 3:
        raise InputError(f"a start in one colour needs images of 3 channels, got {shape[-3]}: start from dark, grey or light.")
    images = torch.zeros(shape)
    images[..., channel, :, :] = 1.0
    return images


def patterned(shape: tuple[int, ...], generator: Generator, *, size: int, draw: NamedStart = uniform) -> Tensor:
    """A random patch of size × size pixels, one per image, tiled over it; the last row and column of patches are cut off.

    Source:   Wei et al. 2020, arXiv:2004.10397, section 3 (patterned randomness): neighbourhoods that look alike converge sooner than
              independent pixels do.
    Deviates: the patch's size is in pixels; the paper gives it as a share (a quarter, a half) of the image.
    """
    height, width = shape[-2:]
    patch = draw((*shape[:-2], size, size), generator)
    tiles = (*[1] * (len(shape) - 2), math.ceil(height / size), math.ceil(width / size))
    return patch.repeat(tiles)[..., :height, :width].contiguous()


def smooth(shape: tuple[int, ...], generator: Generator, *, size: int = 4) -> Tensor:
    """`normal` on size × size points, enlarged bilinearly: blobs without the high frequencies that total variation must first remove."""
    coarse = normal((*shape[:-2], size, size), generator)
    return F.interpolate(coarse, shape[-2:], mode="bilinear", align_corners=False)


STARTS: dict[str, NamedStart] = {
    "normal": normal,
    "uniform": uniform,
    "grey": constant,
    "dark": functools.partial(constant, level=0.0),
    "light": functools.partial(constant, level=1.0),
    "red": functools.partial(coloured, channel=0),
    "green": functools.partial(coloured, channel=1),
    "blue": functools.partial(coloured, channel=2),
    "patterned": functools.partial(patterned, size=4),
    "patterned-2": functools.partial(patterned, size=2),
    "patterned-4": functools.partial(patterned, size=4),
    "patterned-8": functools.partial(patterned, size=8),
    "patterned-normal": functools.partial(patterned, size=4, draw=normal),
    "smooth": smooth,
}
"""Named starts. "patterned" is "patterned-4". Dark, light and the colours are the constant starts of Wei et al. 2020."""


def from_images(
    images: Sequence[Tensor] | Tensor, *, noise: Sequence[Tensor] | Tensor | None = None, spread: float = 0.05, seed: int = 0
) -> Callable[[int, int], tuple[Tensor, Tensor | None]]:
    """A start at images that the attacker has: a decoder's output D(z̃(x)), an analytic reconstruction, public images.

        restart 0     the images themselves
        restart r > 0 the images + spread · N(0, 1), clipped to [0, 1], drawn from (seed, observation, restart) alone

    Args:    images: one tensor (B, C, H, W) per observation, or (observations, B, C, H, W), in [0, 1]. They must not come from the
             private images.  noise: as images, where noise is searched; every restart takes it unchanged.  spread: ≥ 0.
    Returns: start(observation, restart) → (images (B, C, H, W) float32, noise or None).
    Raises:  InputError if shapes, numbers or spread are out of range; from the start, for an observation that has no images.
    """
    if not (math.isfinite(spread) and spread >= 0):
        raise InputError(f"spread={spread}: expected a number of at least 0.")
    kept = [one.detach().float().cpu() for one in images]
    noises = None if noise is None else [one.detach().cpu() for one in noise]
    for index, one in enumerate(kept):
        if one.ndim != 4 or not one.isfinite().all() or one.min() < 0 or one.max() > 1:
            raise InputError(f"from_images: observation {index} has {tuple(one.shape)}: expected finite images (B, C, H, W) in [0, 1].")
    if noises is not None and len(noises) != len(kept):
        raise InputError(f"from_images: noise for {len(noises)} observations and images for {len(kept)}: give one each.")

    def start(observation: int, restart: int) -> tuple[Tensor, Tensor | None]:
        if not 0 <= observation < len(kept):
            raise InputError(f"from_images: no images to start observation {observation} from, only {len(kept)} are given: give one tensor each.")
        begin = kept[observation].clone()
        if restart > 0:
            draw = generator(seed, "start from images", observation, restart)
            begin = (begin + spread * torch.randn(begin.shape, generator=draw)).clamp(0, 1)
        return begin, None if noises is None else noises[observation].clone()

    return start
