"""Curvature at the kinks of ReLU networks, so that gradient matching can see its gates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_LEAKY_RELU = {F.leaky_relu, F.leaky_relu_}
_HARDTANH = {F.hardtanh, F.hardtanh_, F.relu6}  # nn.ReLU6 is a hardtanh
_KINKED = _RELU | _LEAKY_RELU | _HARDTANH


class CurvedKinks(TorchFunctionMode):
    """Within this context, relu, leaky_relu, relu6 and hardtanh have the curvature that differentiation drops.

    The second derivative of a(z) = max(z, 0) is a Dirac delta, which autograd takes for 0. An update that is matched is a
    first derivative, so its change when a pixel opens or closes a gate is invisible to the attacker's own gradient, although it
    is nearly all of the change: around the truth the cosine distance grows like |dx| and not like |dx|². Here

        a(z) + ½ s(z₀) (z − z₀)²,   z₀ = z, held constant,   s(z) = Σ jumps of a′ · w / (π ((z − kink)² + w²))

    has the value and the first derivative of a, exactly, and a Cauchy density of half-width w for its second: the curvature
    of the activation averaged over a spread of z. Losses, updates and the choice of the best candidate are
    untouched; only the direction in which the attacker walks changes.

    Args:    width: w, in units of z's root mean square (per attack and call), so that nets without norms work alike.
    Source:  surrogate gradients of spiking networks (Neftci et al. 2019, arXiv:1901.09948), moved to the gates' derivative.
    Deviates: the peers' attacks use 0. Max-pooling, hard-swish and PReLU keep their kinks; modes are per thread.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function not in _KINKED:
            return function(*args, **kwargs)
        z = args[0] if args else kwargs["input"]
        activation, jumps = _described(function, args[1:], kwargs)
        return activation(z) + self._bend(z, jumps)

    def _bend(self, z: Tensor, jumps: dict[float, float]) -> Tensor:
        """½ s(z₀) (z − z₀)²: zero, with zero slope."""
        fixed = z.detach()
        width = self.width * fixed.square().mean().sqrt() + torch.finfo(z.dtype).tiny
        density = sum(jump / (1 + ((fixed - kink) / width).square()) for kink, jump in jumps.items()) / (math.pi * width)
        return 0.5 * density * (z - fixed).square()


def _described(function: Callable, args: tuple, kwargs: dict) -> tuple[Callable[[Tensor], Tensor], dict[float, float]]:
    """The activation of one call, out of place whatever was asked for since z is read again, and its slope's jump at each kink."""
    if function in _RELU:
        return torch.relu, {0.0: 1.0}
    if function in _LEAKY_RELU:
        slope = args[0] if args else kwargs.get("negative_slope", 0.01)
        return lambda z: F.leaky_relu(z, slope), {0.0: 1.0 - slope}
    low, high = (0.0, 6.0) if function is F.relu6 else (*args, kwargs.get("min_val", -1.0), kwargs.get("max_val", 1.0))[:2]
    return lambda z: F.hardtanh(z, low, high), {float(low): 1.0, float(high): -1.0}
