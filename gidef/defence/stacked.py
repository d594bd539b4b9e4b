"""The undefended client's and the minimax's game as functions of their weights, of which `clients.vectorised` makes one program for K clients.

Losses are sums over the images of a batch, each with its share (see clients.vectorised.Stacked), equal to the players' own to rounding. Terms
that couple the images of a batch (distance correlation, CKA) have no such form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gidef.defence.capacity import capacity_bits
from gidef.models import SplitModel
from gidef.rng import generator
from gidef.similarity import dependence_of_each, ssim
from gidef.types import Client, Tensors

if TYPE_CHECKING:
    from gidef.defence.perturbation import MinimaxSettings


class StackedPlain:
    """Cross-entropy."""

    kept: nn.Module | None = None
    kept_lr = 0.0
    steady = True

    def __init__(self, model: SplitModel) -> None:
        self.model = model

    def begin(self, clients: Sequence[Client], *, seed: int, round: int, progress: float, first: Sequence[bool]) -> None:
        return None

    def noise(self, place: int, rows: Tensor) -> Tensor | None:
        return None

    def kept_steps(self, place: int, epoch: int) -> int:
        return 0

    def forward(self, params: Tensors, images: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        return (functional_call(self.model, params, (images,)),)

    def kept_loss(self, kept: Tensors, outputs: tuple[Tensor, ...], images: Tensor, share: Tensor) -> Tensor:
        raise NotImplementedError("nothing is kept")

    def loss(self, outputs: tuple[Tensor, ...], kept: Tensors, images: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        return (F.cross_entropy(outputs[0], labels, reduction="none") * share).sum()


class StackedMinimax(StackedPlain):
    """The game of perturbation.MinimaxPlayer, of which it takes model, decoder, settings and frozen noise."""

    def __init__(self, model: SplitModel, decoder: nn.Module | None, settings: MinimaxSettings, frozen_noise: Callable[..., Tensor | None]) -> None:
        super().__init__(model)
        self.kept, self.kept_lr, self._settings, self._frozen_noise = decoder, settings.decoder_lr, settings, frozen_noise
        self.steady = settings.dependence_weight == 0  # else its weight grows with the rounds

    def begin(self, clients: Sequence[Client], *, seed: int, round: int, progress: float, first: Sequence[bool]) -> None:
        device = next(self.model.parameters()).device
        self._weight, self._first = self._settings.weight(progress), list(first)
        self._generators = [generator(seed, "noise", round, client.id, device=device) for client in clients]
        tables = [self._frozen_noise(client, seed=seed) for client in clients]
        self._tables = [table if table is None else table.to(device) for table in tables]

    def noise(self, place: int, rows: Tensor) -> Tensor:
        table = self._tables[place]
        if table is not None:
            return table[rows.to(table.device)]
        drawn = self._generators[place]
        return self.model.perturbation.draw(len(rows), generator=drawn, device=drawn.device)

    def kept_steps(self, place: int, epoch: int) -> int:
        return self._settings.decoder_steps_first if self._first[place] and epoch == 0 else self._settings.decoder_steps

    def forward(self, params: Tensors, images: Tensor, noise: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(functional_call(self.model, params, (images, noise), {"full": True}))

    def kept_loss(self, kept: Tensors, outputs: tuple[Tensor, ...], images: Tensor, share: Tensor) -> Tensor:
        reconstruction = functional_call(self.kept, kept, (outputs[3],))
        return (((reconstruction - images).square().mean((-3, -2, -1)) + 0.5 * (1 - ssim(images, reconstruction))) * share).sum()

    def loss(self, outputs: tuple[Tensor, ...], kept: Tensors, images: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        settings, (_, latent, std, perturbed) = self._settings, outputs
        loss = super().loss(outputs, kept, images, labels, share)
        if self._weight > 0:
            reconstruction = functional_call(self.kept, kept, (perturbed,))
            told = dependence_of_each(
                settings.dependence, images, reconstruction, ssim_threshold=settings.ssim_threshold, mse_cap=settings.mse_cap
            )
            loss = loss + self._weight * (told * share).sum()
        if settings.kl_weight > 0:
            per_image = 0 if std.dim() == latent.dim() else None  # a level per channel serves all images
            divergence = vmap(lambda m, s: self.model.perturbation.kl(m[None], s if per_image is None else s[None]), in_dims=(0, per_image))
            loss = loss + settings.kl_weight * (divergence(latent, std) * share).sum()
        if settings.bits_weight > 0:
            loss = loss + settings.bits_weight * capacity_bits(std.expand(latent.shape[1:]))
        return loss
