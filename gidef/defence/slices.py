"""Noise on slices of an update that tell equally much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.func import functional_call

from gidef.defence.noise import AddNoise
from gidef.defence.upload import Packed
from gidef.errors import InputError
from gidef.types import Own, Tensors


@dataclass(frozen=True, slots=True)
class NoisySlices:
    """The update as one vector, in the network's order, is cut into slices of equal sensitivity; some of them, drawn afresh, get noise.

        S_l = mean over b of ‖∂(Σ_j g_lj) / ∂x_b‖₂        for tensor l's gradient g_l, spread evenly over its entries

    The images b are those that the client has at hand. Tensors that the model's loss does not reach count as 0 and fall to the last slice.

    Args:    slices, noisy: how many, and how many of them get noise.  std, relative: of the Gaussian noise, as `AddNoise`; 0 changes no bit.
    Source:  GradDefense, Wang et al., INFOCOM 2022, "Protect privacy from gradient leakage attack in federated learning"; 10 slices, 5 of
             them noisy and std 0.1, absolute, are its published demonstration's.
    Deviates: without the per-example clip of the noisy slices, an option there, for which a delta has no examples, and without the server's
             denoising. Slices end at single entries, where the code's do at multiples of the greatest common divisor of the tensors' sizes.
             Sensitivities are the client's own, not a public root set's. relative by default.
    Broken by: matching with a prior (A3, A8), as other noise is: the quiet slices leave as they are. Over rounds (A9) every slice is quiet at times, and where
               two releases agree bit for bit they show the update itself (`spares`). Untrained small net, batch 1, 4 synthetic cells of 16 px, 300
               iterations: A9 over 4 releases 31.1 dB at std 0.3, 30.2 at 1 and 30.0 at 3, their mean over entries treated alike 31.3, 25.8 and 18.2,
               undefended 32.8. A3, 6 to 12 cells: 29.5 at std 0.3 and 23.3 at 1, with all trusted alike 29.6 and 21.7.
    """

    needs_own: ClassVar[bool] = True
    keeps_scale: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    std: float = 0.1
    relative: bool = True
    slices: int = 10
    noisy: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.noisy <= self.slices:
            raise InputError(f"noisy={self.noisy} of slices={self.slices}: expected 1 to slices.")
        AddNoise(std=self.std)

    @property
    def random(self) -> bool:
        return self.std > 0

    @property
    def zeros(self) -> str:
        return "noisy" if self.random else "kept"

    @property
    def spares(self) -> bool:
        return self.random and self.noisy < self.slices

    def apply(self, update: Tensors, *, generator: Generator, own: Own) -> Tensors:
        if self.std == 0:
            return update
        places = sliced(update, sensitivities(own), self.slices)
        chosen = torch.randperm(self.slices, generator=generator)[: self.noisy]
        noisy = AddNoise(std=self.std, relative=self.relative).apply(update, generator=generator)
        return {name: torch.where(torch.isin(places[name], chosen.to(tensor.device)), noisy[name], tensor) for name, tensor in update.items()}

    def packed(self, before: Packed) -> Packed:
        return Packed.plain(before.entries) if self.random else before

    def variances(self, update: Tensors) -> Tensors:
        """s v, at most r², as nobody sees which slices have noise: v as `AddNoise`, s the share of them that do, r² the mean square of what left.

        Where `relative`, s v f³ with f = v / r², the same for all tensors: distrust by little noise, which half of an update does not have, costs more than
        it spares. Without f³, in the setting of the figures above, 12 cells: 31.3 dB at std 0.1 and 28.9 at 0.3, where all alike have 32.8 and 29.6.
        """
        share, whole = self.noisy / self.slices, AddNoise(std=self.std, relative=self.relative).variances(update)
        if self.relative:
            share *= (self.std**2 / (0.25 + self.std**2)) ** 3
        return {name: torch.minimum(share * variance, update[name].square().mean()) for name, variance in whole.items()}

    def reveals(self, update: Tensors) -> Tensors:
        return {}

    def imitate(self, update: Tensors, seen: Tensors) -> Tensors:
        return update


def sensitivities(own: Own) -> dict[str, float]:
    """S_l of every parameter, in the network's order."""
    order = [name for name, _ in own.model.named_parameters()]
    images = own.images.detach().requires_grad_()
    weights = {name: own.params[name].detach().requires_grad_() for name in order}
    found = {}
    with torch.enable_grad():
        loss = F.cross_entropy(functional_call(own.model, weights, (images,)), own.labels)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
        for name, gradient in zip(order, gradients, strict=True):
            slope = None
            if gradient is not None and gradient.requires_grad:
                (slope,) = torch.autograd.grad(gradient.sum(), images, retain_graph=True, allow_unused=True)
            found[name] = 0.0 if slope is None else float(slope.flatten(1).norm(dim=1).mean())
    return found


def sliced(update: Tensors, sensitivity: dict[str, float], slices: int) -> dict[str, Tensor]:
    """Of every entry, the number of its slice."""
    total, before, found = sum(sensitivity.get(name, 0.0) for name in update), 0.0, {}
    for name in [*(name for name in sensitivity if name in update), *sorted(update.keys() - sensitivity.keys())]:
        own, count = sensitivity.get(name, 0.0), update[name].numel()
        middle = before + own * (torch.arange(count, dtype=torch.float64) + 0.5) / count
        found[name] = (middle * (slices / total) if total > 0 else middle).long().clamp(max=slices - 1).view_as(update[name]).to(update[name].device)
        before += own
    return found
