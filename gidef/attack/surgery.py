"""A copy of any network that can be attacked: pure, vmappable and twice differentiable, with the parameters' names as they were.

Surgery changes the class of single modules in the copy, so that names, shared modules, hooks and attributes stay. What a forward
would draw or update (dropout's masks, batch statistics) becomes an input of `logits_of` or an output of `batch_statistics`.
A module whose own code calls what cannot be attacked (`F.scaled_dot_product_attention`, `F.hardsigmoid`, `F.dropout`, …), without a
switch against it, runs under a `TorchFunctionMode` of its own; all others run without one.
"""

from __future__ import annotations

import copy as copying
import dis
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gidef.errors import InputError
from gidef.models.norms import affine, after_norm, is_plain_norm, moments, rescaled
from gidef.models.surgery import make_differentiable
from gidef.rng import generator
from gidef.types import Tensors

MASKS = "masks."
"""Prefix of dropout's masks in `known`: "masks.<module>", and "masks.<module>:2" for that module's second draw in one forward."""
STATISTICS = "statistics."
"""Prefix of granted batch statistics in `known`: "statistics.<module>.mean" and "statistics.<module>.var"."""
TOLERANCE = 1e-9
"""Of the first gradient in float64, relative and per parameter."""

BatchNormPolicy = Literal["eval", "train", "keep"]
DropoutPolicy = Literal["off", "masks"]
Loss = Callable[[Tensor, Tensor], Tensor]
"""loss(logits (B, classes), labels (B,) indices or (B, classes) probabilities) → scalar, a mean over the batch."""
Statistics = list[tuple[Tensor, Tensor]]
"""(mean, variance) of each BatchNorm, (channels,) both, in the order of `norm_names`."""


def prepare(
    model: nn.Module, *, batch_norm: BatchNormPolicy = "eval", dropout: DropoutPolicy = "off", fused_attention: bool = False
) -> tuple[nn.Module, list[str]]:
    """A copy of the model, fit for gradients of gradients under `torch.func` and for `make_fx`, and what was changed in it.

        attention        softmax(q kᵀ / √d) v instead of fused: timm's `fused_attn` off, nn.MultiheadAttention, functional calls
        Hardsigmoid      relu6(x + 3) / 6; timm's activations with a backward of their own → PyTorch's;
                         in-place off
        BatchNorm eval   x·s + (b − m s), s = w / √(v + ε), of the running statistics m, v, which stay buffers
        BatchNorm train  of the batch's own statistics; no buffer is updated
        dropout "off"    every rate 0
        dropout "masks"  y = x · mask / (1 − rate), with the mask an input: Dropout of every kind, DropPath, StochasticDepth,
                         nn.MultiheadAttention's, functional calls
        depthwise        convolutions of many groups, whose second derivatives PyTorch takes group by group → without the loop
        others           average pooling to one position → mean; no gradient checkpointing; no biases cached in eval mode

    Args:    model: any nn.Module from images to logits; it is not modified.
             batch_norm: "eval" and "train" are the client's mode ("train" keeps layers frozen that the model's own `train` keeps
             frozen); "keep" takes every module's own flag.
             dropout: what becomes of the active ones. "masks" with batch_norm="eval" is train mode with frozen BatchNorm.
             fused_attention: leave it, for the first-order forms of an attack, which take no second derivatives of operators.
    Returns: (copy, changes). The copy has the model's parameters and buffers under their names; call it by `logits_of`.
             changes: one line per kind of change, with its count.
    Raises:  InputError for unknown policies, or a model that cannot be copied.
    Measured: operators in a vmapped gradient of a gradient. One convolution with BatchNorm: 129 with the affine map against 234 of
             `F.batch_norm`, 192 against 283 with batch statistics. MobileNetV3-small: 9,497 against 30,542 with the loops over groups,
             and 10 s instead of 95 to record by `make_fx`.
    Traps:   modules with other randomness in train mode are left alone: `mask_shapes` and `check_parity` refuse them. Under vmap a GRU
             fails, and an LSTM runs attack by attack.
    """
    if batch_norm not in ("eval", "train", "keep") or dropout not in ("off", "masks"):
        raise InputError(f'batch_norm={batch_norm!r}, dropout={dropout!r}: choose "eval", "train" or "keep", and "off" or "masks".')
    copy = duplicate(model)
    tape, changes = _Tape(batch_norm, dropout, fused_attention), Counter()
    for module in copy.modules():
        if (plain := _OWN_BACKWARD.get(type(module).__name__)) and type(module).__module__.startswith("timm."):
            module.__class__, module.inplace = plain, False
            changes["activation with its own backward -> PyTorch's"] += 1
        changes["fused attention -> math"] += bool(getattr(module, "fused_attn", False)) and not fused_attention
        changes["in-place -> out of place"] += getattr(module, "inplace", False) is True
        if isinstance(module, nn.Hardsigmoid):
            module.__class__ = _with(nn.Module, _Ramp)
            changes["Hardsigmoid -> relu6(x + 3) / 6"] += 1
    make_differentiable(copy, fused_attention=fused_attention)
    _set_flags(copy, batch_norm, dropout)
    if dropout == "off":
        for module in _drops(copy):
            changes[f"{type(module).__name__} -> off"] += module.training and _rate(module) > 0
            module.train(False)
    for name, module in list(copy.named_modules()):
        _operate(module, name or "(root)", tape, changes)
    tape.names = frozenset(name for name, _ in _own(copy))
    copy.__dict__["_tape"] = tape
    return copy, [f"{count} x {change}" for change, count in changes.items() if count]


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy, without the results that some of timm's modules cache in eval mode.

    Raises: InputError if PyTorch cannot copy the model.
    """
    memo = {id(module.attention_bias_cache): {} for module in model.modules() if type(getattr(module, "attention_bias_cache", None)) is dict}
    try:
        return copying.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:  # a non-leaf tensor kept as an attribute, a lock, an open file
        raise InputError(
            f"{type(model).__name__} cannot be copied ({str(error).splitlines()[0]}): attack a freshly built model with the same weights, "
            "with torch.nn.utils.parametrizations in place of the hooks of torch.nn.utils.weight_norm."
        ) from error


def logits_of(copy: nn.Module, params: Tensors, known: Tensors, images: Tensor, *, statistics: dict[str, Statistics] | None = None) -> Tensor:
    """Logits of a prepared copy, a pure function of its inputs.

    Args:    params: by name; they come first.  known: may hold further parameters, buffers (running statistics) and masks by name;
             its other names are ignored. What neither holds is the copy's own, cast to the images' dtype and device.
             statistics: is filled with the (mean, variance) of each BatchNorm's input, by name and call, if given.
    Returns: (B, classes).
    Raises:  InputError for parameters that the model lacks, masks that are missing or of another shape, and outputs that are no logits.
    """
    tape = _tape(copy)
    if unknown := sorted(params.keys() - tape.names):
        raise InputError(f"{type(copy).__name__} has no parameter {unknown[0]!r}: attack with the architecture that the client trains.")
    tensors = {name: tensor for name, tensor in known.items() if name in tape.names} | params
    some = next(copy.parameters(), images)
    if (some.dtype, some.device) != (images.dtype, images.device):
        for name, tensor in _own(copy):
            if name not in tensors:
                tensors[name] = tensor.to(images.device, images.dtype if tensor.is_floating_point() else tensor.dtype)
    tape.begin(known, statistics)
    try:
        logits = functional_call(copy, tensors, (images,))
    finally:
        tape.begin({}, None)
    return _checked(logits, copy)


def set_modes(model: nn.Module, batch_norm: BatchNormPolicy, dropout: DropoutPolicy) -> None:
    """Train and eval flags, and nothing else, as `prepare` explains the policies; for a model without surgery."""
    _set_flags(model, batch_norm, dropout)
    for module in _drops(model) if dropout == "off" else ():
        module.train(False)


# --- statistics of BatchNorm ----------------------------------------------------------------------------------------------------------


def norm_names(model: nn.Module) -> list[str]:
    """Names of the BatchNorm layers, in the order in which the model registers them: that of all lists of statistics."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def batch_statistics(copy: nn.Module, params: Tensors, images: Tensor, known: Tensors | None = None) -> Statistics:
    """Mean and variance of each BatchNorm's input over a batch, for priors on them; pure, differentiable and vmappable.

    Args:    copy: of `prepare`, in either mode.  params, known: as `logits_of` takes them.  images: (B, C, H, W).
    Returns: without Bessel's correction; a layer called several times gives the means over its calls, one that is not called its
             running statistics.
    """
    found: dict[str, Statistics] = {}
    logits_of(copy, params, known or {}, images, statistics=found)
    pairs = []
    for name in norm_names(copy):
        calls = found.get(name) or [_running(copy, name, known or {})]
        pairs.append(calls[0] if len(calls) == 1 else tuple(torch.stack(each).mean(0) for each in zip(*calls, strict=True)))
    return pairs


def running_statistics(model: nn.Module, known: Tensors | None = None) -> Statistics:
    """Running mean and variance of each BatchNorm: the buffers, or what `known` holds under their names.

    Raises: InputError if a layer keeps none.
    """
    return [_running(model, name, known or {}) for name in norm_names(model)]


def granted_statistics(model: nn.Module, known: Tensors) -> Statistics:
    """The private batch's own statistics, as an observation that grants them holds them in `known`.

    Raises: InputError if one is missing.
    """
    pairs = []
    for name in norm_names(model):
        mean, var = f"{STATISTICS}{name}.mean", f"{STATISTICS}{name}.var"
        if mean not in known or var not in known:
            raise InputError(f"the observation grants no batch statistics of {name!r}: match the running statistics, or observe with statistics='batch'.")
        pairs.append((known[mean], known[var]))
    return pairs


def _running(model: nn.Module, name: str, known: Tensors) -> tuple[Tensor, Tensor]:
    layer, prefix = model.get_submodule(name), f"{name}." if name else ""
    if layer.running_mean is None:
        raise InputError(f"BatchNorm {name!r} keeps no running statistics: match the batch's own, or take a model that tracks them.")
    return known.get(f"{prefix}running_mean", layer.running_mean), known.get(f"{prefix}running_var", layer.running_var)


# --- dropout's masks ------------------------------------------------------------------------------------------------------------------


def mask_shapes(copy: nn.Module, images_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the masks that one forward of (B, C, H, W) images takes, by name, in the order of their use.

    Raises: InputError if the copy draws anything else at random.
    """
    return {name: shape for name, (shape, _) in _measured(copy, images_shape).items()}


def draw_masks(copy: nn.Module, images_shape: Sequence[int], draws: torch.Generator) -> Tensors:
    """Masks as a client draws them, by name, float32 on the generator's device: 1 keeps, with probability 1 − rate, and 0 drops."""
    found = _measured(copy, images_shape).items()
    return {name: torch.empty(shape, device=draws.device).bernoulli_(1 - rate, generator=draws) for name, (shape, rate) in found}


def _measured(copy: nn.Module, images_shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], float]]:
    """Name → (shape, rate) of each mask, from a forward of black images."""
    tape, some = _tape(copy), next(copy.parameters(), torch.zeros(()))
    tape.measured = {}
    try:
        with torch.no_grad(), ForcedDraws({}):
            logits_of(copy, {}, {}, some.new_zeros(tuple(images_shape)))
        return tape.measured
    finally:
        tape.measured = None


# --- the untouched model, and parity with it ------------------------------------------------------------------------------------------


def plain_gradient(model: nn.Module, images: Tensor, labels: Tensor, *, loss: Loss = F.cross_entropy, masks: Tensors | Literal["expected"] | None = None) -> Tensors:
    """What a client computes: plain autograd on the model as it is. Running statistics and caches of the model are changed as ever.

    Args:    masks: see `ForcedDraws`; None lets the model draw.
    Returns: gradient of every parameter that requires one, zeros where the loss does not depend on it.
    Raises:  InputError if masks and draws do not fit, or the model cannot take the images.
    """
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not params:
        raise InputError(f"{type(model).__name__} has no parameter that requires a gradient: a client would release nothing.")
    with torch.enable_grad():
        try:
            if masks is None:
                logits = model(images)
            else:
                forced = ForcedDraws({} if masks == "expected" else masks, expected=masks == "expected")
                with forced:
                    logits = model(images)
                forced.check_all_given()
        except (ValueError, RuntimeError, AssertionError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{type(model).__name__} cannot take images {tuple(images.shape)} ({reason}). Choose others, or another mode.") from error
        gradients = torch.autograd.grad(loss(_checked(logits, model), labels), list(params.values()), allow_unused=True, materialize_grads=True)
    return {name: gradient.detach() for name, gradient in zip(params, gradients, strict=True)}


def differences(model: nn.Module, copy: nn.Module, images: Tensor, labels: Tensor, *, loss: Loss = F.cross_entropy) -> dict[str, float]:
    """How far the copy's first gradient is from the untouched model's, by parameter, in float64.

        ‖g − g′‖ / max(‖g‖, 1e-3 ‖all g‖)      g: plain autograd, in the copy's mode;  g′: torch.func on the copy

    The floor is for gradients that are zero but for rounding, such as that of a bias before BatchNorm; what is missing altogether
    still shows if it is more than 1e-12 of all. Dropout's masks are drawn once and given to both.

    Args:    model: from which `copy` was prepared; neither is modified.  images: (B, C, H, W).  labels: (B,), or probabilities.
    Raises:  InputError if the model draws other random numbers than the copy takes masks for.
    """
    expected, masks = _released(model, copy, images, labels, loss)
    ours = duplicate(copy).double()
    params = {name: tensor.detach() for name, tensor in ours.named_parameters() if name in expected}
    found = grad(lambda params: loss(logits_of(ours, params, masks, images.detach().double()), _double(labels)))(params)
    return _relative(found, expected)


def parity(model: nn.Module, copy: nn.Module, images: Tensor, labels: Tensor, *, loss: Loss = F.cross_entropy) -> float:
    """The largest of `differences`; infinite if any is not a number."""
    return max(differences(model, copy, images, labels, loss=loss).values())


def check_parity(
    model: nn.Module, copy: nn.Module, images: Tensor, labels: Tensor, *, loss: Loss = F.cross_entropy, tolerance: float = TOLERANCE
) -> float:
    """As `parity`.

    A batch on which the model itself amplifies rounding, as BatchNorm does with two or three values per channel, is told by what the last
    digits of the images do to the model's own gradient: 30 times the largest of four random changes of them is allowed, up to 1e-6.

    Raises: InputError beyond that, with the parameter that is farthest off.
    """
    apart = differences(model, copy, images, labels, loss=loss)
    name = max(apart, key=apart.get)
    if apart[name] > tolerance:
        exact, draw = images.detach().double(), generator(0, "rounding", device=images.device)
        signs = [torch.randn(images.shape, dtype=torch.float64, device=images.device, generator=draw) for _ in range(4)]
        released, *nudged = (_released(model, copy, x, labels, loss)[0] for x in (exact, *(torch.nextafter(exact, exact + sign) for sign in signs)))
        tolerance = max(tolerance, min(30 * max(max(_relative(other, released).values()) for other in nudged), 1e-6))
    if apart[name] > tolerance:
        raise InputError(
            f"the attack copy of {type(model).__name__} is not the model: the gradients of {name!r} differ by {apart[name]:.1e} of their norm, expected "
            f"{tolerance:.0e}. Replace that layer by one that torch.func can differentiate twice, or attack with a simulator of your own."
        )
    return apart[name]


def _released(model: nn.Module, copy: nn.Module, images: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensors, Tensors]:
    """The untouched model's gradient in the copy's mode, in float64, and the masks that it was given."""
    tape, client = _tape(copy), duplicate(model).double()
    set_modes(client, tape.batch_norm, tape.dropout)
    masks = draw_masks(duplicate(copy).double(), images.shape, generator(0, "parity", device=images.device))
    forced = "expected" if tape.dropout == "off" else masks
    return plain_gradient(client, images.detach().double(), _double(labels), loss=loss, masks=forced), masks


def _relative(found: Tensors, expected: Tensors) -> dict[str, float]:
    """Of each parameter, as `differences` has it; what is not a number is infinite."""
    floor = max(1e-3 * math.sqrt(sum(float(tensor.square().sum()) for tensor in expected.values())), torch.finfo(torch.float64).tiny)
    apart = {name: float((found[name] - tensor).norm()) / max(float(tensor.norm()), floor) for name, tensor in expected.items()}
    return {name: math.inf if math.isnan(value) else value for name, value in apart.items()}


def _double(labels: Tensor) -> Tensor:
    return labels.double() if labels.is_floating_point() else labels


class ForcedDraws(TorchDispatchMode):
    """Within this context, whatever draws Bernoulli variables (dropout and its kin, below autograd) is given them.

    Args:   masks: in the order of the draws, 1 keeps and 0 drops.  expected: every draw is its expectation instead.
    Raises: InputError, from within, for a draw that has no mask or is of another kind.
    """

    def __init__(self, masks: Tensors, *, expected: bool = False) -> None:
        super().__init__()
        self.expected, self.left = expected, list(masks.items())

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        aten = torch.ops.aten
        if function is aten.bernoulli_.float:
            drawn, probability = args[0], args[1] if len(args) > 1 else 0.5
            return drawn.fill_(probability) if self.expected else drawn.copy_(self._next(drawn.shape))
        if function is aten.native_dropout.default and not self.expected:  # how CUDA does it
            mask = self._next(args[0].shape).to(args[0])
            return args[0] * mask * (0.0 if args[1] == 1 else 1 / (1 - args[1])), mask.bool()
        if torch.Tag.nondeterministic_seeded in function.tags and "attention" not in str(function):
            raise InputError(f"the model draws random numbers by {function}, which are no mask of dropout: switch that off in the model's options.")
        return function(*args, **(kwargs or {}))

    def _next(self, shape: torch.Size) -> Tensor:
        if not self.left:
            raise InputError(f"the model draws a mask of shape {tuple(shape)} for which none is given: give one for each of its draws, see mask_shapes.")
        name, mask = self.left.pop(0)
        if mask.numel() != shape.numel():
            raise InputError(f"mask {name!r} has shape {tuple(mask.shape)}, but the model draws {tuple(shape)}: see mask_shapes.")
        return mask.reshape(shape)

    def check_all_given(self) -> None:
        if self.left:
            raise InputError(f"the model never draws mask {self.left[0][0]!r}: give those of mask_shapes for its mode.")


def _checked(logits: Any, model: nn.Module) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"{type(model).__name__} gives {what}: expected logits (images, classes). Wrap it in a module that returns these alone.")
    return logits


# --- the parts of a copy --------------------------------------------------------------------------------------------------------------


class _Tape:
    """What one forward of a copy takes besides its tensors, and leaves behind; shared by the copy's modules."""

    def __init__(self, batch_norm: BatchNormPolicy, dropout: DropoutPolicy, fused_attention: bool) -> None:
        self.batch_norm, self.dropout, self.fused_attention = batch_norm, dropout, fused_attention
        self.names: frozenset[str] = frozenset()
        self.measured: dict[str, tuple[tuple[int, ...], float]] | None = None
        self.begin({}, None)

    def begin(self, known: Tensors, statistics: dict[str, Statistics] | None) -> None:
        self.known, self.statistics, self.calls = known, statistics, Counter()

    def mask(self, module: str, shape: Sequence[int], rate: float, like: Tensor) -> Tensor:
        """The mask of this draw, of the dtype and on the device of what it multiplies."""
        self.calls[module] += 1
        name, shape = MASKS + module + (f":{self.calls[module]}" if self.calls[module] > 1 else ""), tuple(shape)
        if self.measured is not None:
            self.measured[name] = (shape, rate)
            return like.new_full(shape, 1 - rate)
        mask = self.known.get(name)
        if mask is None or mask.shape != shape:
            what = "is missing" if mask is None else f"has shape {tuple(mask.shape)}"
            raise InputError(
                f"mask {name!r} {what}: expected {shape} among the known tensors. Search or draw it (mask_shapes, draw_masks), or attack with "
                'dropout="off".'
            )
        return mask.to(like)


class _Drop(NamedTuple):
    """A dropout: its rate, which entries share one of the mask's, and what the mask does."""

    rate: float
    over: Literal["elements", "channels", "examples", "batch"] = "elements"
    alpha: bool = False
    scaled: bool = True

    def __call__(self, tape: _Tape, module: str, x: Tensor) -> Tensor:
        if self.rate == 0:
            return x
        if self.rate == 1:  # drawn by none; alpha dropout's limit is 0 as well
            return x * 0.0
        ones = [1] * x.ndim
        shape = {"elements": x.shape, "channels": [*x.shape[:2], *ones[2:]], "examples": [*x.shape[:1], *ones[1:]], "batch": ones}[self.over]
        mask = tape.mask(module, shape, self.rate, x)
        if self.alpha:
            scale = 1 / math.sqrt((_SELU**2 * self.rate + 1) * (1 - self.rate))
            return scale * (x * mask + _SELU * (mask - 1 + self.rate))
        return x * (mask / (1 - self.rate)) if self.scaled else x * mask


class _Ramp:
    """nn.Hardsigmoid, twice differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        return _hardsigmoid(x)


class _PureNorm:
    """BatchNorm as a pure function, with what timm's BatchNormAct2d does after it."""

    def forward(self, x: Tensor) -> Tensor:
        batch = self.training or self.running_mean is None
        return after_norm(self, _normalised(self._tape, self._name, x, self.running_mean, self.running_var, self.weight, self.bias, self.eps, batch))


class _InputNorm:
    """InstanceNorm in train mode, without its update of the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class _Masked:
    """A dropout module with its mask from the tape."""

    def forward(self, x: Tensor) -> Tensor:
        return self._drop(self._tape, self._name, x)


class _GlobalMean:
    """Average pooling to one position. PyTorch's own is slow for channels-last maps: it has no batching rule, and loops over attacks."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self._dims, keepdim=True)


class _Grouped:
    """A convolution of many groups, by `_Convolved`."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        y = _Convolved.apply(x, weight, (self.stride, self.padding, self.dilation, self.groups))
        return y if bias is None else y + bias.view(-1, *[1] * len(self.stride))


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


class _Convolved(_Product):
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
        return _Convolved.linearised(ctx, x, weight)


class _ByInput(_Product):
    @staticmethod
    def forward(g: Tensor, weight: Tensor, how: tuple, shape: torch.Size) -> Tensor:
        return _convolution_backward(g, g.new_empty(()).expand(shape), weight, how, 0)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        g, weight = ctx.saved_tensors
        return (
            _Convolved.apply(dx, weight, ctx.rest[0]) if ctx.needs_input_grad[0] else None,
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
            _Convolved.apply(x, dw, ctx.rest[0]) if ctx.needs_input_grad[0] else None,
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


class _MathHeads:
    """nn.MultiheadAttention by plain products."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        # is_causal is a hint about attn_mask here, as in PyTorch
        if query.ndim == 2:
            padding = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            out, weights = (t.squeeze(0) for t in self._attend(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), padding, attn_mask))
        elif self.batch_first:
            out, weights = self._attend(query, key, value, key_padding_mask, attn_mask)
        else:
            out, weights = self._attend(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), key_padding_mask, attn_mask)
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        return out, weights.mean(-3) if average_attn_weights else weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, L, E), (B, S, E), (B, S, E), (B, S) and (L, S) or (B heads, L, S) → (B, L, E) and weights (B, heads, L, S)."""
        split = self.in_proj_weight.chunk(3) if self._qkv_same_embed_dim else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((q, k, v), split, biases, strict=True))
        keys = k.shape[1]
        if self.bias_k is not None:
            k, v = (torch.cat([t, bias.expand(len(t), 1, -1)], 1) for t, bias in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        appended = k.shape[1] - keys
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        for hidden in (None if padding is None else padding[:, None, None], mask if mask is None or mask.ndim == 2 else mask.unflatten(0, (-1, self.num_heads))):
            if hidden is not None:  # True hides, unlike in F.scaled_dot_product_attention
                hidden = F.pad(hidden, (0, appended))
                scores = scores.masked_fill(hidden, -math.inf) if hidden.dtype == torch.bool else scores + hidden
        weights = scores.softmax(-1)
        if self._masked:
            weights = _Drop(self.dropout)(self._tape, self._name, weights)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights


class _Watched:
    """A module whose own code calls functions that cannot be attacked."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Replaced(self._tape, self._name, self._masked, getattr(self, "num_batches_tracked", None)):
            return super().forward(*args, **kwargs)


class _Replaced(TorchFunctionMode):
    """Within one module: functional attention, hardsigmoid, dropout and BatchNorm as `prepare` replaces modules."""

    def __init__(self, tape: _Tape, name: str, masked: bool, counter: Tensor | None) -> None:
        super().__init__()
        self.tape, self.name, self.masked, self.counter = tape, name, masked, counter

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _DROPOUTS:
            return self._dropout(function, *args, **kwargs)
        if function is F.hardsigmoid:
            return _hardsigmoid(args[0] if args else kwargs["input"])
        if function is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if function is F.scaled_dot_product_attention and not self.tape.fused_attention:
            return self._attention(*args, **kwargs)
        if function is F.multi_head_attention_forward and "need_weights" in kwargs and not self.tape.fused_attention:
            out, weights = function(*args, **{**kwargs, "need_weights": True})  # which makes PyTorch compute them
            return out, weights if kwargs["need_weights"] else None
        if function is Tensor.add_ and args[0] is self.counter is not None:  # of batches, by code that goes on to F.batch_norm
            return self.counter
        if function is Tensor.bernoulli_ and self.masked and kwargs.get("generator") is None:
            keep = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            return self.tape.mask(self.name, args[0].shape, 1 - keep, args[0]).clone()  # callers scale it in place
        return function(*args, **kwargs)

    def _dropout(self, function: Callable, input: Tensor, p: float = 0.5, training: bool | None = None, inplace: bool = False) -> Tensor:
        drop = _DROPOUTS[function]
        training = not drop.alpha if training is None else training  # PyTorch's defaults
        if not training or not self.masked:
            return input
        return drop._replace(rate=p)(self.tape, self.name, input)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = scores.softmax(-1)
        return (_Drop(dropout_p)(self.tape, self.name, weights) if self.masked else weights) @ value

    def _batch_norm(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,
        training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        return _normalised(self.tape, self.name, input, running_mean, running_var, weight, bias, eps, training)


class _NothingCached(dict):
    """A cache that never holds: what was computed within a transform of torch.func must not outlive it."""

    def __contains__(self, key: object) -> bool:
        return False

    def __getitem__(self, key: object) -> Any:
        return self.pop(key)


class _Uncached:
    """One of timm's attentions that keep their bias in eval mode; they renew the cache whenever they are moved or cast."""

    @property
    def attention_bias_cache(self) -> dict:
        return self.__dict__.setdefault("_nothing", _NothingCached())

    @attention_bias_cache.setter
    def attention_bias_cache(self, cache: dict) -> None:
        pass


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    ramp = F.relu6(x + 3)
    # PyTorch's slope is 1/6 rounded to float32 even in float64, 3e-8 off: what a client releases has it too
    return ramp / 6 + (ramp - ramp.detach()) * _SLOPE_ERROR if x.dtype == torch.float64 else ramp / 6


def _normalised(
    tape: _Tape, name: str, x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, batch: bool
) -> Tensor:
    """BatchNorm of x (B, channels, …): by the batch's statistics, or as an affine map. In float32 at least, as PyTorch's own."""
    dtype = x.dtype
    x = x.float() if dtype in (torch.bfloat16, torch.float16) else x
    if batch or tape.statistics is not None:
        if batch and x.numel() == x.shape[1] and tape.measured is None:
            raise InputError(f"BatchNorm {name!r} gets one value per channel, {tuple(x.shape)}: take larger batches or images, or eval mode.")
        batch_mean, centred, batch_var = moments(x)
        if tape.statistics is not None:
            tape.statistics.setdefault(name, []).append((batch_mean.flatten(), batch_var.flatten()))
    if batch:
        return rescaled(centred, batch_var, weight, bias, eps).to(dtype)
    return affine(x, mean, var, weight, bias, eps).to(dtype)


# --- which module becomes what --------------------------------------------------------------------------------------------------------

_SELU = 1.7580993408473766  # λα: alpha dropout sets entries to −λα
_SLOPE_ERROR = float(torch.ops.aten.hardsigmoid_backward(torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))) - 1 / 6
_OWN_BACKWARD = {"SwishMe": nn.SiLU, "MishMe": nn.Mish, "HardSigmoidMe": nn.Hardsigmoid, "HardSwishMe": nn.Hardswish}
_DROPOUTS: dict[Callable, _Drop] = {
    F.dropout: _Drop(0.5),
    F.dropout1d: _Drop(0.5, "channels"),
    F.dropout2d: _Drop(0.5, "channels"),
    F.dropout3d: _Drop(0.5, "channels"),
    F.alpha_dropout: _Drop(0.5, alpha=True),
    F.feature_alpha_dropout: _Drop(0.5, "channels", alpha=True),
}
_DROPOUT_MODULES = {
    nn.Dropout: F.dropout,
    nn.Dropout1d: F.dropout1d,
    nn.Dropout2d: F.dropout2d,
    nn.Dropout3d: F.dropout3d,
    nn.AlphaDropout: F.alpha_dropout,
    nn.FeatureAlphaDropout: F.feature_alpha_dropout,
}
_ATTENTION = frozenset({F.scaled_dot_product_attention, F.multi_head_attention_forward})
_CAUGHT = frozenset({*_DROPOUTS, *_ATTENTION, F.hardsigmoid, F.batch_norm})
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MANY_GROUPS = 32
"""From where the loop over groups is avoided: regnetx_002, of up to 46 groups, runs at 0.65 s an iteration with it and 0.83 without
(two images, 8 attacks, not recorded); MobileNetV3-small, of 16 to 576, at 0.69 and 0.68; ConvNeXt-tiny, of 96 to 768, at 3.85 and 3.22."""
_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def _operate(module: nn.Module, name: str, tape: _Tape, changes: Counter) -> None:
    """Change one module's class where needed, and count the change."""
    masked = tape.dropout == "masks" and module.training
    kind, what, more = None, [], {}
    if isinstance(module, _BatchNorm) and is_plain_norm(type(module)):
        batch = module.training or module.running_mean is None
        kind, what = _PureNorm, ["BatchNorm -> batch statistics, without updates" if batch else "BatchNorm -> affine map of running statistics"]
    elif isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
        kind, what = _InputNorm, ["InstanceNorm -> without updates"]
    elif (drop := _drop(module)) is not None:
        if masked and drop.rate > 0:
            kind, what, more = _Masked, [f"{type(module).__name__} -> explicit mask"], {"_drop": drop}
    elif isinstance(module, nn.MultiheadAttention):
        dropped = masked and module.dropout > 0
        if dropped or not tape.fused_attention:
            kind, what, more = _MathHeads, ["MultiheadAttention -> math" + " with explicit mask" * dropped], {"_masked": dropped}
    elif any(type(module).forward is kind.forward for kind in _CONVOLUTIONS) and _in_many_groups(module):
        kind, what = _Grouped, ["convolution of many groups -> without a loop over them"]
    elif type(module) in _POOLS and {module.output_size} <= {1, (1,), (1, 1), (1, 1, 1)}:
        kind, what, more = _GlobalMean, ["pooling to one position -> mean"], {"_dims": tuple(range(-1 - _POOLS.index(type(module)), 0))}
    else:
        what = _switched_off(module)
        if caught := _caught(module, tape):
            kind, what, more = _Watched, [*what, *caught], {"_masked": masked}
    if kind is not None:
        module.__class__ = _with(type(module), kind)
        module.__dict__.update(_tape=tape, _name=name, **more)
    changes.update(what)


def _in_many_groups(module: nn.Conv2d) -> bool:
    return module.groups >= _MANY_GROUPS and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _switched_off(module: nn.Module) -> list[str]:
    """Turn off by its own switches what cannot be attacked in this module."""
    what = []
    if isinstance(getattr(module, "attention_bias_cache", None), dict):
        del module.attention_bias_cache
        module.__class__ = _with(type(module), _Uncached)
        what.append("cached attention bias -> computed")
    if getattr(module, "grad_checkpointing", False) is True:
        module.grad_checkpointing = False
        what.append("gradient checkpointing -> off")
    if isinstance(module, nn.TransformerEncoderLayer) and module.activation_relu_or_gelu:
        module.activation_relu_or_gelu = 0  # read by its fast path alone, which has no second derivative
        what.append("TransformerEncoderLayer's fast path -> off")
    for name, value in vars(module).items():
        if value is F.hardsigmoid:
            vars(module)[name] = _hardsigmoid
            what.append("Hardsigmoid -> relu6(x + 3) / 6")
    return what


def _caught(module: nn.Module, tape: _Tape) -> list[str]:
    """What the module's own code calls that must be caught when it runs."""
    called, what = _calls(type(module)), []
    if called & _ATTENTION and not hasattr(module, "fused_attn") and not tape.fused_attention:
        what.append("functional attention -> math")
    if F.hardsigmoid in called:
        what.append("functional hardsigmoid -> relu6(x + 3) / 6")
    if isinstance(module, _BatchNorm) or (F.batch_norm in called and any("running_" in name for name in module._buffers)):
        what.append("functional BatchNorm -> without updates")
    active = module.training and getattr(module, "drop_rate", None) != 0 and getattr(module, "drop_prob", None) != 0
    if active and tape.dropout == "masks" and (called & _DROPOUTS.keys() or "bernoulli_" in called):
        what.append("functional dropout -> explicit mask")
    elif active and called & _DROPOUTS.keys():
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


def _drop(module: nn.Module) -> _Drop | None:
    """The dropout that a module is, or None. Those that do something of their own are told by their class's name, as copies of timm's are."""
    for kind, function in _DROPOUT_MODULES.items():
        if type(module).forward is kind.forward:
            return _DROPOUTS[function]._replace(rate=float(module.p))
    if type(module).__name__ == "DropPath" and hasattr(module, "drop_prob"):
        return _Drop(float(module.drop_prob or 0), "examples", scaled=getattr(module, "scale_by_keep", True))
    if type(module).__name__ == "StochasticDepth" and hasattr(module, "mode"):
        return _Drop(float(module.p), "examples" if module.mode == "row" else "batch")
    return None


def _drops(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that do nothing in train mode that they do not in eval mode, but for dropping something."""
    for module in model.modules():
        if _drop(module) is not None or isinstance(module, nn.MultiheadAttention) or type(module).__name__ in ("DropBlock2d", "PatchDropout"):
            yield module


def _rate(module: nn.Module) -> float:
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout
    drop = _drop(module)
    return drop.rate if drop is not None else getattr(module, "drop_prob", None) or getattr(module, "prob", None) or 0.0


def _set_flags(model: nn.Module, batch_norm: BatchNormPolicy, dropout: DropoutPolicy) -> None:
    if batch_norm != "keep":
        model.train(batch_norm == "train" or dropout == "masks")
    if batch_norm == "eval":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train(False)


@functools.cache
def _with(kind: type, part: type) -> type:
    """The class with the part's forward; it keeps its name and stays a subclass."""
    return type(kind.__name__, (part, kind), {"__module__": kind.__module__})


def _own(copy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from copy.named_parameters()
    yield from copy.named_buffers()


def _tape(copy: nn.Module) -> _Tape:
    tape = copy.__dict__.get("_tape")
    if not isinstance(tape, _Tape):
        raise InputError(f"this {type(copy).__name__} is no attack copy: give what prepare(model) returns.")
    return tape
