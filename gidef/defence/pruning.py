"""Pruning of updates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from gidef.defence.share import Blur
from gidef.defence.upload import Packed
from gidef.errors import InputError
from gidef.types import Tensors

SURE = 4.0
"""Above what an entry's size and its hint add up to, each of which is at most 1."""


@dataclass(frozen=True, slots=True)
class Prune:
    """All but the ⌈(1 − share) n⌉ entries of the largest absolute value of each tensor of n entries become zero.

    Args:    share: p in [0, 1]; 0 changes nothing. Of equal entries at the border, as many as fit stay, by `topk`.
    Source:  gradient compression (Lin et al. 2018, arXiv:1712.01887), as a defence in Zhu et al. 2019, arXiv:1906.08935. Without the
             accumulation of what was not sent.
    Broken by: an attacker who matches only the entries that were sent, which they reveal (A3 and the others that adapt). In a sum each client's are the
               largest of its own candidate among those that anybody sent, the choice made anew at every step. Behind noise they are the largest of
               |u| / ‖u‖ + |r| / ‖r‖, u of the candidate and r of the release. Untrained small net, batch 1, 4 synthetic cells of 16 px, 300 iterations,
               share 0.9, noise of std 1e-4, 0.01, 0.05 and 0.2 (0.001, 0.1, 0.7 and 2.7 times the norm of what was sent): 28.1, 27.8, 24.8 and 17.6 dB;
               by the release alone 27.3, 25.5, 22.2, 12.2, by the candidate alone 26.5, 26.0, 24.4, 17.6, without a choice 21.0, 20.9, 20.4, 16.2. At
               share 0.99: 19.9, 19.2, 18.3, 15.0, against 19.7, 19.4, 17.7, 9.8, and 15.7, 16.1, 16.5, 14.6, and 12.1, 12.1, 12.2, 11.1.
               Behind rounding what was sent for certain is kept too: 24.4 dB at 4 bits, 23.1 by the release alone. In sums of 3: 24.9, by their union 21.4.
    """

    random: ClassVar[bool] = False
    zeros: ClassVar[str] = "pruned"
    keeps_scale: ClassVar[bool] = True
    share: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"share={self.share} of pruning: expected a number in [0, 1].")

    def apply(self, update: Tensors, *, generator: Generator) -> Tensors:
        pruned = {}
        for name, tensor in update.items():
            flat = tensor.flatten()
            chosen = flat.abs().topk(self._kept(len(flat))).indices
            pruned[name] = flat.new_zeros(flat.shape).index_copy(0, chosen, flat[chosen]).view_as(tensor)
        return pruned

    def packed(self, before: Packed) -> Packed:
        return replace(before, kept=min(before.kept, self._kept(before.entries)))

    def _kept(self, entries: int) -> int:
        return entries - int(self.share * entries)

    def reveals(self, update: Tensors) -> Tensors:
        """1 where something was sent, else 0."""
        return {name: (tensor != 0).to(tensor.dtype) for name, tensor in update.items()}

    def imitate(self, update: Tensors, seen: Tensors) -> Tensors:
        return {name: tensor * seen[name] for name, tensor in update.items()}

    def reveals_blurred(self, update: Tensors, blur: Blur) -> Tensors:
        """What is added to an entry's share of its candidate's norm before the largest are taken: SURE where it was surely sent, −SURE where surely not, and
        its share of the release's norm where noise lies between."""
        found = {}
        for name, tensor in update.items():
            there, redone = tensor != 0, blur.summed or blur.redrawn
            if not redone and not (blur.noisy and blur.lost) and int(there.sum()) <= self._kept(tensor.numel()):  # no zero of this tensor became another
                hint = there * SURE
            elif blur.noisy and not redone and not blur.unsaid:
                hint = _of_norm(tensor)
            else:
                hint = torch.zeros_like(tensor)
            found[name] = hint.to(tensor.dtype) if blur.lost else torch.where(there, hint, -SURE).to(tensor.dtype)
        return found

    def imitate_blurred(self, update: Tensors, seen: Tensors) -> Tensors:
        """The candidate's own largest entries as far as the release does not say which; the choice has no slope."""
        pruned = {}
        for name, tensor in update.items():
            order = (_of_norm(tensor.detach()) + seen[name]).flatten()
            chosen = torch.zeros_like(order).scatter(0, order.topk(self._kept(len(order))).indices, 1.0)
            pruned[name] = tensor * (chosen.view_as(tensor) * (seen[name] > -SURE / 2))
        return pruned


def _of_norm(tensor: Tensor) -> Tensor:
    """|u| / ‖u‖; 0 of zeros."""
    tiny = torch.finfo(tensor.dtype).tiny
    sizes = tensor.abs() / tensor.abs().amax().clamp_min(tiny)  # first, so that no square is too small
    return sizes / sizes.norm().clamp_min(tiny)
