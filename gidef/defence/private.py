"""Differential privacy: of images, by clipped and noised steps (DP-SGD), and of clients, by clipped and noised updates (DP-FedAvg).

    image:   g = (Σ_i∈batch clip(∇ℓ_i, C) + N(0, σ²C² 1)) / B,  every image in the batch with probability q = B / n by itself
             ℓ_i(ε_i) where there is noise ε on the latent: drawn without a look at any image, it leaves (ε, δ) as they are
    client:  Δ = clip(Δ_k, C) + N(0, σ²C²/m 1),  averaged with equal weights over a cohort of m: noise σC/m on the mean
    clip(v, C) = v · min(1, C / ‖v‖)

Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1; McMahan et al. 2018, arXiv:1710.06963, Algorithm 1.
Deviates: noise and samples come from generators that are functions of (seed, round, client), so that a run can be repeated; whoever knows the
seed can subtract the noise, and real training needs fresh, secret, cryptographic randomness. A client's number of examples, its mean training
loss in the record, and the choice of the best round by validation accuracy are not covered by ε.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.func import functional_call, grad_and_value, vmap

from gidef.defence.accounting import Budget, needs_opacus
from gidef.defence.base import Defence, Plain, Simulate
from gidef.defence.clipping import UNCLIPPED
from gidef.defence.ghost import Ghost
from gidef.defence.perturbation import LearnedDefence, MinimaxSettings, client_loss, hold_still
from gidef.defence.upload import Packed
from gidef.errors import InputError
from gidef.models import SplitModel, has_batch_statistics
from gidef.rng import generator
from gidef.types import Client, Tensors
from gidef.updates import norm

AT_ONCE = 2**28
"""Entries of the images' own gradients that are held at the same time, 1 GiB: a batch is clipped and summed in parts of as many images."""


def clip_factors(gradients: Tensors, clip: float) -> Tensor:
    """min(1, C / ‖g_i‖) of each image, (B,), from gradients (B, *shape); the norm is over all tensors. As Opacus, with 1e-6 beside the norm."""
    return factors_of(torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0), clip)


def factors_of(squares: Tensor, clip: float) -> Tensor:
    """As `clip_factors`, from squared norms (B,)."""
    return (clip / ((squares + 1e-30).sqrt() + 1e-6)).clamp(max=1.0)  # 1e-30: the root's slope at 0 is finite


def clipped_sum(gradients: Tensors, clip: float) -> Tensors:
    """Σ_i clip(g_i, C) of gradients (B, *shape); differentiable."""
    factors = clip_factors(gradients, clip)
    return {name: torch.einsum("i,i...->...", factors, g) for name, g in gradients.items()}


def poisson_batches(client: Client, *, batch_size: int, epochs: int, seed: int, round: int) -> Iterator[tuple[int, Tensor]]:
    """(epoch, rows) of each batch, ⌈n / batch_size⌉ an epoch: every image is in it with probability min(1, batch_size / n), by itself.

    Rows ascend; a batch may be empty. A function of (seed, round, client) alone.
    """
    draw, count = generator(seed, "poisson", round, client.id), client.num_examples
    for epoch in range(epochs):
        for _ in range(-(-count // batch_size)):
            yield epoch, (torch.rand(count, generator=draw, dtype=torch.float64) * count < batch_size).nonzero()[:, 0]


class PrivatePlayer(Plain):
    """Plays cross-entropy by DP-SGD's gradients (see clients.local.Player); the client's optimiser steps by them as by any others.

    Each image's own gradient comes from torch.func: the hooks of Opacus' GradSampleModule do not survive the in-place additions of timm's
    residual nets. Clipping, noise and scale are those of Opacus' DPOptimizer. form="ghost" gets the same sums from norms alone, with hooks that do
    survive (see `ghost`); Opacus' own ghost clipping has the hooks that do not, and norms of linear layers and embeddings only.
    Ghosts take 1.8 (small net) and 1.9 times (ResNet-18) the floating-point operations of plain training, and hold no image's own gradient, which are
    24 MiB and 2.7 GiB for 64 images (in parts of 1 GiB at most). Small net, batch 64, one thread, processor seconds beside other jobs: 62 ms, per sample 68; ResNet-18 at
    32 pixels, batch 16, once: 2.4 s, per sample 2.2, with a peak of the process at 1.1 GiB and 1.9.
    """

    def __init__(self, model: SplitModel, *, clip: float, noise_multiplier: float, form: Literal["per_sample", "ghost"] = "per_sample") -> None:
        needs_opacus()
        super().__init__(model)
        self._ghost = Ghost(model) if form == "ghost" else None
        self._clip, self._noise_multiplier = clip, noise_multiplier
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._part = max(1, AT_ONCE // sum(p.numel() for p in self._parameters.values()))

    compile = None
    """What runs is torch.func's transform of the net, which no program serves."""

    def _loss_of_one(self, params: Tensors, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(self.model, params, (image[None],)), label[None])

    def _beside(self, images: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """What else `_loss_of_one` takes of each image, (B, ...)."""
        return ()

    def begin(self, client: Client, *, seed: int, round: int, progress: float, first: bool) -> None:
        device = next(iter(self._parameters.values())).device
        self._noise_generator = generator(seed, "step-noise", round, client.id, device=device)

    def draw_batches(self, client: Client, *, batch_size: int, epochs: int, seed: int, round: int) -> Iterator[tuple[int, Tensor]]:
        """`poisson_batches`, and from now on gradients are divided by their expected size."""
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

        steps_elsewhere = torch.optim.SGD(self._parameters.values(), lr=0.0)  # Opacus wraps an optimiser; the client's own takes the step
        self._mechanism = (DPOptimizer if self._ghost is None else DPOptimizerFastGradientClipping)(
            steps_elsewhere, noise_multiplier=self._noise_multiplier, max_grad_norm=self._clip,
            expected_batch_size=min(batch_size, client.num_examples), generator=self._noise_generator,
        )  # fmt: skip
        return poisson_batches(client, batch_size=batch_size, epochs=epochs, seed=seed, round=round)

    def fill_gradients(self, images: Tensor, labels: Tensor, *, rows: Tensor, epoch: int) -> Tensor:
        """Leave the clipped, noised and divided sum in the parameters' `grad`; returns the mean loss, 0 for an empty batch."""
        if self._ghost is not None:
            return self._fill_by_ghosts(images, labels)
        mechanism, total = self._mechanism, torch.zeros((), device=images.device)
        mechanism.zero_grad(set_to_none=True)
        params = {name: p.detach() for name, p in self._parameters.items()}
        batch = (images, labels, *self._beside(images, rows))
        each = vmap(grad_and_value(self._loss_of_one), in_dims=(None, *(0 for _ in batch)), randomness="different")
        parts = list(zip(*(one.split(self._part) for one in batch), strict=True))
        for number, part in enumerate(parts, start=1):
            if len(part[0]):
                gradients, losses = each(params, *part)
                total += losses.detach().sum()
            else:
                gradients = {name: p.new_zeros((0, *p.shape)) for name, p in params.items()}
            for name, p in self._parameters.items():
                p.grad_sample = gradients[name]
            mechanism.signal_skip_step(number < len(parts))  # clip and add up, but no noise before the last part
            mechanism.pre_step()
            for p in self._parameters.values():
                p.grad_sample = None
        return total / max(len(images), 1)

    def _fill_by_ghosts(self, images: Tensor, labels: Tensor) -> Tensor:
        mechanism, losses = self._mechanism, torch.zeros((), device=images.device)
        mechanism.zero_grad(set_to_none=True)
        found = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        if len(images):
            found, losses = self._ghost.clipped_sum(images, labels, lambda squares: factors_of(squares, self._clip))
        for name, p in self._parameters.items():
            p.grad = found[name]
        mechanism.pre_step()
        return losses.sum() / max(len(images), 1)


class NoisyPrivatePlayer(PrivatePlayer):
    """Plays the loss of a net with noise on its latent, and no decoder, by DP-SGD's gradients: each image's own, under its own draw."""

    def __init__(
        self, model: SplitModel, settings: MinimaxSettings, frozen_noise: Callable[..., Tensor | None], *, clip: float, noise_multiplier: float
    ) -> None:  # fmt: skip
        hold_still(model, settings)
        super().__init__(model, clip=clip, noise_multiplier=noise_multiplier)
        self._settings, self._frozen_noise = settings, frozen_noise

    def begin(self, client: Client, *, seed: int, round: int, progress: float, first: bool) -> None:
        super().begin(client, seed=seed, round=round, progress=progress, first=first)
        self._latent_noise = generator(seed, "noise", round, client.id, device=self._noise_generator.device)
        self._table = self._frozen_noise(client, seed=seed)

    def _beside(self, images: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        if self._table is not None:
            return (self._table[rows.to(self._table.device)].to(images.device),)
        return (self.model.perturbation.draw(len(images), generator=self._latent_noise, device=images.device, dtype=images.dtype),)

    def _loss_of_one(self, params: Tensors, image: Tensor, label: Tensor, noise: Tensor) -> Tensor:
        outputs = functional_call(self.model, params, (image[None], noise[None]), {"full": True})
        return client_loss(
            outputs, image[None], label[None], settings=self._settings, weight=0.0, reconstruct=self.kept, kl=self.model.perturbation.kl
        )  # fmt: skip


class _ImageByImage(Defence):
    """What a victim's batch of B images releases: the noisy sum of clipped gradients over B, as of a client whose expected batch is B."""

    clip: float
    noise_multiplier: float | None

    def stepped(self, make: Callable[[], Simulate], *, generator: Generator | None = None) -> Callable[[], Simulate]:
        """Clipped image by image, over the tensors that are simulated, and noised if there is a generator."""
        std = self._sigma() * self.clip if generator is not None else 0.0

        def made() -> Simulate:
            simulate = make()

            def private(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
                def of_one(image: Tensor, label: Tensor, draw: Tensor | None = None) -> Tensors:
                    return simulate(params, known, image[None], label[None], None if draw is None else draw[None])

                batch = (images, labels) if noise is None else (images, labels, noise)
                alone = len(images) == 1  # serves also where a model cannot be vectorised
                each = {name: g[None] for name, g in of_one(*(one[0] for one in batch)).items()} if alone else vmap(of_one)(*batch)
                total = clipped_sum(each, self.clip)
                return {name: (g + _normal(g, std, generator)) / len(images) if std else g / len(images) for name, g in total.items()}

            return private

        return made

    @property
    def noises_updates(self) -> bool:
        return self.noise_multiplier != 0 or super().noises_updates

    def gradient_noise(self, images: int) -> float:
        """σC / B."""
        return self._sigma() * self.clip / images

    def couples_images(self, terms: Literal["client", "utility"], progress: float) -> bool:
        """Not, as each image's part is clipped by itself, whatever its loss is."""
        return type(self).stepped is not _ImageByImage.stepped

    def _sigma(self) -> float:
        if self.noise_multiplier is None:
            raise ValueError(f"{type(self).__name__} without a noise multiplier cannot train or release: build it with a budget")
        return self.noise_multiplier


class PrivateDefence(_ImageByImage):
    """DP-SGD on cross-entropy.

    noise_multiplier: σ; None for a model that is only looked at.
    Raises: InputError for a model with BatchNorm, whose statistics mix the images that are to be clipped one by one.
    """

    def __init__(
        self, model: SplitModel, *, clip: float, noise_multiplier: float | None, budget: Budget | None = None,
        form: Literal["per_sample", "ghost"] = "per_sample",
    ) -> None:  # fmt: skip
        super().__init__(model)
        if form == "ghost":
            Ghost(model)  # refuses what it does not know before anything starts
        self._form = form
        _refuse_batch_norm(model)
        self.clip, self.noise_multiplier, self.budget = clip, noise_multiplier, budget

    def player(self) -> PrivatePlayer:
        return PrivatePlayer(copy.deepcopy(self.model), clip=self.clip, noise_multiplier=self._sigma(), form=self._form)


class PrivateNoise(_ImageByImage, LearnedDefence):
    """DP-SGD on the loss of a defence with noise on the latent and no decoder: isotropic, of a level learned without an opponent or by its capacity,
    or in a bottleneck.

    ε is DP-SGD's alone: whatever the latent's noise is, each image's part in a sum has norm C at most. A decoder is refused: it learns from the
    images by steps that are neither clipped nor noised, and every later gradient of the client depends on it.

    inner: the defence without DP-SGD; its model is taken over.  noise_multiplier: σ; None for a model that is only looked at.
    Raises: InputError for a decoder, for terms that couple a batch, which only a decoder's have, and for a model with BatchNorm.
    """

    def __init__(self, inner: Defence, *, clip: float, noise_multiplier: float | None) -> None:
        if not isinstance(inner, LearnedDefence) or inner.decoder is not None:
            raise InputError(f"DPSGD of images beside {type(inner).__name__}: it takes noise on the latent without a decoder. Leave one out, or set level=client.")
        super().__init__(inner.model, None, inner.settings)
        _refuse_batch_norm(inner.model)
        self.clip, self.noise_multiplier = clip, noise_multiplier

    def player(self) -> NoisyPrivatePlayer:
        return NoisyPrivatePlayer(
            copy.deepcopy(self.model), self.settings, self.frozen_noise, clip=self.clip, noise_multiplier=self._sigma()
        )  # fmt: skip


def _refuse_batch_norm(model: SplitModel) -> None:
    if has_batch_statistics(model):
        raise InputError("DPSGD clips each image's own gradient, and BatchNorm mixes the images of a batch: set model.norm=frozen or group.")


@dataclass(frozen=True, slots=True)
class ClipAndNoise:
    """DP-FedAvg's part of a client: the update clipped to norm C over all its tensors, plus its share of the cohort's noise.

    Args:    clip: C > 0.  noise_multiplier: σ ≥ 0, None for a model that is only looked at.  cohort_size: m; the noise of m clients adds
             up to σC on the sum.
    Covers:  against who sees sums or means of cohorts only, as under secure aggregation. A server that reads single updates finds noise of
             no more than σC/√m on each: ε does not hold against it.
    Deviates: McMahan et al. let the draw of a cohort amplify privacy, against who does not know it. Our server draws the cohorts, so that a client's ε
             is that of one Gaussian release in each round that it takes part in, without amplification.
    Trap:    a gradient that is released in place of an update is clipped and noised as it is, whatever the learning rate.
    """

    clip: float
    noise_multiplier: float | None
    cohort_size: int

    @property
    def random(self) -> bool:
        return self.noise_multiplier != 0

    @property
    def zeros(self) -> str:
        return "noisy" if self.random else "kept"

    def apply(self, update: Tensors, *, generator: Generator) -> Tensors:
        if self.noise_multiplier is None:
            raise ValueError("ClipAndNoise without a noise multiplier cannot release: build it with a budget")
        std = self.noise_multiplier * self.clip / math.sqrt(self.cohort_size)
        clipped = self.imitate(update, {})
        return {name: tensor + _normal(tensor, std, generator) if std else tensor for name, tensor in clipped.items()}

    def packed(self, before: Packed) -> Packed:
        return Packed.plain(before.entries) if self.random else before

    def keeps_scale(self, released: Tensors) -> bool:
        """Whether nothing was clipped: the norm, less that of the noise, is below C by more than its spread allows for."""
        entries = sum(tensor.numel() for tensor in released.values())
        noise = 0.0 if not self.random else (self.noise_multiplier * self.clip) ** 2 / self.cohort_size
        power = float(norm(released)) ** 2 - noise * entries
        return power + 3 * math.sqrt(noise * (2 * noise * entries + 4 * max(power, 0.0))) < (UNCLIPPED * self.clip) ** 2

    def variances(self, update: Tensors) -> Tensors:
        level = (self.noise_multiplier or 0.0) * self.clip / math.sqrt(self.cohort_size)
        return {name: tensor.new_tensor(level**2) for name, tensor in update.items()}

    def reveals(self, update: Tensors) -> Tensors:
        return {}

    def imitate(self, update: Tensors, seen: Tensors) -> Tensors:
        factor = clip_factors({name: tensor[None] for name, tensor in update.items()}, self.clip)[0]
        return {name: tensor * factor for name, tensor in update.items()}


def _normal(like: Tensor, std: float, generator: Generator) -> Tensor:
    """N(0, std²) noise of a tensor's shape, drawn where the generator is."""
    return std * torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)
