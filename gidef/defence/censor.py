"""Updates orthogonal to the true ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.func import functional_call

from gidef.defence.noise import draw
from gidef.errors import InputError
from gidef.types import Own, Tensors


@dataclass(frozen=True, slots=True)
class Orthogonal:
    """Each tensor g becomes a random direction orthogonal to it and of its length; of several draws, the one that helps the client most.

        o = r − (⟨r, g⟩ / ⟨g, g⟩) g,   sent: o · ‖g‖ / ‖o‖,   r ~ N(0, I);   of T draws, the one with the lowest loss after its step

    The loss is the cross-entropy, without noise, of the images that the client has at hand. A tensor of one entry has no such direction
    and becomes 0, as does one that is 0.

    Args:    draws: T ≥ 1; each costs a forward pass and as many normal numbers as there are parameters.
    Source:  CENSOR, Zhang et al., NDSS 2025, with T = 20.
    Deviates: the published code divides ⟨r, g⟩ by ‖g‖ once, which is orthogonal at ‖g‖ = 1 only; this is the formula. Its trial step is
             1e-4; here it is the step that the update stands for.
    Broken by: no matching that we know of. Of each tensor a release says two numbers, ‖g‖ and ⟨sent, g⟩ = 0; an attacker who adapts searches
               for images whose update fits both (10.7 dB after 200 iterations on an untrained small net, fit 0), and several rounds say more
               (A9). What it breaks is learning, since to first order such a step does not lower the loss: on 400 synthetic cells, 4 clients,
               8 rounds, test accuracy 14.5 % against 73.5 % undefended, chance 12.5 %.
    """

    needs_own: ClassVar[bool] = True
    random: ClassVar[bool] = True
    zeros: ClassVar[str] = "redrawn"
    keeps_scale: ClassVar[bool] = True
    draws: int = 20

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise InputError(f"draws={self.draws} of orthogonal updates: expected at least 1.")

    def apply(self, update: Tensors, *, generator: Generator, own: Own) -> Tensors:
        chosen, lowest = None, math.inf
        for _ in range(self.draws):
            drawn = {name: _against(draw(update[name], law="gaussian", generator=generator).double(), update[name].double()) for name in sorted(update)}
            trial = {name: drawn[name].to(tensor.dtype) for name, tensor in update.items()}
            loss = _loss_after(own, trial)
            if chosen is None or loss < lowest:
                chosen, lowest = trial, math.inf if math.isnan(loss) else loss
        return chosen

    def reveals(self, update: Tensors) -> Tensors:
        """All of it: the direction is drawn, and the attacker sees which."""
        return update

    def imitate(self, update: Tensors, seen: Tensors) -> Tensors:
        """What was sent, made orthogonal to the candidate's update and as long: itself, if the candidate's is the true one."""
        return {name: _against(seen[name], tensor) for name, tensor in update.items()}


def _against(direction: Tensor, tensor: Tensor) -> Tensor:
    """The direction's part orthogonal to the tensor, as long as the tensor; 0 where there is none."""
    if tensor.numel() == 1:
        return torch.zeros_like(tensor)
    power = tensor.square().sum()
    unit = torch.where(power > 0, power, 1.0)
    apart = direction - (direction * tensor).sum() / unit * tensor
    left = apart.square().sum()
    return apart * torch.where((power > 0) & (left > 0), unit / torch.where(left > 0, left, 1.0), 0.0).sqrt()


def _loss_after(own: Own, update: Tensors) -> float:
    """The client's cross-entropy after the step that an update stands for, in nats."""
    scale = 1.0 if own.lr is None else -own.lr
    weights = {name: tensor + scale * update[name] if name in update else tensor for name, tensor in own.params.items()}
    with torch.no_grad():
        return float(F.cross_entropy(functional_call(own.model, weights, (own.images,)), own.labels))
