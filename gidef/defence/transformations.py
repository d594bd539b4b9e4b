"""Policies of image transformations: ATS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gidef.defence.encode import Unknown
from gidef.errors import InputError
from gidef.types import Client, Tensors

Policy = tuple[tuple[tuple[str, int], ...], ...]
"""Alternatives, each a sequence of (transformation, level)."""
LEVELS = 10
DIRECTED = ("shearX", "shearY", "translateX", "translateY", "color", "contrast", "sharpness", "brightness")
"""Transformations that draw a sign."""
FLAT = ("posterize", "equalize")
MOST_DRAWS = 32
"""Above this number of sequences that a policy may draw, an attack searches none of them, and recovers the transformed image."""


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return (base + factor * (images - base)).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    """Luma (n, 1, H, W) of three channels, ITU-R 601; of other numbers of channels their mean."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * images.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def _smooth(images: Tensor) -> Tensor:
    """A 3 × 3 mean that counts the middle five times; the border stays."""
    kernel = images.new_ones(1, 1, 3, 3)
    kernel[..., 1, 1] = 5
    inner = F.conv2d(images.flatten(0, 1)[:, None], kernel / 13).view(*images.shape[:2], images.shape[2] - 2, -1)
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = inner
    return smooth


def _sampled(images: Tensor, x_in: Tensor, y_in: Tensor, fill: float) -> Tensor:
    """Bilinear values at pixel coordinates (n, H, W), of which 0.5 is the middle of the first pixel; `fill` outside."""
    height, width = images.shape[-2:]
    grid = torch.stack((2 * x_in / width - 1, 2 * y_in / height - 1), dim=-1).to(images)
    return F.grid_sample(images - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + fill


def _places(images: Tensor) -> tuple[Tensor, Tensor]:
    """x and y (1, H, W) of the pixels' middles."""
    y, x = (torch.arange(n, device=images.device, dtype=torch.float32) + 0.5 for n in images.shape[-2:])
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return grid_x[None], grid_y[None]


def _shear_x(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    x, y = _places(images)
    return _sampled(images, x + amount * sign[:, 0] * y, y.expand(len(images), -1, -1), 0.0)


def _shear_y(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    x, y = _places(images)
    return _sampled(images, x.expand(len(images), -1, -1), y + amount * sign[:, 0] * x, 0.0)


def _translate_x(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    x, y = _places(images)
    return _sampled(images, x + amount * images.shape[-1] * sign[:, 0], y.expand(len(images), -1, -1), 0.0)


def _translate_y(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    x, y = _places(images)
    return _sampled(images, x.expand(len(images), -1, -1), y + amount * images.shape[-2] * sign[:, 0], 0.0)


def _rotate(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    """Counterclockwise about the middle, in degrees; grey outside."""
    (x, y), (height, width) = _places(images), images.shape[-2:]
    right, down, angle = x - width / 2, y - height / 2, math.radians(amount)
    x_in, y_in = math.cos(angle) * right - math.sin(angle) * down, math.sin(angle) * right + math.cos(angle) * down
    return _sampled(images, (x_in + width / 2).expand(len(images), -1, -1), (y_in + height / 2).expand(len(images), -1, -1), 128 / 255)


def _color(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    return _blend(_grey(images), images, 1 + amount * sign)


def _contrast(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    return _blend(_grey(images).mean((1, 2, 3), keepdim=True), images, 1 + amount * sign)


def _brightness(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images), images, 1 + amount * sign)


def _sharpness(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    return _blend(_smooth(images), images, 1 + amount * sign)


def _posterize(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    """Of 8 bits, the first `amount` stay."""
    step = 2 ** (8 - int(amount))
    return (images * 255).round().div(step, rounding_mode="floor") * step / 255


def _solarize(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    """What is at least `amount`, of 255, becomes its negative."""
    return torch.where((images * 255).round() < amount, images, 1 - images)


def _autocontrast(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    """Each channel stretched to [0, 1]; a constant one stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-12), images)


def _equalize(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    """Each channel's histogram of 256 values made even, by Pillow's rule."""
    values, found = (images * 255).round().long().clamp(0, 255).flatten(2), images.clone()
    for image in range(len(images)):
        for channel in range(images.shape[1]):
            counts = torch.bincount(values[image, channel], minlength=256)
            step = int((counts.sum() - counts[counts > 0][-1]) // 255)
            if step:
                table = ((counts.cumsum(0) - counts + step // 2) // step).clamp(max=255)
                found[image, channel] = (table[values[image, channel]].to(images.dtype) / 255).view_as(found[image, channel])
    return found


def _invert(images: Tensor, amount: float, sign: Tensor) -> Tensor:
    return 1 - images


def _even(first: float, last: float) -> tuple[float, ...]:
    return tuple(first + (last - first) * level / (LEVELS - 1) for level in range(LEVELS))


TRANSFORMATIONS: dict[str, tuple[Callable[[Tensor, float, Tensor], Tensor], tuple[float, ...]]] = {
    "shearX": (_shear_x, _even(0, 0.3)), "shearY": (_shear_y, _even(0, 0.3)),
    "translateX": (_translate_x, _even(0, 150 / 331)), "translateY": (_translate_y, _even(0, 150 / 331)),
    "rotate": (_rotate, _even(0, 30)), "color": (_color, _even(0, 0.5)), "posterize": (_posterize, tuple(map(round, _even(8, 4)))),
    "solarize": (_solarize, _even(256, 0)), "contrast": (_contrast, _even(0, 0.5)), "sharpness": (_sharpness, _even(0, 0.5)),
    "brightness": (_brightness, _even(0, 0.5)), "autocontrast": (_autocontrast, (0.0,) * LEVELS),
    "equalize": (_equalize, (0.0,) * LEVELS), "invert": (_invert, (0.0,) * LEVELS),
}  # fmt: skip
"""By name: (images (n, C, H, W) in [0, 1], amount, signs ±1 (n, 1, 1, 1)) → the same shape; and its amounts by level, as the source has them."""


@dataclass(frozen=True, slots=True)
class Transformed:
    """Every image goes through one alternative of a policy, drawn evenly; what has two directions draws one.

    Args:    policy: alternatives, each a sequence of (transformation, level 0 … 9); () returns what it was given. Labels stay.
    Source:  Gao et al. 2021, arXiv:2011.12505 ("hybrid" policies), transformations and levels as in the authors' code.
    Deviates: no search for a policy; no crop and flip before it; all that moves pixels is bilinear, where the source has the nearest pixel or
             bicubic; images are not rounded to 8 bits on the way.
    Scores:  attacks are scored against the victim's image, not the transformed one. One that overlooks the policy recovers the latter: a shift by
             some pixels ruins its PSNR and hides nothing from a reader, so look at the judge's accuracy and at the pictures.
    Broken by: Balunović et al. 2022, arXiv:2111.04706, section 5: the same matching recovers the transformed image, above all early in
             training. Attacks that adapt (A3 and others) search the draw, and so undo the policy, up to what a shift moved out of sight. Measured
             on 4 synthetic cells of 16 × 16 after one round of the default policy, 400 iterations: A0 8.8 dB against the private images, 36.0
             against the transformed ones; A3 23.6 dB against the private ones (undefended 37.3).
    """

    policy: Policy = ()

    def __post_init__(self) -> None:
        for name, level in (one for alternative in self.policy for one in alternative):
            if name not in TRANSFORMATIONS or level not in range(LEVELS):
                raise InputError(f"ATS: {name} {level} is no transformation with a level of 0 to 9; there are {', '.join(TRANSFORMATIONS)}.")

    @property
    def random(self) -> bool:
        return len(self.policy) > 1 or any(name in DIRECTED for alternative in self.policy for name, _ in alternative)

    def encode(self, images: Tensor, labels: Tensor, *, client: Client, generator: Generator) -> tuple[Tensor, Tensor]:
        if not self.policy:
            return images, labels
        chosen = torch.randint(len(self.policy), (len(images),), generator=generator)
        found = images.clone()
        for number, alternative in enumerate(self.policy):
            rows = (chosen == number).nonzero()[:, 0]
            some = images[rows.to(images.device)]
            for name, level in alternative:
                apply, amounts = TRANSFORMATIONS[name]
                sign = (2 * torch.randint(2, (len(rows), 1, 1, 1), generator=generator) - 1).to(images)
                some = apply(some, amounts[level], sign) if len(rows) else some
            found[rows.to(images.device)] = some
        return found, labels

    def draws(self) -> list[list[tuple[str, int, int]]]:
        """Every sequence of (transformation, level, sign) that an image may go through."""
        found = []
        for alternative in self.policy:
            signs = itertools.product(*((-1, 1) if name in DIRECTED else (1,) for name, _ in alternative))
            found += [[(name, level, sign) for (name, level), sign in zip(alternative, some, strict=True)] for some in signs]
        return found

    def unknowns(self, image_shape: tuple[int, ...], size: int) -> dict[str, Unknown]:
        count = len(self.draws())
        return {"draw": Unknown((size, count))} if 0 < count <= MOST_DRAWS else {}

    def imitate(self, images: Tensor, labels: Tensor, found: Tensors) -> tuple[Tensor, Tensor]:
        """The candidate goes through every sequence that the policy may draw, and their results are mixed by weights that are searched: the client's
        own is one of them. Rounding and equalising, which have no slope, are left out."""
        every = []
        for draw in self.draws():
            moved = images
            for name, level, sign in draw:
                apply, amounts = TRANSFORMATIONS[name]
                moved = moved if name in FLAT else apply(moved, amounts[level], images.new_full((len(images), 1, 1, 1), sign))
            every.append(moved)
        return torch.einsum("bd,dbchw->bchw", found["draw"].softmax(-1), torch.stack(every)), labels
