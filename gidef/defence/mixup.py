"""MixUp: training on mixtures of two images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from gidef.defence.encode import Unknown, from_mixtures, partners, probabilities, softened
from gidef.errors import InputError
from gidef.types import Client, Tensors


@dataclass(frozen=True, slots=True)
class Mix:
    """Every image is mixed with one of its client, labels alike.

        x̃ = λ x + (1 − λ) x′,   ỹ = λ y + (1 − λ) y′,   λ ~ Beta(α, α) for every image,   (x′, y′) evenly of the client's data

    Args:    num_classes: K.  mixing: α ≥ 0; 0 is the limit in which nothing is mixed, and returns what it was given.
    Source:  Zhang et al. 2018, arXiv:1710.09412, equation 1; as a defence of gradients in Huang et al. 2021, arXiv:2112.00059.
    Deviates: partners come from all of the client's data, as the equation has it, not from the batch, as the authors' code, where a batch of
             one image would stay unmixed; and λ is drawn per image, not per batch.
    Scores:  an attack recovers the mixture, and is scored against the victim's image. At small α, λ is near 0 in half of the draws, and then the
             picture shows the partner, another of the client's patients, whom that score does not count.
    Labels:  "known" grants the victim's class, not λ and not the partner's class. Attacks that adapt search the soft labels from there.
    Broken by: gradient matching, which recovers the mixture (Huang et al. 2021); at α ≤ 1 one of the two images is often plain to see in it.
             Measured on 4 synthetic cells of 16 × 16 after one round at α = 1, 400 iterations: A0, which takes the class for the label, 17.9 dB
             against the mixtures; A3, which searches the labels, 32.3 against them and 22.3 against the private images (undefended 37.3).
             Several rounds tell more: A9 searches every round's mixture, and of all of them the private image (`from_mixtures`). On 4 such cells over 4
             rounds, 250 iterations each: 27.7 dB untrained, 24.9 trained, where A3 on one round has 20.8 and 17.4, and the class's mean 18.4.
             In batches of four (8 cells, untrained): 22.5, A3 20.5.
    """

    num_classes: int
    mixing: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.mixing < float("inf"):
            raise InputError(f"mixing={self.mixing} of MixUp: expected a number of at least 0.")

    @property
    def random(self) -> bool:
        return self.mixing > 0

    def encode(self, images: Tensor, labels: Tensor, *, client: Client, generator: Generator) -> tuple[Tensor, Tensor]:
        if self.mixing == 0:
            return images, labels
        others, their = partners(client, len(images), num_classes=self.num_classes, generator=generator, like=images)
        draw = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))  # torch draws no Beta from a generator
        share = torch.from_numpy(draw.beta(self.mixing, self.mixing, size=len(images)).astype(np.float32)).to(images.device)
        labels, flat = probabilities(labels, self.num_classes), share[:, None]
        return torch.lerp(others, images, share[:, None, None, None]), torch.lerp(their, labels, flat)

    def unknowns(self, image_shape: tuple[int, ...], size: int) -> dict[str, Unknown]:
        return {} if self.mixing == 0 else {"labels": Unknown((size, self.num_classes))}

    def imitate(self, images: Tensor, labels: Tensor, found: Tensors) -> tuple[Tensor, Tensor]:
        """The candidate stands for the mixture itself; its labels are searched."""
        return images, softened(labels, found["labels"])

    def unmixed(self, encoded: Tensor, labels: Tensor, granted: Tensor, means: Tensor) -> Tensor:
        """See `from_mixtures`. A share of 0.95 or more is taken for a label of two images of one class."""
        return from_mixtures(encoded, labels, granted, means, mixed=2, largest=0.95)
