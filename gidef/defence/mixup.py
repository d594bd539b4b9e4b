"""MixUp: training on mixtures of two images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from gidef.defence.encode import Unknown, partners, probabilities, softened
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
             Several rounds help A9 a little: it takes one candidate for all of their mixtures, and averages partners away. On 4 such cells over 4 rounds
             (300 iterations, total variations of 1e-3, 3e-3 and 1e-2) it had 18.9, 19.4 and 18.8 dB against the private images, A3 on one round 16.9,
             17.7 and 17.6. An A9 that searched every round's partner and share as well fitted all rounds and found no more (19.3, 17.8, 13.5): where
             partners may be any image, too many candidates fit. More is had by hand: A3 on every round by itself, λ off each result's soft label, and of the mixture
             of the largest λ the private image, less its partner's class mean; on 4 cells over 4 rounds 24 and 25 dB, untrained and trained, where A9 had 19.5 and 19.0.
             No attack of ours does so yet: take A9's row as too low.
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
