"""Changes to a backbone that keep its parameters' names: norms, stems, and operations without second derivatives."""

from __future__ import annotations

import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_SLOPE_ERROR = float(torch.ops.aten.hardsigmoid_backward(torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))) - 1 / 6


class GroupNormAct(nn.GroupNorm):
    """GroupNorm with what timm's BatchNormAct2d does after its norm, under the same names."""

    def __init__(self, groups: int, channels: int, *, eps: float, affine: bool, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(groups, channels, eps=eps, affine=affine)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Hardsigmoid(nn.Module):
    """relu6(x + 3) / 6, twice differentiable where `nn.Hardsigmoid` is not implemented."""

    def forward(self, x: Tensor) -> Tensor:
        return hardsigmoid(x)


def hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    ramp = F.relu6(x + 3)
    # PyTorch's slope is 1/6 rounded to float32 even in float64, 3e-8 off: what a client releases has it too
    return ramp / 6 + (ramp - ramp.detach()) * _SLOPE_ERROR if x.dtype == torch.float64 else ramp / 6


def group_norm_for_batch_norm(model: nn.Module) -> nn.Module:
    """Replace each BatchNorm by GroupNorm with gcd(32, C) groups; returns the model, or its replacement if it is a BatchNorm.

    Affine parameters (values and names), epsilon, and the activation and drop modules of timm's BatchNormAct2d stay.
    """
    if isinstance(model, _BatchNorm):
        groups, channels = math.gcd(32, model.num_features), model.num_features
        settings = {"eps": model.eps, "affine": model.affine}
        if hasattr(model, "act"):
            norm = GroupNormAct(groups, channels, drop=getattr(model, "drop", nn.Identity()), act=model.act, **settings)
        else:
            norm = nn.GroupNorm(groups, channels, **settings)
        if model.affine:
            norm.weight, norm.bias = model.weight, model.bias
        return norm.train(model.training)
    for name, child in model.named_children():
        replacement = group_norm_for_batch_norm(child)
        if replacement is not child:
            setattr(model, name, replacement)
    return model


def make_differentiable(model: nn.Module, *, fused_attention: bool) -> nn.Module:
    """Ready a model for gradients of gradients: no in-place activations, no nn.Hardsigmoid, and timm's fused attention as said.

    In-place operations overwrite what `functional_call` reads again; fused attention has no second derivative on the CPU.
    """
    for module in list(model.modules()):
        if getattr(module, "inplace", False):
            module.inplace = False
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused_attention
        for name, child in module.named_children():
            if isinstance(child, nn.Hardsigmoid):
                setattr(module, name, Hardsigmoid())
    return model


def switch_off_drops(model: nn.Module) -> nn.Module:
    """Dropout and drop-path at rate 0. timm's rates are 0 for most models, but Swin's drop-path is 0.1."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


def changes_between(untouched: nn.Module, changed: nn.Module) -> list[str]:
    """What `make_differentiable` and `switch_off_drops` changed, one line per kind with its count; what drops is named.

    Args:   two builds of one backbone, without these changes and with them.
    """
    found, rates = Counter(), {}
    for name, module in untouched.named_modules():
        other = changed.get_submodule(name)
        found["in-place -> out of place"] += bool(getattr(module, "inplace", False)) and not getattr(other, "inplace", False)
        found["fused attention -> math"] += bool(getattr(module, "fused_attn", False)) and not getattr(other, "fused_attn", False)
        found["Hardsigmoid -> relu6(x + 3) / 6"] += isinstance(module, nn.Hardsigmoid) and not isinstance(other, nn.Hardsigmoid)
        if (before := _rate(module)) > 0 and _rate(other) == 0:
            rates.setdefault(type(module).__name__, []).append((name, before))
    lines = [f"{count} x {what}" for what, count in found.items() if count]
    for kind, each in rates.items():
        low, high = min(rate for _, rate in each), max(rate for _, rate in each)
        names = ", ".join(name for name, _ in each[:3]) + (", …" if len(each) > 3 else "")
        lines.append(f"{len(each)} x {kind} of rate {low:.3g}{f' to {high:.3g}' if high > low else ''} -> off ({names})")
    return lines


def _rate(module: nn.Module) -> float:
    """With which a dropout or drop-path drops, as `switch_off_drops` tells them; 0 for others."""
    rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "drop_prob", None)
    return float(rate) if isinstance(rate, int | float) else 0.0


def use_small_stem(model: nn.Module) -> nn.Module:
    """Change the stem of a convolutional net for images of about 32 pixels; returns the model.

    ResNet-like (`conv1`, `maxpool`): a 3×3 convolution of stride 1 instead of 7×7 of stride 2, or a deep stem's first
    convolution without its stride, and no max-pool. ConvNeXt (`stem.0`): patches of 2 instead of 4. Others are left alone.
    """
    conv, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    if pool is not None and isinstance(conv, (nn.Conv2d, nn.Sequential)):
        if isinstance(conv, nn.Sequential):
            conv[0].stride = (1, 1)
        else:
            model.conv1 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride=1, padding=1, bias=conv.bias is not None)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's ResNet
        model.maxpool = nn.Identity()
    stem = getattr(model, "stem", None)
    # timm's own patch_size=2 would halve the map again in the first stage, which comes to patches of 4
    if isinstance(stem, nn.Sequential) and isinstance(stem[0], nn.Conv2d) and stem[0].kernel_size == stem[0].stride == (4, 4):
        patch = nn.Conv2d(stem[0].in_channels, stem[0].out_channels, 2, stride=2, bias=stem[0].bias is not None)
        nn.init.trunc_normal_(patch.weight, std=0.02)  # as timm's ConvNeXt
        if patch.bias is not None:
            nn.init.zeros_(patch.bias)
        stem[0] = patch
    return model
