"""Convolutions of many groups whose derivatives of any order are single convolutions again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Product(torch.autograd.Function):
    """One of the three products of a convolution y = w ∗ x, each of which is bilinear with the other two for its derivatives.

        y(x, w),   its gradient by the input i(g, w),   its gradient by the weight v(g, x):      ⟨g, y(x, w)⟩ = ⟨i(g, w), x⟩ = ⟨v(g, x), w⟩

    So derivatives of any order are single convolutions. PyTorch's own second derivative loops over the groups.
    A subclass says how it is computed from its two factors, what its gradients by them are, and which shape it has.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])
        ctx.rest = inputs[2:]

    @classmethod
    def linearised(cls, ctx: Any, first: Tensor | None, second: Tensor | None) -> Tensor:
        one, other = ctx.saved_tensors
        parts = [] if first is None else [cls.apply(first, other, *ctx.rest)]
        return sum(parts if second is None else [*parts, cls.apply(one, second, *ctx.rest)])


class Convolved(_Product):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, how: tuple) -> Tensor:
        stride, padding, dilation, groups = how
        return torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (
            _ByInput.apply(g, weight, *ctx.rest, x.shape) if ctx.needs_input_grad[0] else None,
            _ByWeight.apply(g, x, *ctx.rest, weight.shape) if ctx.needs_input_grad[1] else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, weight: Tensor | None, how: None) -> Tensor:
        return Convolved.linearised(ctx, x, weight)


class _ByInput(_Product):
    @staticmethod
    def forward(g: Tensor, weight: Tensor, how: tuple, shape: torch.Size) -> Tensor:
        return _convolution_backward(g, g.new_empty(()).expand(shape), weight, how, 0)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        g, weight = ctx.saved_tensors
        return (
            Convolved.apply(dx, weight, ctx.rest[0]) if ctx.needs_input_grad[0] else None,
            _ByWeight.apply(g, dx, ctx.rest[0], weight.shape) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, g: Tensor | None, weight: Tensor | None, how: None, shape: None) -> Tensor:
        return _ByInput.linearised(ctx, g, weight)


class _ByWeight(_Product):
    @staticmethod
    def forward(g: Tensor, x: Tensor, how: tuple, shape: torch.Size) -> Tensor:
        return _convolution_backward(g, x, g.new_empty(()).expand(shape), how, 1)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        return (
            Convolved.apply(x, dw, ctx.rest[0]) if ctx.needs_input_grad[0] else None,
            _ByInput.apply(g, dw, ctx.rest[0], x.shape) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, g: Tensor | None, x: Tensor | None, how: None, shape: None) -> Tensor:
        return _ByWeight.linearised(ctx, g, x)


def _convolution_backward(g: Tensor, x: Tensor, weight: Tensor, how: tuple, which: int) -> Tensor:
    """The gradient by x (0) or by the weight (1); of the one that is asked for, only the shape is read."""
    (stride, padding, dilation, groups), wanted = how, [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(g, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, wanted)[which]
