"""A copy of any network that can be attacked: pure, vmappable and twice differentiable, with the parameters' names as they were.

Surgery changes the class of single modules in the copy, so that names, shared modules, hooks and attributes stay. What a forward
would draw or update (dropout's masks, batch statistics) becomes an input of `logits_of` or an output of `batch_statistics`.
A module whose own code calls what cannot be attacked (`F.scaled_dot_product_attention`, `F.hardsigmoid`, `F.dropout`, …), without a
switch against it, runs under a `TorchFunctionMode` of its own; all others run without one.
"""

from __future__ import annotations

import copy as copying
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from gidef.attack.surgery_parts import BatchNormPolicy, DropoutPolicy, Ramp, Statistics, Tape
from gidef.attack.surgery_rules import OWN_BACKWARD, drops, operate, rate_of, set_flags, with_part
from gidef.errors import InputError
from gidef.models.surgery import make_differentiable
from gidef.rng import generator
from gidef.types import Tensors

STATISTICS = "statistics."
"""Prefix of granted batch statistics in `known`: "statistics.<module>.mean" and "statistics.<module>.var"."""
TOLERANCE = 1e-9
"""Of the first gradient in float64, relative and per parameter."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""loss(logits (B, classes), labels (B,) indices or (B, classes) probabilities) → scalar, a mean over the batch."""


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
    tape, changes = Tape(batch_norm, dropout, fused_attention), Counter()
    for module in copy.modules():
        if (plain := OWN_BACKWARD.get(type(module).__name__)) and type(module).__module__.startswith("timm."):
            module.__class__, module.inplace = plain, False
            changes["activation with its own backward -> PyTorch's"] += 1
        changes["fused attention -> math"] += bool(getattr(module, "fused_attn", False)) and not fused_attention
        changes["in-place -> out of place"] += getattr(module, "inplace", False) is True
        if isinstance(module, nn.Hardsigmoid):
            module.__class__ = with_part(nn.Module, Ramp)
            changes["Hardsigmoid -> relu6(x + 3) / 6"] += 1
    make_differentiable(copy, fused_attention=fused_attention)
    set_flags(copy, batch_norm, dropout)
    if dropout == "off":
        for module in drops(copy):
            changes[f"{type(module).__name__} -> off"] += module.training and rate_of(module) > 0
            module.train(False)
    for name, module in list(copy.named_modules()):
        operate(module, name or "(root)", tape, changes)
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
    set_flags(model, batch_norm, dropout)
    for module in drops(model) if dropout == "off" else ():
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
    return relative(found, expected)


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
    return accept(apart, lambda x: _released(model, copy, x, labels, loss)[0], images, of=type(model).__name__, tolerance=tolerance)


def accept(apart: dict[str, float], released: Callable[[Tensor], Tensors], images: Tensor, *, of: str, tolerance: float = TOLERANCE) -> float:
    """The largest of `differences` or `relative`, if it is no more than rounding, see `check_parity`, which also says what is raised.

    Args:   released: the untouched model's gradient of images, in float64.  of: the model's name.
    """
    name = max(apart, key=apart.get)
    if apart[name] > tolerance:
        exact, draw = images.detach().double(), generator(0, "rounding", device=images.device)
        signs = [torch.randn(images.shape, dtype=torch.float64, device=images.device, generator=draw) for _ in range(4)]
        expected, *nudged = (released(x) for x in (exact, *(torch.nextafter(exact, exact + sign) for sign in signs)))
        tolerance = max(tolerance, min(30 * max(max(relative(other, expected).values()) for other in nudged), 1e-6))
    if apart[name] > tolerance:
        raise InputError(
            f"the attack copy of {of} is not the model: the gradients of {name!r} differ by {apart[name]:.1e} of their norm, expected "
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


def relative(found: Tensors, expected: Tensors) -> dict[str, float]:
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


def _own(copy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from copy.named_parameters()
    yield from copy.named_buffers()


def _tape(copy: nn.Module) -> Tape:
    tape = copy.__dict__.get("_tape")
    if not isinstance(tape, Tape):
        raise InputError(f"this {type(copy).__name__} is no attack copy: give what prepare(model) returns.")
    return tape
