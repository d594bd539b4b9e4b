"""Convolutions over maps of one to four positions, whose weight's gradient is faster as a product than by a CPU's library.

Such maps are what backbones made for 224 pixels end with at 28 or 32: ResNet-18's last stage there is 1×1, and its step takes three
quarters of the time (`recipes/bench/minimax.py`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITIONS, ENTRIES = 4, 1 << 18
"""The largest map, and the smallest weight, for which the product is the faster way."""

_backward = torch.ops.aten.convolution_backward.default


class SmallMapConv2d(nn.Conv2d):
    """nn.Conv2d, whose weight's gradient is a product where the map that it gives is small; the same numbers to rounding.

    For training on a CPU, without autocast or function transforms; everything else is nn.Conv2d's.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (weight.requires_grad and torch.is_grad_enabled() and input.device.type == "cpu" and self._gives_a_small_map(input)):
            return super()._conv_forward(input, weight, bias)
        if torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active():
            return super()._conv_forward(input, weight, bias)
        found = _Convolution.apply(input, weight, self.stride, self.padding, self.dilation)
        return found if bias is None else found + bias[:, None, None]

    def _gives_a_small_map(self, input: Tensor) -> bool:
        if input.dim() != 4:
            return False
        sides = zip(input.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return 0 < math.prod((length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in sides) <= POSITIONS


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, *geometry: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry = geometry
        return F.conv2d(input, weight, None, *geometry)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (input, weight), (stride, padding, dilation) = ctx.saved_tensors, ctx.geometry
        to_input = to_weight = None
        if ctx.needs_input_grad[0]:
            to_input = _backward(slope, input, weight, None, stride, padding, dilation, False, [0, 0], 1, [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            seen = F.unfold(input, weight.shape[2:], stride=stride, padding=padding, dilation=dilation)  # (N, I R S, positions)
            rows = seen.transpose(1, 2).reshape(-1, seen.shape[1])
            to_weight = (slope.movedim(1, 0).reshape(len(weight), -1) @ rows).view_as(weight)
        return to_input, to_weight, None, None, None


def multiply_over_small_maps(model: nn.Module) -> list[str]:
    """Make the model's large nn.Conv2d's SmallMapConv2d's, in place, but for grouped and padded ones of another kind and subclasses; their names."""
    changed = []
    for name, module in model.named_modules():
        plain = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        if plain and module.weight.numel() >= ENTRIES:
            module.__class__ = SmallMapConv2d
            changed.append(name)
    return changed
