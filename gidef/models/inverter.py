"""The network of learned inversion: from what is seen of a gradient to the images of its batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gidef.errors import InputError
from gidef.models.seeding import seeded

HIDDEN, WIDTH, COMPONENTS = 256, 32, 256


def inverter_for(
    sketch_dim: int, num_classes: int, image_shape: tuple[int, int, int], *, batch_size: int = 1, width_factor: float = 1.0, seed: int = 0
) -> Inverter:
    """An inverter with initial weights from `seed`; the global random state is as before when this returns.

    Args:    sketch_dim: numbers that are given of a gradient.  num_classes: K.  image_shape: (C, H, W).  batch_size: B, images in one
             gradient.  width_factor: multiplies the widths, in steps of 8; 1 gives 1.3 M parameters for 2,048 numbers and 32 pixels,
             of which 0.5 M read the numbers.
    Raises:  InputError for sizes below 1, a single class, or a width_factor that is not above 0.
    """
    if sketch_dim < 1 or num_classes < 2 or batch_size < 1 or len(image_shape) != 3 or min(image_shape) < 1:
        raise InputError(
            f"an inverter of {sketch_dim} numbers, {num_classes} classes and {batch_size} images of {tuple(image_shape)}: "
            "expected at least one number, two classes and one image (channels, height, width)."
        )
    if not 0 < width_factor < math.inf:
        raise InputError(f"width_factor={width_factor} of the inverter: expected a number above 0.")
    with seeded(seed, "inverter"):
        return Inverter(sketch_dim, num_classes, tuple(image_shape), batch_size, width_factor)


class Inverter(nn.Module):
    """What is seen of a gradient, and the labels of its batch, to the batch's images.

        s = (sketch − mean) / std,   c = s · weight           linear: c holds, for each slot b, coefficients of principal components
        l_b = class mean of b's label + c_b · components
        x_b = sigmoid(logit(l_b) + r(s, c, label of b, its rank among equal labels, label counts))

    The linear part is set in closed form (`set_linear`); the network r, an MLP and an `Upsampler` that starts at zero, is trained on
    top of it. A gradient does not tell the order of its batch: slots are the labels in order, c reads them sorted, and images of
    one label are told apart by a rank, 0, 1, …, which means nothing but "another one", so training has to pair them freely.

    Shapes:  sketches (N, sketch_dim), labels int64 (N, B) → images (N, B, C, H, W) in [0, 1].
    Buffers: mean, std (sketch_dim,); weight (sketch_dim, B · rank); class_means (K, C, H, W); components (rank, C·H·W) of unit
             length; spread (B · rank,), the deviation of c. Before `set_linear` the linear part is mid-grey whatever the sketch.
             heldout_loss: scalar, of the fit, ∞ before; fingerprint: int64, of the released tensors' names and shapes, 0 before.
    """

    def __init__(self, sketch_dim: int, num_classes: int, image_shape: tuple[int, int, int], batch_size: int, width_factor: float) -> None:
        super().__init__()
        self.sketch_dim, self.num_classes, self.image_shape, self.batch_size = sketch_dim, num_classes, image_shape, batch_size
        pixels = math.prod(image_shape)
        self.rank = min(max(16, COMPONENTS // batch_size), pixels)
        hidden = max(8, 8 * round(HIDDEN * width_factor / 8))
        seen = sketch_dim + batch_size * self.rank
        self.trunk = nn.Sequential(nn.Linear(seen, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2))
        self.slot = nn.Sequential(nn.Linear(hidden + 2 * num_classes + batch_size, hidden), nn.LeakyReLU(0.2))
        self.upsampler = Upsampler(hidden, image_shape, max(8, 8 * round(WIDTH * width_factor / 8)))
        nn.init.zeros_(self.upsampler.last.weight)
        nn.init.zeros_(self.upsampler.last.bias)
        self.register_buffer("mean", torch.zeros(sketch_dim))
        self.register_buffer("std", torch.ones(sketch_dim))
        self.register_buffer("weight", torch.zeros(sketch_dim, batch_size * self.rank))
        self.register_buffer("class_means", torch.full((num_classes, *image_shape), 0.5))
        self.register_buffer("components", torch.zeros(self.rank, pixels))
        self.register_buffer("spread", torch.ones(batch_size * self.rank))
        self.register_buffer("heldout_loss", torch.tensor(torch.inf))
        self.register_buffer("fingerprint", torch.tensor(0))

    @torch.no_grad()
    def set_linear(self, *, mean: Tensor, std: Tensor, weight: Tensor, class_means: Tensor, components: Tensor, spread: Tensor) -> None:
        """Set the linear part; shapes as in the class."""
        for buffer, value in (
            (self.mean, mean), (self.std, std), (self.weight, weight), (self.class_means, class_means),
            (self.components, components), (self.spread, spread),
        ):  # fmt: skip
            buffer.copy_(value)

    def standardised(self, sketches: Tensor) -> Tensor:
        return (sketches - self.mean) / self.std

    def coefficients(self, sketches: Tensor) -> Tensor:
        """c: (N, B · rank), for slots in the order of sorted labels."""
        return self.standardised(sketches) @ self.weight

    def linear(self, coefficients: Tensor, labels: Tensor) -> Tensor:
        """l: (N, B, C, H, W), unbounded; labels sorted along B."""
        parts = coefficients.unflatten(-1, (self.batch_size, self.rank)) @ self.components
        return self.class_means[labels] + parts.unflatten(-1, self.image_shape)

    def forward(self, sketches: Tensor, labels: Tensor, coefficients: Tensor | None = None) -> Tensor:
        """Images of the batches. coefficients: c if it is to be another one than `coefficients(sketches)`, as in training."""
        if labels.shape[1:] != (self.batch_size,):
            raise InputError(f"labels {tuple(labels.shape)} for an inverter of {self.batch_size} images per gradient: train one for this batch size.")
        c = self.coefficients(sketches) if coefficients is None else coefficients
        order = labels.argsort(dim=1, stable=True)
        labels = labels.gather(1, order)
        seen = self.trunk(torch.cat([self.standardised(sketches), c / self.spread], 1))
        rank = (labels[:, :, None] == labels[:, None, :]).tril(-1).sum(-1)
        classes = F.one_hot(labels, self.num_classes).to(seen)
        counts = classes.mean(1, keepdim=True).expand_as(classes)
        each = torch.cat([seen[:, None].expand(-1, self.batch_size, -1), classes, F.one_hot(rank, self.batch_size).to(seen), counts], -1)
        more = self.upsampler(self.slot(each.flatten(0, 1))).unflatten(0, labels.shape)
        images = (self.linear(c, labels).clamp(0.005, 0.995).logit() + more).sigmoid()
        back = order.argsort(dim=1)
        return images[torch.arange(len(images), device=images.device)[:, None], back]


class Upsampler(nn.Module):
    """A vector (N, entries) as a map (N, C, H, W), unbounded.

    A linear layer gives `width` channels on a grid of at most 8×8; convolutions work there, and one pair after each doubling, which is a
    convolution and a pixel shuffle, with half the channels (16 at least). The last doubling gives the image at once, so that
    nothing is computed at full resolution. GroupNorm, LeakyReLU(0.2), nothing in place. A grid that overshoots the image is cropped.

    Attribute: last: the convolution that gives the image.
    """

    def __init__(self, entries: int, image_shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        channels, *self.size = image_shape
        doublings = max(0, math.ceil(math.log2(max(self.size) / 8)))
        self.grid = width, *(-(-side >> doublings) for side in self.size)
        self.spread = nn.Linear(entries, math.prod(self.grid))
        layers = [nn.GroupNorm(8, width), nn.LeakyReLU(0.2), *_conv(width, width)]
        for _ in range(doublings - 1):
            narrower = max(16, 8 * (width // 16))
            layers += [nn.Conv2d(width, 4 * narrower, 3, padding=1), nn.PixelShuffle(2), nn.GroupNorm(8, narrower), nn.LeakyReLU(0.2)]
            layers += _conv(narrower, narrower)
            width = narrower
        self.body = nn.Sequential(*layers)
        factor = 2 if doublings else 1
        self.last = nn.Conv2d(width, channels * factor**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(factor)

    def forward(self, vectors: Tensor) -> Tensor:
        images = self.shuffle(self.last(self.body(self.spread(vectors).unflatten(-1, self.grid))))
        return images[..., : self.size[0], : self.size[1]]


def _conv(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
