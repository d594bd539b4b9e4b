"""Networks that know what images look like: an auto-encoder, and a generator with its critic. Attackers train them on public images."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gidef.errors import InputError
from gidef.models.inverter import Upsampler
from gidef.models.seeding import seeded

WIDTH = 64


def autoencoder_for(image_shape: tuple[int, int, int], *, code_dim: int = 128, width_factor: float = 1.0, seed: int = 0) -> AutoEncoder:
    """A variational auto-encoder with initial weights from `seed`; the global random state is as before when this returns.

    Args:    image_shape: (C, H, W).  code_dim: D, numbers per image.  width_factor: multiplies the widths, in steps of 8; 1 gives 1.2 M
             parameters at 32 pixels.
    Raises:  InputError for sizes below 1, or a width_factor that is not above 0.
    """
    width = _width(image_shape, code_dim, width_factor)
    with seeded(seed, "autoencoder"):
        return AutoEncoder(tuple(image_shape), code_dim, width)


def gan_for(image_shape: tuple[int, int, int], *, code_dim: int = 128, width_factor: float = 1.0, seed: int = 0) -> tuple[Generator, Critic]:
    """A generator and its critic, as `autoencoder_for` otherwise."""
    width = _width(image_shape, code_dim, width_factor)
    with seeded(seed, "gan"):
        return Generator(tuple(image_shape), code_dim, width), Critic(tuple(image_shape), width)


class Generator(nn.Module):
    """Codes (N, D), of which N(0, 1) ones are typical, to images (N, C, H, W) in [0, 1]: an `Upsampler` and a sigmoid.

    GroupNorm, LeakyReLU, nothing in place and no state: fit for vmap and for derivatives of derivatives.
    """

    def __init__(self, image_shape: tuple[int, int, int], code_dim: int, width: int) -> None:
        super().__init__()
        self.image_shape, self.code_dim = image_shape, code_dim
        self.upsampler = Upsampler(code_dim, image_shape, width)

    def forward(self, codes: Tensor) -> Tensor:
        return self.upsampler(codes).sigmoid()


class AutoEncoder(nn.Module):
    """encode: images (N, C, H, W) in [0, 1] → mean and log-variance of a Gaussian code, (N, D) each.  generator: codes → images."""

    def __init__(self, image_shape: tuple[int, int, int], code_dim: int, width: int) -> None:
        super().__init__()
        self.image_shape, self.code_dim = image_shape, code_dim
        self.generator = Generator(image_shape, code_dim, width)
        self.body, entries = _downsampling(image_shape, width, norm=True)
        self.head = nn.Linear(entries, 2 * code_dim)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.head(self.body(images - 0.5).flatten(1)).chunk(2, dim=1)
        return mean, 8 * (log_variance / 8).tanh()  # within e^±8, whatever the image

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction from the mean code."""
        return self.generator(self.encode(images)[0])


class Critic(nn.Module):
    """How real images look: (N, C, H, W) → (N,), of spectral norm about 1 per layer.

    Source: Miyato et al. 2018, arXiv:1802.05957. Train mode updates the estimates of the norms; eval mode leaves them.
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.body, entries = _downsampling(image_shape, width, norm=False)
        self.head = spectral_norm(nn.Linear(entries, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(2 * images - 1).flatten(1))[:, 0]


def _downsampling(image_shape: tuple[int, int, int], width: int, *, norm: bool) -> tuple[nn.Sequential, int]:
    """Convolutions of stride 2 down to at most 4×4, and how many numbers they leave."""
    channels, *size = image_shape
    layers: list[nn.Module] = []
    halvings = max(1, math.ceil(math.log2(max(size) / 4)))
    for halving in range(halvings):
        after = max(16, width // 2) if halving == 0 else width
        conv = nn.Conv2d(channels, after, 3, stride=2, padding=1)
        layers += [conv, nn.GroupNorm(8, after), nn.LeakyReLU(0.2)] if norm else [spectral_norm(conv), nn.LeakyReLU(0.2)]
        channels, size = after, [-(-side // 2) for side in size]
    return nn.Sequential(*layers), channels * math.prod(size)


def _width(image_shape: tuple[int, int, int], code_dim: int, width_factor: float) -> int:
    """A multiple of 8, for GroupNorm."""
    if len(image_shape) != 3 or min(image_shape) < 1 or code_dim < 1:
        raise InputError(
            f"a generative prior of images {tuple(image_shape)} and {code_dim} numbers each: expected (channels, height, width), all at least 1."
        )
    if not 0 < width_factor < math.inf:
        raise InputError(f"width_factor={width_factor} of a generative prior: expected a number above 0.")
    return max(16, 8 * round(WIDTH * width_factor / 8))
