"""Noise on updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from gidef.defence.upload import Packed
from gidef.errors import InputError
from gidef.rng import unit_noise
from gidef.types import Tensors


@dataclass(frozen=True, slots=True)
class AddNoise:
    """u + n, with independent entries of n of mean 0 and standard deviation std, or std · q of each tensor where `relative`.

    q is the 95th percentile of the tensor's |u| that are not 0, the ⌈0.95 n⌉-th smallest of n, so that one std serves all layers and nets.

    Args:    std: ≥ 0; 0 changes no bit.  law: "gaussian", or "laplace" of equal power (scale std / √2).
    Source:  Zhu et al. 2019, arXiv:1906.08935, section 5.1: absolute, std 1e-4 to 1e-1, of which 1e-2 and more stop DLG.
    Deviates: relative by default. Zeros do not count: of a pruned tensor q would be 0 with them, and the noise none; a tensor of zeros alone stays as
             it is. No privacy accounting: nothing bounds the update's sensitivity.
    Broken by: matching with a prior (A3, A8) while n is small beside u, and averaging over rounds (A9), which takes n down by √rounds.
               Of noise of one level on all tensors the likeliest candidate is that of the plain distance. Relative noise has a level on each, which the
               release tells, and who adapts trusts a tensor the less the more it has. Untrained small net, batch 1, 4 synthetic cells of 16 px, 300
               iterations, one draw: 20.4 dB at std 1, with all trusted alike 18.7. All alike, 28 px, 200 iterations: 21.9 dB at std 0.1, 19.1 at 0.3,
               12.3 at 1.
    """

    keeps_scale: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    std: float = 0.1
    law: str = "gaussian"
    relative: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf or self.law not in ("gaussian", "laplace"):
            raise InputError(f'std={self.std}, law={self.law!r} of an update\'s noise: expected a number of at least 0, and "gaussian" or "laplace".')

    @property
    def random(self) -> bool:
        return self.std > 0

    @property
    def zeros(self) -> str:
        return "noisy" if self.random else "kept"

    def apply(self, update: Tensors, *, generator: Generator) -> Tensors:
        if self.std == 0:
            return update
        noisy = {}
        for name in sorted(update):
            level = self.std * percentile(update[name]) if self.relative else self.std
            noisy[name] = update[name] + level * draw(update[name], law=self.law, generator=generator)
        return {name: noisy[name] for name in update}

    def packed(self, before: Packed) -> Packed:
        return Packed.plain(before.entries) if self.random else before

    def variances(self, update: Tensors) -> Tensors:
        """std² everywhere, or where `relative` std² q² with q ≈ 2 rms(u) of what it was added to: of a release, rms² = rms(u)² + std² q²."""
        if self.std == 0:
            return {}
        if not self.relative:
            return {name: tensor.new_tensor(self.std**2) for name, tensor in update.items()}
        return {name: tensor.square().mean() * (self.std**2 / (0.25 + self.std**2)) for name, tensor in update.items()}

    def reveals(self, update: Tensors) -> Tensors:
        return {}

    def imitate(self, update: Tensors, seen: Tensors) -> Tensors:
        return update


def draw(like: Tensor, *, law: str, generator: Generator) -> Tensor:
    """Independent entries of mean 0 and variance 1, drawn on the generator's device, as a tensor of `like`'s shape, dtype and device."""
    return unit_noise(like.shape, law=law, generator=generator).to(like)


def percentile(tensor: Tensor) -> Tensor:
    """The ⌈0.95 n⌉-th smallest absolute value of the n entries that are not 0, a scalar; 0 where there are none."""
    sizes = tensor.flatten().abs().sort().values
    zeros = (sizes == 0).sum()
    return sizes.take(zeros + (95 * (len(sizes) - zeros) + 99) // 100 - 1)
