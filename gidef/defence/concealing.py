"""Concealing samples: training beside images made to look like nothing and to have the same gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad, grad_and_value

from gidef.defence.encode import Unknown, partners, probabilities, softened
from gidef.errors import InputError
from gidef.types import Client, Tensors

SPREAD = 0.25
"""Distances of images are counted in this part of the range [0, 1], near the standard deviation by which the source normalises."""
DECAY = (3 / 8, 5 / 8, 7 / 8)


def beside(images: Tensor, concealing: Tensor) -> Tensor:
    """Each of B entries before its own of B · c: (B · (1 + c), …)."""
    return torch.cat((images[:, None], concealing.view(len(images), -1, *images.shape[1:])), dim=1).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class Conceal:
    """Beside every image, c others are trained on, whose gradient is the images' own as nearly as can be, and which look unlike them.

        x̂ = argmin  1 − cos(∇L(x̂, ŷ), ∇L(x, y)) + exp(−λ_x mean_i ‖x̂_i − x_i‖₂ / 0.25) + λ_z mean_i ‖f(x̂_i) − f(x_i)‖₂ / ‖f(x_i)‖₂
        from  x̂ = λ_y p + (1 − λ_y) x,   (p, ŷ) evenly of the client's data;   trained on with labels λ_y ŷ + (1 − λ_y) y

    f are the logits, L the mean cross-entropy of the batch under the weights at hand. Adam, its step ×0.1 after 3/8, 5/8 and 7/8 of the
    iterations, which end early once the mean distance exceeds `apart`. x̂ is not kept within [0, 1], as in the source.

    Args:    num_classes: K.  concealed: c ≥ 0; 0 returns what it was given.  iterations: published 1,000, each about three gradients.
             x_weight, z_weight: λ_x, λ_z ≥ 0.  blend: λ_y in [0, 1].  lr: of Adam, in units of 0.25.  apart: in units of 0.25, over an image.
    Source:  Wu et al. 2024 (DCS-2, AAAI), arXiv:2209.05724, by the authors' code (JingWu321/DCS-2).
    Deviates: the loss is the mean over all images, where the source weights (c = 1) both parts by 1/3, at λ_y = 1 by 1/2; every image is
             sensitive; the gradient is not projected
             where it opposes the true one: in 48 tries on batches of 1 and 8 cells, 0 to 100 iterations, untrained small net, their cosine was
             0.77 to 0.98.
    Scores:  an attack returns one image per private one, and is scored against that.
    Labels:  "known" grants the private images' classes, nothing of the concealing ones. Attacks that adapt search the concealing images and
             their soft labels beside the candidate.
    Broken by: by its own aim the released direction stays near the true gradient, which A0 matches all the same; and an attacker who searches
             the concealing images as well has a model without misfit. Measured as for MixUp, at 20 iterations instead of the published 1,000: A0
             17.1 dB, A3 24.8.
    """

    num_classes: int
    concealed: int = 1
    iterations: int = 100
    x_weight: float = 0.01
    z_weight: float = 0.01
    blend: float = 0.7
    lr: float = 0.1
    apart: float = 150.0
    needs_model = True

    def __post_init__(self) -> None:
        if self.concealed < 0 or self.iterations < 0 or not 0 <= self.blend <= 1:
            raise InputError(
                f"concealed={self.concealed}, iterations={self.iterations}, blend={self.blend} of DCS: expected counts of at least 0 and a share in [0, 1]."
            )

    @property
    def random(self) -> bool:
        return self.concealed > 0

    def encode(
        self, images: Tensor, labels: Tensor, *, client: Client, generator: Generator, model: nn.Module, params: Tensors
    ) -> tuple[Tensor, Tensor]:
        if self.concealed == 0:
            return images, labels
        labels = probabilities(labels, self.num_classes)
        each, own = (tensor.repeat_interleave(self.concealed, dim=0) for tensor in (images, labels))
        others, their = partners(client, len(each), num_classes=self.num_classes, generator=generator, like=images)
        start = self.blend * others + (1 - self.blend) * each
        hidden = self._fitted(start, each, their, labels, images, model, params)
        return beside(images, hidden), beside(labels, self.blend * their + (1 - self.blend) * own)

    def _fitted(self, start: Tensor, each: Tensor, their: Tensor, labels: Tensor, images: Tensor, model: nn.Module, params: Tensors) -> Tensor:
        """The concealing images. each: the private image of each of them.  their: its label ŷ."""

        def gradient(weights: Tensors, x: Tensor, y: Tensor) -> tuple[Tensors, Tensor]:
            def loss(weights: Tensors) -> tuple[Tensor, Tensor]:
                logits = functional_call(model, weights, (x,))
                return F.cross_entropy(logits, y), logits

            return grad(loss, has_aux=True)(weights)

        true, outputs = gradient(params, images, labels)
        outputs = outputs.repeat_interleave(self.concealed, dim=0).detach()
        square = sum(g.square().sum() for g in true.values())

        def objective(moved: Tensor) -> tuple[Tensor, Tensor]:
            candidate = start + SPREAD * moved
            found, logits = gradient(params, candidate, their)
            inner, own = sum((found[name] * true[name]).sum() for name in true), sum(g.square().sum() for g in found.values())
            apart = (candidate - each).flatten(1).add(1e-12).norm(dim=1).mean() / SPREAD  # 1e-12: a norm has no slope at 0
            output = ((logits - outputs).norm(dim=1) / outputs.norm(dim=1)).mean()
            return 1 - inner / ((own * square).sqrt() + 1e-12) + torch.exp(-self.x_weight * apart) + self.z_weight * output, apart

        moved = torch.zeros_like(start)
        adam = torch.optim.Adam([moved], lr=self.lr)
        slope = grad_and_value(objective, has_aux=True)
        for iteration in range(self.iterations):
            adam.param_groups[0]["lr"] = self.lr * 0.1 ** sum(iteration >= share * self.iterations for share in DECAY)
            moved.grad, (_, apart) = slope(moved)
            adam.step()
            if float(apart) > self.apart:
                break
        return start + SPREAD * moved

    def unknowns(self, image_shape: tuple[int, ...], size: int) -> dict[str, Unknown]:
        count = self.concealed * size
        if count == 0:
            return {}
        images = Unknown((count, *image_shape), lambda shape, draw: 0.5 + 0.2 * torch.randn(shape, generator=draw))
        return {"images": images, "labels": Unknown((count, self.num_classes))}

    def imitate(self, images: Tensor, labels: Tensor, found: Tensors) -> tuple[Tensor, Tensor]:
        own = labels.repeat_interleave(self.concealed, dim=0)
        return beside(images, found["images"]), beside(labels, softened(own, found["labels"], trust=max(0.05, min(0.95, 1 - self.blend))))
