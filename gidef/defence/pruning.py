"""Pruning of updates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Generator

from gidef.defence.upload import Packed
from gidef.errors import InputError
from gidef.types import Tensors


@dataclass(frozen=True, slots=True)
class Prune:
    """All but the ⌈(1 − share) n⌉ entries of the largest absolute value of each tensor of n entries become zero.

    Args:    share: p in [0, 1]; 0 changes nothing. Of equal entries at the border, as many as fit stay, by `topk`.
    Source:  gradient compression (Lin et al. 2018, arXiv:1712.01887), as a defence in Zhu et al. 2019, arXiv:1906.08935. Without the
             accumulation of what was not sent.
    Broken by: an attacker who matches only the entries that were sent, which they reveal (A3 and the others that adapt).
    """

    random: ClassVar[bool] = False
    keeps_scale: ClassVar[bool] = True
    share: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"share={self.share} of pruning: expected a number in [0, 1].")

    def apply(self, update: Tensors, *, generator: Generator) -> Tensors:
        pruned = {}
        for name, tensor in update.items():
            flat = tensor.flatten()
            kept = len(flat) - int(self.share * len(flat))
            chosen = flat.abs().topk(kept).indices
            pruned[name] = flat.new_zeros(flat.shape).index_copy(0, chosen, flat[chosen]).view_as(tensor)
        return pruned

    def packed(self, before: Packed) -> Packed:
        return replace(before, kept=min(before.kept, before.entries - int(self.share * before.entries)))

    def reveals(self, update: Tensors) -> Tensors:
        """1 where something was sent, else 0."""
        return {name: (tensor != 0).to(tensor.dtype) for name, tensor in update.items()}

    def imitate(self, update: Tensors, seen: Tensors) -> Tensors:
        return {name: tensor * seen[name] for name, tensor in update.items()}
