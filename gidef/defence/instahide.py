"""InstaHide: training on mixtures of several images with random signs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from gidef.defence.encode import Unknown, from_mixtures, partners, probabilities, softened
from gidef.errors import InputError
from gidef.types import Client, Tensors


def coefficients(count: int, mixed: int, largest: float, *, generator: Generator) -> Tensor:
    """(count, mixed): |N(0, 1)| over their sum, drawn again where one exceeds `largest`; ones if mixed = 1."""
    found = torch.ones(count, mixed)
    wrong = torch.full((count,), mixed > 1)
    while wrong.any():
        drawn = torch.randn(int(wrong.sum()), mixed, generator=generator).abs()
        found[wrong] = drawn / drawn.sum(1, keepdim=True)
        wrong = found.amax(1) > largest
    return found


@dataclass(frozen=True, slots=True)
class Hide:
    """Every image is mixed with k − 1 of its client, labels alike, and every entry of the mixture gets a random sign.

        x̃ = s ⊙ Σ_i λ_i x_i,   ỹ = Σ_i λ_i y_i,   s ~ {−1, 1} evenly, for every entry;   Σ_i λ_i = 1, λ_i ≤ c

    on images scaled to [−1, 1]; between encoders they stand on [0, 1], as everywhere: ½ + s ⊙ (Σ_i λ_i x_i − ½). Everything is drawn afresh
    for every batch.

    Args:    num_classes: K.  mixed: k ≥ 1; 1 mixes nothing.  largest: c, above 1 / k, for k > 1.  signs: draw s, else s = 1. With mixed=1 and no
             signs it returns what it was given.
    Source:  Huang et al. 2020, arXiv:2010.02772, section 3 ("inside-dataset"), coefficients as in the authors' code.
    Deviates: the other images are drawn with replacement from the client's data, not by k − 1 permutations of it an epoch; signs flip the
             image on [−1, 1], whatever the network's own normalisation is. Evaluated on plain images, as the authors' code does.
    Scores:  an attack recovers the encoding, and is scored against the victim's image as it stands: with signs about half of the entries are
             negatives, so the score says little of what can be undone, and a good score is no evidence. A9 takes signs and others off as far as several
             rounds tell (`from_mixtures`).
    Labels:  as of MixUp: "known" grants the victim's class, and attacks that adapt search the soft labels from there.
    Broken by: Carlini et al. 2021, arXiv:2011.05315: |x̃| undoes the signs up to one per entry, encodings of the same image are told by it and
             solved for it: `gidef.attack.instahide` does so with many encodings at hand, which no recipe takes out of gradients (60 encodings of 6 smooth
             16-pixel images, k = 2: 67 dB, the mean image 14; of 6 synthetic cells 43 dB from 60, 23 from 24, 21 from 12, the mean image 18). A9 sees a few.
             Measured as for MixUp, at k = 2: A3 22.4 dB against the encodings, 8.2 against the private images; A9 over 4 rounds 20.3 dB untrained and 20.7
             trained, at k = 4 18.7 and 19.0, where the class's mean has 18.4. Learning suffers more: 23 % accuracy
             on plain images after 10 rounds, 82 % undefended.
    """

    num_classes: int
    mixed: int = 4
    largest: float = 0.65
    signs: bool = True

    def __post_init__(self) -> None:
        if self.mixed < 1 or (self.mixed > 1 and not self.largest * self.mixed >= 1.25):
            raise InputError(f"mixed={self.mixed}, largest={self.largest} of InstaHide: expected 1 or more images, and largest · mixed of at least 1.25.")

    @property
    def random(self) -> bool:
        return self.mixed > 1 or self.signs

    def encode(self, images: Tensor, labels: Tensor, *, client: Client, generator: Generator) -> tuple[Tensor, Tensor]:
        if self.mixed > 1:
            share = coefficients(len(images), self.mixed, self.largest, generator=generator).to(images.device)
            images, labels = images * share[:, 0, None, None, None], probabilities(labels, self.num_classes) * share[:, :1]
            for number in range(1, self.mixed):
                others, their = partners(client, len(images), num_classes=self.num_classes, generator=generator, like=images)
                images, labels = images + others * share[:, number, None, None, None], labels + their * share[:, number, None]
        if self.signs:
            flips = torch.randint(2, images.shape, generator=generator, dtype=torch.int8).bool().to(images.device)
            images = torch.where(flips, 1 - images, images)
        return images, labels

    def unknowns(self, image_shape: tuple[int, ...], size: int) -> dict[str, Unknown]:
        return {} if self.mixed == 1 else {"labels": Unknown((size, self.num_classes))}

    def imitate(self, images: Tensor, labels: Tensor, found: Tensors) -> tuple[Tensor, Tensor]:
        """The candidate stands for the encoding itself; its labels are searched."""
        return images, softened(labels, found["labels"])

    @property
    def smooth(self) -> bool:
        return not self.signs

    def unmixed(self, encoded: Tensor, labels: Tensor, granted: Tensor, means: Tensor) -> Tensor:
        """See `from_mixtures`; of `mixed=1` the mean of encodings, with their signs by the class's mean."""
        if self.mixed == 1:
            expected = torch.einsum("bk,kchw->bchw", granted, means)
            return torch.where((expected - 0.5) * (encoded - 0.5) < 0, 1 - encoded, encoded).mean(0)
        return from_mixtures(encoded, labels, granted, means, mixed=self.mixed, largest=self.largest, signs=self.signs)
