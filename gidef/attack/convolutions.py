"""Convolutions of many attacks without the K groups that `vmap` makes of them, which no library computes fast.

A convolution and its two gradients are linear in each of their arguments, and each one's derivatives are the other two; so three
functions are closed under any number of derivatives:

    y = x * w          _Forward        (N, I, H, W), (O, I, R, S) → (N, O, P, Q)
    x̄ = ȳ *ᵀ w         _ToInput
    w̄ = Σ ȳ x          _ToWeight

Where the weight is shared, attacks become images of one batch. Where each has its own (a weight's gradient, and its derivative):

    on a CPU    large ones are convolved one by one, in channels-last, in which convolutions on a CPU are faster, strided ones' gradients
                nearly twice; small ones are groups of one convolution, as `vmap` makes them
    on a GPU    all are products of matrices, in one batched call: the windows of the images, copied side by side, and the weights

The gradient of a strided convolution to images of few channels, which takes a CPU's library as long for 3 as for 8, is there a convolution of stride 1
that gives the s² positions of a stride as channels (Shi et al. 2016, arXiv 1609.07009).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LARGE = 10_000_000
"""Operations of one attack's convolution from which on it fills a core by itself, so that a call for each costs nothing."""

FEW_CHANNELS = 4
"""Of images, up to which a strided convolution is ours on a CPU, be it small."""

_backward = torch.ops.aten.convolution_backward.default


class Geometry(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1
    small: bool = False
    """Of an attack's convolution on a CPU."""


class FastConvolutions(TorchFunctionMode):
    """Within this context, ungrouped 2-D convolutions, on a CPU large ones and the strided ones of few channels, run as said above, with the same numbers to rounding.

    For reverse-mode derivatives only: forward-mode raises.
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.conv2d and (call := _call(*args, **(kwargs or {}))) is not None:
            x, weight, bias, geometry = call
            found = _Forward.apply(x, weight, geometry)
            return found if bias is None else found + bias[:, None, None]
        return function(*args, **(kwargs or {}))


def _call(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[Tensor, Tensor, Tensor | None, Geometry] | None:
    """A call of conv2d that is ours to compute."""
    if groups != 1 or input.dim() != 4 or isinstance(padding, str):
        return None
    geometry = Geometry(*((value, value) if isinstance(value, int) else tuple(value) * (2 // len(value)) for value in (stride, padding, dilation)))
    outputs = math.prod(
        (length + 2 * p - (k - 1) * d - 1) // s + 1 for length, k, s, p, d in zip(input.shape[2:], weight.shape[2:], *geometry[:3], strict=True)
    )
    if input.device.type == "cpu" and 2 * input.shape[0] * outputs * weight.numel() < LARGE:
        if not _few_channels(weight, geometry):
            return None
        geometry = geometry._replace(small=True)
    return input, weight, bias, geometry


def _few_channels(weight: Tensor, geometry: Geometry) -> bool:
    return weight.shape[1] <= FEW_CHANNELS and max(geometry.stride) > 1 and geometry.dilation == (1, 1)


def _laid_out(tensor: Tensor, geometry: Geometry) -> Tensor:
    last = tensor.device.type == "cpu" and not geometry.small
    return tensor.contiguous(memory_format=torch.channels_last) if last else tensor.contiguous()


def _in_products(tensor: Tensor) -> bool:
    """Whether convolutions with a weight for each attack run as products of matrices."""
    return tensor.device.type != "cpu"


def _by_image(parts: int, places: int) -> bool:
    """Whether each image has a product of its own: its weights, copied for each, are then less than its outputs, rearranged."""
    return parts <= places


def _windows(images: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """(K, N, I, H, W) → (K, N, I, R, S, P, Q): what every output sees, a view of the padded images."""
    (top, left), (down, right), (apart, beside) = geometry.padding, geometry.stride, geometry.dilation
    padded = F.pad(images, (left, left, top, top)) if top or left else images
    tall, wide = apart * (kernel[0] - 1) + 1, beside * (kernel[1] - 1) + 1
    seen = padded.unfold(3, tall, down).unfold(4, wide, right)[..., ::apart, ::beside]  # (K, N, I, P, Q, R, S)
    return seen.permute(0, 1, 2, 5, 6, 3, 4)


def _forward_by_products(images: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """(K, N, I, H, W), (K, O, I, R, S) → (K, N, O, P, Q)."""
    seen = _windows(images, weight.shape[3:], geometry)
    places, parts, weight = seen.shape[5:], math.prod(seen.shape[2:5]), weight.flatten(2)
    if _by_image(parts, math.prod(places)):
        return (weight[:, None] @ seen.reshape(*seen.shape[:2], parts, -1)).unflatten(3, places)
    found = weight @ seen.movedim(1, 4).reshape(len(seen), parts, -1)
    return found.unflatten(2, (-1, *places)).movedim(1, 2)


def _to_input_by_products(slope: Tensor, weight: Tensor, geometry: Geometry, size: torch.Size) -> Tensor:
    """(K, N, O, P, Q), (K, O, I, R, S) → (K, N, I, *size)."""
    parts = weight.reshape(*weight.shape[:2], -1).mT[:, None] @ slope.flatten(3)  # (K, N, I R S, P Q)
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    found = F.fold(parts.flatten(0, 1), tuple(size), tuple(weight.shape[3:]), stride=stride, padding=padding, dilation=dilation)
    return found.unflatten(0, slope.shape[:2])


def folded_by_shifts(
    parts: Tensor, size: Sequence[int], kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """What `torch.ops.aten.col2im` does, (N, C R S, P Q) → (N, C, *size), as a sum of shifted images, one for each entry of the kernel.

    A position i = s j + a of the padded image takes entries r with d r = s t + a, of output j − t. For compilers: they make one kernel of the sum, where of col2im
    they make additions to memory one by one.
    """
    places = [(length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, d, p, s in zip(size, kernel, dilation, padding, stride, strict=True)]
    each = parts.reshape(len(parts), -1, *kernel, *places)
    sides = [-(-(length + 2 * p) // s) for length, p, s in zip(size, padding, stride, strict=True)]

    def taps(dim: int, phase: int) -> list[tuple[int, int]]:
        """(r, t) of a phase a."""
        return [(r, dilation[dim] * r // stride[dim]) for r in range(kernel[dim]) if dilation[dim] * r % stride[dim] == phase]

    def at(down: int, right: int) -> Tensor:
        found = None
        for r, t in taps(0, down):
            for s, u in taps(1, right):
                moved = F.pad(each[:, :, r, s], (u, sides[1] - places[1] - u, t, sides[0] - places[0] - t))
                found = moved if found is None else found + moved
        return each.new_zeros((*each.shape[:2], *sides)) if found is None else found

    if tuple(stride) == (1, 1):
        found = at(0, 0)
    else:
        found = torch.stack([torch.stack([at(a, b) for b in range(stride[1])], -1) for a in range(stride[0])], 3)  # (N, C, J, s, L, s)
        found = found.flatten(4, 5).flatten(2, 3)
    return found[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]


def _to_weight_by_products(slope: Tensor, images: Tensor, geometry: Geometry, kernel: torch.Size) -> Tensor:
    """(K, N, O, P, Q), (K, N, I, H, W) → (K, O, I, R, S)."""
    seen = _windows(images, kernel, geometry)
    places, parts = seen.shape[5:], seen.shape[2:5]
    if _by_image(math.prod(parts), math.prod(places)):
        found = (slope.flatten(3) @ seen.reshape(*seen.shape[:2], math.prod(parts), -1).mT).sum(1)
    else:
        found = slope.transpose(1, 2).flatten(2) @ seen.movedim(1, 4).reshape(len(seen), math.prod(parts), -1).mT
    return found.unflatten(2, parts)


def _to_input_by_positions(slope: Tensor, weight: Tensor, geometry: Geometry, size: torch.Size) -> Tensor:
    """(N, G O, P, Q), (G O, C, R, S) → (N, G C, *size).

    In a dimension, an image's position i = s j + a is reached from outputs q through the weight's r = i + p - s q. With the weight led by
    f = -p mod s zeros, r + f = s t + a and t = j - q + m, where m = (p + f) / s: a convolution over q, whose kernel has every s-th entry from a.
    """
    groups, (down, right) = geometry.groups, geometry.stride
    before = [-p % s for p, s in zip(geometry.padding, geometry.stride, strict=True)]
    taps = [-(-(k + f) // s) for k, f, s in zip(weight.shape[2:], before, geometry.stride, strict=True)]
    after = [s * t - k - f for s, t, k, f in zip(geometry.stride, taps, weight.shape[2:], before, strict=True)]
    padded = F.pad(weight, (before[1], after[1], before[0], after[0]))
    parts = padded.view(groups, -1, weight.shape[1], taps[0], down, taps[1], right).flip(3, 5)  # (G, O, C, T, s, U, s)
    kernel = parts.permute(0, 2, 4, 6, 1, 3, 5).reshape(-1, parts.shape[1], *taps)  # (G C s s, O, T, U)
    places = [-(-length // s) for length, s in zip(size, geometry.stride, strict=True)]
    moved = [(p + f) // s for p, f, s in zip(geometry.padding, before, geometry.stride, strict=True)]
    sides = [(t - 1 - m, count + m - seen) for t, m, count, seen in zip(taps, moved, places, slope.shape[2:], strict=True)]
    if all(a == b >= 0 for a, b in sides):
        found = F.conv2d(slope, kernel, padding=(sides[0][0], sides[1][0]), groups=groups)
    else:
        found = F.conv2d(F.pad(slope, (*sides[1], *sides[0])), kernel, groups=groups)
    found = found.unflatten(1, (-1, down, right)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
    return found[..., : size[0], : size[1]].contiguous()


class _ByProducts(torch.autograd.Function):
    """One of the three, by its name, for K attacks with weights of their own; `more` is the size or the kernel that it is told."""

    @staticmethod
    def forward(name: str, first: Tensor, second: Tensor, geometry: Geometry, more: Any) -> Tensor:
        if name == "forward":
            return _forward_by_products(first, second, geometry)
        return (_to_input_by_products if name == "to_input" else _to_weight_by_products)(first, second, geometry, more)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.name, first, second, ctx.geometry, _ = inputs
        ctx.save_for_backward(first, second)

    @staticmethod
    def backward(ctx: Any, more: Tensor) -> tuple[None, Tensor | None, Tensor | None, None, None]:
        (first, second), geometry = ctx.saved_tensors, ctx.geometry
        _, to_first, to_second, *_ = ctx.needs_input_grad
        # what image, weight and slope are, once one of them is `more`
        if ctx.name == "forward":
            image, weight, slope = first, second, more
        elif ctx.name == "to_input":
            image, weight, slope = more, second, first
        else:
            image, weight, slope = second, more, first
        of = {
            "image": lambda: _ByProducts.apply("to_input", slope, weight, geometry, image.shape[3:]),
            "weight": lambda: _ByProducts.apply("to_weight", slope, image, geometry, weight.shape[3:]),
            "slope": lambda: _ByProducts.apply("forward", image, weight, geometry, None),
        }
        asked = {"forward": ("image", "weight"), "to_input": ("slope", "weight"), "to_weight": ("slope", "image")}[ctx.name]
        return None, of[asked[0]]() if to_first else None, of[asked[1]]() if to_second else None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, name: str, first: Tensor, second: Tensor, geometry: Geometry, more: Any) -> tuple[Tensor, int]:
        first, second = (_leading(tensor, dim, info.batch_size) for tensor, dim in zip((first, second), in_dims[1:3], strict=True))
        attacks = first.shape[:2]
        return _ByProducts.apply(name, first.flatten(0, 1), second.flatten(0, 1), geometry, more).unflatten(0, attacks), 0


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return F.conv2d(_laid_out(x, geometry), weight, None, *geometry[:4])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, weight, ctx.geometry = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, _ = ctx.needs_input_grad
        return (
            _ToInput.apply(slope, weight, ctx.geometry, x.shape[2:]) if to_x else None,
            _ToWeight.apply(slope, x, ctx.geometry, weight.shape[2:]) if to_weight else None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, int]:
        return _over_attacks("forward", info.batch_size, in_dims, x, weight, geometry, None, _Forward.apply)


class _ToInput(torch.autograd.Function):
    @staticmethod
    def forward(slope: Tensor, weight: Tensor, geometry: Geometry, size: torch.Size) -> Tensor:
        stride, padding, dilation, groups, _ = geometry
        if slope.device.type == "cpu" and _few_channels(weight, geometry):
            return _to_input_by_positions(slope, weight, geometry, size)
        like = slope.new_empty((slope.shape[0], *size, groups * weight.shape[1])).movedim(3, 1)
        return _backward(_laid_out(slope, geometry), like, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False])[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        slope, weight, ctx.geometry, _ = inputs
        ctx.save_for_backward(slope, weight)

    @staticmethod
    def backward(ctx: Any, more: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        slope, weight = ctx.saved_tensors
        to_slope, to_weight, *_ = ctx.needs_input_grad
        return (
            _Forward.apply(more, weight, ctx.geometry) if to_slope else None,
            _ToWeight.apply(slope, more, ctx.geometry, weight.shape[2:]) if to_weight else None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, slope: Tensor, weight: Tensor, geometry: Geometry, size: torch.Size) -> tuple[Tensor, int]:
        apply = lambda slope, weight, geometry: _ToInput.apply(slope, weight, geometry, size)  # noqa: E731
        return _over_attacks("to_input", info.batch_size, in_dims, slope, weight, geometry, size, apply)


class _ToWeight(torch.autograd.Function):
    @staticmethod
    def forward(slope: Tensor, x: Tensor, geometry: Geometry, kernel: torch.Size) -> Tensor:
        stride, padding, dilation, groups, _ = geometry
        slope, x = _laid_out(slope, geometry), _laid_out(x, geometry)
        like = slope.new_empty((slope.shape[1], x.shape[1] // groups, *kernel))
        return _backward(slope, x, like, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False])[1].contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        slope, x, ctx.geometry, _ = inputs
        ctx.save_for_backward(slope, x)

    @staticmethod
    def backward(ctx: Any, more: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        slope, x = ctx.saved_tensors
        to_slope, to_x, *_ = ctx.needs_input_grad
        return (
            _Forward.apply(x, more, ctx.geometry) if to_slope else None,
            _ToInput.apply(slope, more, ctx.geometry, x.shape[2:]) if to_x else None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, slope: Tensor, x: Tensor, geometry: Geometry, kernel: torch.Size) -> tuple[Tensor, int]:
        slope, x = (_leading(tensor, dim, info.batch_size) for tensor, dim in zip((slope, x), in_dims, strict=False))
        if _in_products(x):
            return _ByProducts.apply("to_weight", slope, x, geometry, kernel), 0
        if geometry.small:
            return _ToWeight.apply(_beside(slope), _beside(x), _grouped(geometry, len(x)), kernel).unflatten(0, (len(x), -1)), 0
        return torch.stack([_ToWeight.apply(a, b, geometry, kernel) for a, b in zip(slope.unbind(), x.unbind(), strict=True)]), 0


def _over_attacks(
    name: str, attacks: int, in_dims: tuple, images: Tensor, weight: Tensor, geometry: Geometry, more: Any, apply: Callable[[Tensor, Tensor, Geometry], Tensor]
) -> tuple[Tensor, int]:
    """vmap's rule of the two functions of images and a weight."""
    if in_dims[1] is None:  # one weight for all: attacks are images of one batch
        images = images.movedim(in_dims[0], 0)
        return apply(images.flatten(0, 1), weight, geometry).unflatten(0, images.shape[:2]), 0
    images, weight = (_leading(tensor, dim, attacks) for tensor, dim in zip((images, weight), in_dims, strict=False))
    if _in_products(images):
        return _ByProducts.apply(name, images, weight, geometry, more), 0
    if geometry.small:
        return apply(_beside(images), weight.flatten(0, 1), _grouped(geometry, attacks)).unflatten(1, (attacks, -1)).movedim(1, 0), 0
    found = torch.cat([apply(a, b, geometry) for a, b in zip(images.unbind(), weight.unbind(), strict=True)])
    return found.unflatten(0, images.shape[:2]), 0


def _beside(images: Tensor) -> Tensor:
    """(K, N, C, H, W) → (N, K C, H, W)."""
    return images.transpose(0, 1).flatten(1, 2)


def _grouped(geometry: Geometry, attacks: int) -> Geometry:
    """That of all attacks, each of them a group of channels (or, within a map within attacks, several)."""
    return geometry._replace(groups=attacks * geometry.groups)


def _leading(tensor: Tensor, dim: int | None, attacks: int) -> Tensor:
    return tensor.expand(attacks, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
