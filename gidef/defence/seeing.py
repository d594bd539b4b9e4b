"""An opponent that also sees what leaves the client: each image's own gradient, beside the perturbed latent.

    s = sketch(∂CE(C(z̃), y) / ∂(θ, η, φ)) of one image,   x̂ = D(z̃, s)

The decoder of the published game is handed z̃ alone, as if nothing of x left by another way. Under the share policy `full` the front's gradient
does: it is made of the images themselves. Ours; the client's loss is differentiated through s too, a second derivative per step. As s depends on φ,
so does R, and the predictor's gradient is no longer a function of z̃ and the labels alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gidef.models import decoder_for
from gidef.models.seeding import seeded
from gidef.sketches import sketch
from gidef.types import Tensors

CHANNELS = 16
"""That a sketch becomes beside the latent's own."""


class SeeingDecoder(nn.Module):
    """(z̃ (B, *latent_shape), s (B, sketch)) → images (B, C, H, W) in [0, 1]: `decoder_for` a latent of `CHANNELS` more channels, which a linear
    layer makes of s.

    Attributes: sketch: length of s, at least one per tensor of the model.
    """

    def __init__(self, latent_shape: tuple[int, ...], channel_dim: int, image_shape: tuple[int, ...], *, sketch: int, width_factor: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        last = channel_dim == -1 and len(latent_shape) > 1
        self.sketch, self._at = sketch, -1 if last else 1
        self._shape = (*latent_shape[:-1], CHANNELS) if last else (CHANNELS, *latent_shape[1:])
        grown = (*latent_shape[:-1], latent_shape[-1] + CHANNELS) if last else (latent_shape[0] + CHANNELS, *latent_shape[1:])
        with seeded(seed, "decoder", "sketch"):
            self.read = nn.Linear(sketch, math.prod(self._shape))
        self.decoder = decoder_for(grown, channel_dim, image_shape, size="loop", width_factor=width_factor, seed=seed)

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        perturbed, told = given
        return self.decoder(torch.cat([perturbed, self.read(told).unflatten(1, self._shape)], self._at))


def told_by_gradients(model: nn.Module, weights: Tensors, images: Tensor, labels: Tensor, noise: Tensor, *, length: int) -> Tensor:
    """s of each image, (B, length), of root mean square 1 where nothing is hashed and of about 1 else, 0 for a zero gradient; differentiable.

    Args:    model: model(images, noise) → logits, those of an image from it alone.  weights: all of its parameters, by which the gradient is, and buffers
             that take the place of the model's.  labels: int64 (B,) or probabilities (B, K).  noise: (B, *latent).
    Raises:  InputError where length is below the number of parameters' tensors.
    """
    names = [name for name, parameter in model.named_parameters()]
    held, rest = {name: weights[name] for name in names}, {name: tensor for name, tensor in weights.items() if name not in names}

    def loss(own: Tensors, image: Tensor, label: Tensor, eps: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, {**rest, **own}, (image[None], eps[None])), label[None])

    return vmap(lambda *one: sketch(grad(loss)(held, *one), length))(images, labels, noise)
