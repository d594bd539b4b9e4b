"""Clipping of updates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gidef.defence.upload import Packed
from gidef.errors import InputError
from gidef.types import Tensors
from gidef.updates import norm

UNCLIPPED = 0.9999
"""Of the bound: below it a norm is no clipped one that was rounded."""


@dataclass(frozen=True, slots=True)
class Clip:
    """u · min(1, bound / ‖u‖₂), of the whole update as one vector, or of each tensor by itself. Shorter vectors keep every bit.

    Args:    bound: > 0, in the update's units.  per_tensor: each tensor by itself.
    Source:  "flat" and "per-layer" clipping of McMahan et al. 2018, arXiv:1710.06963.
    Deviates: without their noise; flat clipping was tried as a defence by itself by Wei et al. 2020, arXiv:2004.10397.
    Broken by: any match of directions. The cosine distance (Geiping et al. 2020, arXiv:2003.14053) does not see a flat clip at all; one
               per tensor is simulated exactly by an attacker who adapts, but makes a slower search of it: untrained small net, batch 1, 4
               synthetic cells of 28 px, bound 0.1: 13.5 dB after 200 iterations, 18.4 after 600, where the naive attack stays at 13.
    Trap:    an attack that matches part of the tensors simulates a flat clip by the norm of that part, which a cosine does not see.
    """

    random: ClassVar[bool] = False
    zeros: ClassVar[str] = "kept"
    bound: float = 1.0
    per_tensor: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.bound < math.inf:
            raise InputError(f"bound={self.bound} of clipping: expected a number above 0.")

    def apply(self, update: Tensors, *, generator: torch.Generator) -> Tensors:
        return self.imitate(update, {})

    def packed(self, before: Packed) -> Packed:
        return before

    def reveals(self, update: Tensors) -> Tensors:
        return {}

    def keeps_scale(self, released: Tensors) -> bool:
        """Whether nothing was clipped, which a norm below the bound tells."""
        short = UNCLIPPED * self.bound
        return all(tensor.norm() < short for tensor in released.values()) if self.per_tensor else float(norm(released)) < short

    def imitate(self, update: Tensors, seen: Tensors) -> Tensors:
        if self.per_tensor:
            return {name: tensor * self._factor([tensor]) for name, tensor in update.items()}
        factor = self._factor(update.values())
        return {name: tensor * factor for name, tensor in update.items()}

    def _factor(self, tensors: Iterable[Tensor]) -> Tensor:
        power = sum(tensor.square().sum() for tensor in tensors)
        long = power > self.bound**2
        return torch.where(long, self.bound * torch.where(long, power, 1.0).rsqrt(), 1.0)  # the inner one spares 0 its infinite slope
