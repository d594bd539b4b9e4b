"""Which module of an attack copy becomes what, told by its class, its switches and what its code calls."""

from __future__ import annotations

import dis
import functools
from collections import Counter
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from gidef.attack.surgery_parts import (
    DROPOUTS,
    BatchNormPolicy,
    Drop,
    DropoutPolicy,
    GlobalMean,
    Grouped,
    InputNorm,
    Masked,
    MathHeads,
    PureNorm,
    Tape,
    Uncached,
    Watched,
    hardsigmoid,
)
from gidef.models.norms import is_plain_norm

OWN_BACKWARD = {"SwishMe": nn.SiLU, "MishMe": nn.Mish, "HardSigmoidMe": nn.Hardsigmoid, "HardSwishMe": nn.Hardswish}
_DROPOUT_MODULES = {
    nn.Dropout: F.dropout,
    nn.Dropout1d: F.dropout1d,
    nn.Dropout2d: F.dropout2d,
    nn.Dropout3d: F.dropout3d,
    nn.AlphaDropout: F.alpha_dropout,
    nn.FeatureAlphaDropout: F.feature_alpha_dropout,
}
_ATTENTION = frozenset({F.scaled_dot_product_attention, F.multi_head_attention_forward})
_CAUGHT = frozenset({*DROPOUTS, *_ATTENTION, F.hardsigmoid, F.batch_norm})
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MANY_GROUPS = 32
"""From where the loop over groups is avoided: regnetx_002, of up to 46 groups, runs at 0.65 s an iteration with it and 0.83 without
(two images, 8 attacks, not recorded); MobileNetV3-small, of 16 to 576, at 0.69 and 0.68; ConvNeXt-tiny, of 96 to 768, at 3.85 and 3.22."""
_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def operate(module: nn.Module, name: str, tape: Tape, changes: Counter) -> None:
    """Change one module's class where needed, and count the change."""
    masked = tape.dropout == "masks" and module.training
    kind, what, more = None, [], {}
    if isinstance(module, _BatchNorm) and is_plain_norm(type(module)):
        batch = module.training or module.running_mean is None
        kind, what = PureNorm, ["BatchNorm -> batch statistics, without updates" if batch else "BatchNorm -> affine map of running statistics"]
    elif isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
        kind, what = InputNorm, ["InstanceNorm -> without updates"]
    elif (drop := _drop(module)) is not None:
        if masked and drop.rate > 0:
            kind, what, more = Masked, [f"{type(module).__name__} -> explicit mask"], {"_drop": drop}
    elif isinstance(module, nn.MultiheadAttention):
        dropped = masked and module.dropout > 0
        if dropped or not tape.fused_attention:
            kind, what, more = MathHeads, ["MultiheadAttention -> math" + " with explicit mask" * dropped], {"_masked": dropped}
    elif any(type(module).forward is kind.forward for kind in _CONVOLUTIONS) and _in_many_groups(module):
        kind, what = Grouped, ["convolution of many groups -> without a loop over them"]
    elif type(module) in _POOLS and {module.output_size} <= {1, (1,), (1, 1), (1, 1, 1)}:
        kind, what, more = GlobalMean, ["pooling to one position -> mean"], {"_dims": tuple(range(-1 - _POOLS.index(type(module)), 0))}
    else:
        what = _switched_off(module)
        if caught := _caught(module, tape):
            kind, what, more = Watched, [*what, *caught], {"_masked": masked}
    if kind is not None:
        module.__class__ = with_part(type(module), kind)
        module.__dict__.update(_tape=tape, _name=name, **more)
    changes.update(what)


def _in_many_groups(module: nn.Conv2d) -> bool:
    return module.groups >= _MANY_GROUPS and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _switched_off(module: nn.Module) -> list[str]:
    """Turn off by its own switches what cannot be attacked in this module."""
    what = []
    if isinstance(getattr(module, "attention_bias_cache", None), dict):
        del module.attention_bias_cache
        module.__class__ = with_part(type(module), Uncached)
        what.append("cached attention bias -> computed")
    if getattr(module, "grad_checkpointing", False) is True:
        module.grad_checkpointing = False
        what.append("gradient checkpointing -> off")
    if isinstance(module, nn.TransformerEncoderLayer) and module.activation_relu_or_gelu:
        module.activation_relu_or_gelu = 0  # read by its fast path alone, which has no second derivative
        what.append("TransformerEncoderLayer's fast path -> off")
    for name, value in vars(module).items():
        if value is F.hardsigmoid:
            vars(module)[name] = hardsigmoid
            what.append("Hardsigmoid -> relu6(x + 3) / 6")
    return what


def _caught(module: nn.Module, tape: Tape) -> list[str]:
    """What the module's own code calls that must be caught when it runs."""
    called, what = _calls(type(module)), []
    if called & _ATTENTION and not hasattr(module, "fused_attn") and not tape.fused_attention:
        what.append("functional attention -> math")
    if F.hardsigmoid in called:
        what.append("functional hardsigmoid -> relu6(x + 3) / 6")
    if isinstance(module, _BatchNorm) or (F.batch_norm in called and any("running_" in name for name in module._buffers)):
        what.append("functional BatchNorm -> without updates")
    active = module.training and getattr(module, "drop_rate", None) != 0 and getattr(module, "drop_prob", None) != 0
    if active and tape.dropout == "masks" and (called & DROPOUTS.keys() or "bernoulli_" in called):
        what.append("functional dropout -> explicit mask")
    elif active and called & DROPOUTS.keys():
        what.append("functional dropout -> off")
    return what


@functools.cache
def _calls(kind: type) -> frozenset:
    """Functions of `_CAUGHT`, and "bernoulli_", that the methods of a class may call, directly or through functions outside torch."""
    found, seen = set(), set()
    for base in kind.__mro__:
        if not base.__module__.startswith("torch.") and base is not object:
            for name, method in vars(base).items():
                if name != "__init__":  # a function that it keeps as an attribute is found there
                    _search(getattr(method, "__func__", method), found, seen)
    return frozenset(found)


def _search(function: Any, found: set, seen: set) -> None:
    if not isinstance(function, FunctionType) or function in seen or (function.__module__ or "").startswith("torch."):
        return
    seen.add(function)
    _search(getattr(function, "__wrapped__", None), found, seen)
    for value in _mentioned(function.__code__, function.__globals__):
        if value == "bernoulli_" or (callable(value) and value in _CAUGHT):
            found.add(value)
        else:
            _search(value, found, seen)


def _mentioned(code: CodeType, names: dict[str, Any]) -> Iterator[Any]:
    """Global functions that a code object mentions, by name or as an attribute of a module, and the attribute name "bernoulli_"."""
    value: Any = None
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            value = names.get(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            value = getattr(value, step.argval, None) if isinstance(value, ModuleType) else None
            if step.argval == "bernoulli_":
                yield "bernoulli_"
        else:
            continue
        if isinstance(value, FunctionType) or (callable(value) and not isinstance(value, type)):
            yield value
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _mentioned(inner, names)


def _drop(module: nn.Module) -> Drop | None:
    """The dropout that a module is, or None. Those that do something of their own are told by their class's name, as copies of timm's are."""
    for kind, function in _DROPOUT_MODULES.items():
        if type(module).forward is kind.forward:
            return DROPOUTS[function]._replace(rate=float(module.p))
    if type(module).__name__ == "DropPath" and hasattr(module, "drop_prob"):
        return Drop(float(module.drop_prob or 0), "examples", scaled=getattr(module, "scale_by_keep", True))
    if type(module).__name__ == "StochasticDepth" and hasattr(module, "mode"):
        return Drop(float(module.p), "examples" if module.mode == "row" else "batch")
    return None


def drops(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that do nothing in train mode that they do not in eval mode, but for dropping something."""
    for module in model.modules():
        if _drop(module) is not None or isinstance(module, nn.MultiheadAttention) or type(module).__name__ in ("DropBlock2d", "PatchDropout"):
            yield module


def rate_of(module: nn.Module) -> float:
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout
    drop = _drop(module)
    return drop.rate if drop is not None else getattr(module, "drop_prob", None) or getattr(module, "prob", None) or 0.0


def set_flags(model: nn.Module, batch_norm: BatchNormPolicy, dropout: DropoutPolicy) -> None:
    if batch_norm != "keep":
        model.train(batch_norm == "train" or dropout == "masks")
    if batch_norm == "eval":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train(False)


@functools.cache
def with_part(kind: type, part: type) -> type:
    """The class with the part's forward; it keeps its name and stays a subclass."""
    return type(kind.__name__, (part, kind), {"__module__": kind.__module__})
