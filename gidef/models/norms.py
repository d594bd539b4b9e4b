"""BatchNorm that stays in a federated net: frozen, or by each batch's statistics. A layer keeps its class's name, its parameters and its buffers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gidef.errors import InputError

STATISTICS = ("running_mean", "running_var")


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, x − mean, variance without Bessel's correction) per channel of x (B, channels, ...); both statistics (1, channels, 1, ...)."""
    dims = (0, *range(2, x.ndim))
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    return mean, centred, centred.square().mean(dims, keepdim=True)


def rescaled(centred: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """w (x − m) / √(v + ε) + b of what `moments` gives."""
    shape, scale = (1, -1, *[1] * (centred.ndim - 2)), (variance + eps).rsqrt()
    y = centred * (scale if weight is None else scale * weight.view(shape))
    return y if bias is None else y + bias.view(shape)


def affine(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x s + (b − m s), s = w / √(v + ε), of x (B, channels, ...) and statistics (channels,)."""
    shape, scale = (1, -1, *[1] * (x.ndim - 2)), (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return x * scale.view(shape) + shift.view(shape)


def after_norm(layer: nn.Module, y: Tensor) -> Tensor:
    """What timm's BatchNormAct2d does after its norm."""
    for part in ("drop", "act"):
        if part in layer._modules:
            y = layer._modules[part](y)
    return y


def is_plain_norm(kind: type) -> bool:
    """Whether a class of BatchNorm does what PyTorch's does, and then its children `drop` and `act` if it is timm's."""
    timms = kind.__module__.startswith("timm.") and kind.__name__ in ("BatchNormAct2d", "SyncBatchNormAct")
    return timms or issubclass(kind, (Frozen, Moving)) or kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class Frozen:
    """BatchNorm by its running statistics, which nothing changes, in train mode too: a fixed affine map before weight and bias. In float32 at least."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.training = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float() if dtype in (torch.bfloat16, torch.float16) else x
        return after_norm(self, affine(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps).to(dtype))


class Moving:
    """BatchNorm by the batch's statistics in train mode, where its running ones move within `moving` alone, as PyTorch's; elsewhere it is a pure
    function. By its running statistics in eval mode. In float32 at least."""

    moves = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            raise InputError(f"BatchNorm in train mode gets one value per channel, {tuple(x.shape)}: take larger batches or images, or model.norm=frozen.")
        if self.training and self.moves:
            self.num_batches_tracked.add_(1)
            factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, factor, self.eps)
            return after_norm(self, y)
        dtype = x.dtype
        x = x.float() if dtype in (torch.bfloat16, torch.float16) else x
        if self.training:
            _, centred, variance = moments(x)
            y = rescaled(centred, variance, self.weight, self.bias, self.eps)
        else:
            y = affine(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        return after_norm(self, y.to(dtype))


def move_batch_norm(model: nn.Module) -> nn.Module:
    """Let each BatchNorm move its running statistics within `moving` only, in place; returns the model. Raises as `freeze_batch_norm`."""
    return _changed(model, Moving, "keep")


@contextlib.contextmanager
def moving(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Within: whether passes in train mode move the running statistics. A model serves one thread at a time."""
    layers = [layer for layer in model.modules() if isinstance(layer, Moving)]
    before = [layer.moves for layer in layers]
    for layer in layers:
        layer.moves = on
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.moves = was


def moving_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics that training moves: the buffers themselves, by name. The layers' counts of batches are none of them."""
    return _statistics(model, Moving)


def count_afresh(model: nn.Module) -> None:
    """Layers that average over all batches (momentum None) count from here on."""
    for layer in model.modules():
        if isinstance(layer, Moving):
            layer.num_batches_tracked.zero_()


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Frozen and moving ones."""
    return _statistics(model, (Frozen, Moving))


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """Freeze each BatchNorm in place, with its running statistics as they are; returns the model.

    Raises: InputError for layers with other statistics of the data, and for BatchNorm that keeps none or has code of its own.
    """
    return _changed(model, Frozen, "frozen")


def frozen_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of the frozen layers: the buffers themselves, by name."""
    return _statistics(model, Frozen)


def is_frozen(layer: nn.Module) -> bool:
    return isinstance(layer, Frozen)


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether any module keeps running statistics of the data that training changes (BatchNorm and its kin, unless frozen)."""
    frozen = frozen_statistics(model)
    return any(name.rpartition(".")[2] in STATISTICS and name not in frozen for name, _ in model.named_buffers())


def _statistics(model: nn.Module, part: type | tuple[type, ...]) -> dict[str, Tensor]:
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, part)]
    return {f"{name}.{which}".removeprefix("."): getattr(layer, which) for name, layer in layers for which in STATISTICS}


def _changed(model: nn.Module, part: type, norm: str) -> nn.Module:
    for name, layer in model.named_modules():
        kind = type(layer)
        if not isinstance(layer, _BatchNorm):
            if any(which in layer._buffers and layer._buffers[which] is not None for which in STATISTICS):
                raise InputError(f"model.norm={norm}: {name!r} ({kind.__name__}) keeps running statistics, and is no BatchNorm: replace it in the model.")
            continue
        if layer.running_mean is None:
            raise InputError(f"model.norm={norm}: BatchNorm {name!r} keeps no running statistics: set track_running_stats=True in the model, or model.norm=group.")
        if not is_plain_norm(kind):
            raise InputError(f"model.norm={norm}: {name!r} ({kind.__name__}) is a BatchNorm with a forward of its own: set model.norm=group, or replace it.")
        layer.__class__ = _with(kind, part)
        layer.train(layer.training)
    return model


@functools.cache
def _with(kind: type, part: type) -> type:
    """The class with the part's methods; it keeps its name and stays a subclass."""
    return type(kind.__name__, (part, kind), {"__module__": kind.__module__})
