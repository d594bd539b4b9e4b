"""A4: R-GAP, the recursive attack on chains of convolutions: from the last layer to the image, one linear system per layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gidef.attack.analytic.outcome import check_fit, failed, labels_of, recovered, trouble
from gidef.attack.analytic.probe import ImageMap, Step, attack_copy, image_map, probes, trace
from gidef.errors import InputError
from gidef.types import Observation, Reconstruction, Tensors

# K classes, n unknowns of a layer's input, O, C, kh, kw of a kernel, (Ho, Wo) of a layer's output; everything in float64 on the CPU
MOST_UNKNOWNS = 8_192
"""Largest layer input that is solved for: an n × n matrix is factorised."""


class Layer(NamedTuple):
    """A linear map of the chain and the activations behind it. Linear layers are 1×1 convolutions of a 1×1 map.

    name: of the module.  shape: of its input (C, H, W), unbatched.  stride, padding, dilation: per side.
    """

    name: str
    shape: tuple[int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    activations: tuple[nn.Module, ...]
    has_bias: bool


class Chain(NamedTuple):
    """Layers from image to logits, and what is done to the image before them."""

    layers: tuple[Layer, ...]
    mapped: ImageMap


class Rank(NamedTuple):
    """One layer's system: unknowns n, rank r ≤ n, and its equations from the weights and from the gradients."""

    name: str
    unknowns: int
    rank: int
    weight_equations: int
    gradient_equations: int


def _inverse_leaky(module: nn.LeakyReLU, out: Tensor) -> Tensor:
    return torch.where(out < 0, out / module.negative_slope, out)


INVERSES: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.Identity: lambda module, out: out,
    nn.LeakyReLU: _inverse_leaky,
    nn.ReLU: lambda module, out: out,
    nn.Tanh: lambda module, out: out.clamp(-1 + 1e-12, 1 - 1e-12).atanh(),
    nn.Sigmoid: lambda module, out: out.clamp(1e-12, 1 - 1e-12).logit(),
    nn.ELU: lambda module, out: torch.where(out < 0, torch.log1p((out / module.alpha).clamp(min=-1 + 1e-12)), out),
    nn.Softplus: lambda module, out: torch.where(
        module.beta * out > module.threshold, out, (module.beta * out.clamp(min=1e-12)).expm1().log() / module.beta
    ),
}
"""Activations whose input follows from their output. ReLU's does where it is on; where it is off, the layer's equation is dropped."""


def find_chain(model: nn.Module, names: Sequence[str], image_shape: Sequence[int]) -> Chain | str:
    """The model as a chain of linear layers and invertible activations, from the image to the logits; otherwise why it is none.

    The attacker runs its copy on images of its own: each layer must be given exactly what the one before it gave, flattened or not.
    names: of the update; the last layer's weight must be among them.
    """
    net = attack_copy(model)
    images = probes(image_shape, next((p.dtype for p in net.parameters()), torch.float32))
    steps, logits = trace(net, images, lambda module, given: True)
    layers: list[Layer] = []
    mapped, last = None, None
    for step in steps:
        if last is not None and (step.input.numel() != last.numel() or not torch.equal(step.input.flatten(), last.flatten())):
            return f"{step.name!r} is not given what the layer before it gave: no chain"
        if not _by_itself(step):
            return f"what {step.name!r} gives is changed on the way, as by a latent norm or a perturbation: no chain"
        if isinstance(step.module, (nn.Conv2d, nn.Linear)):
            if mapped is None and (mapped := image_map(step.input, images)) is None:
                return f"the first layer, {step.name!r}, does not see the image entry by entry"
            layer = _layer(step)
            if isinstance(layer, str):
                return layer
            layers.append(layer)
        elif type(step.module) in INVERSES and layers:
            layers[-1] = layers[-1]._replace(activations=(*layers[-1].activations, step.module))
        elif not _passes(step):
            return f"{step.name!r} ({type(step.module).__name__}) cannot be inverted"
        last = step.output
    if not layers:
        return "no convolution and no linear layer ran"
    if not isinstance(logits, Tensor) or logits.ndim != 2 or last.numel() != logits.numel() or not torch.equal(last.flatten(), logits.flatten()):
        return "what the last layer gave is not the model's output"
    if layers[-1].activations or layers[-1].shape[1:] != (1, 1):
        return f"the last layer, {layers[-1].name!r}, is not a linear one without an activation behind it"
    if f"{layers[-1].name}.weight" not in names:
        return f"{layers[-1].name + '.weight'!r}, where the recursion begins, is not released"
    largest = max(math.prod(layer.shape) for layer in layers)
    if largest > MOST_UNKNOWNS and len(layers) > 1:
        return f"a layer has {largest} inputs, more than the {MOST_UNKNOWNS} that are solved for"
    return Chain(tuple(layers), mapped)


def rgap(observation: Observation, model: nn.Module, *, image_shape: Sequence[int], num_classes: int, chain: Chain | None = None) -> Reconstruction:
    """The image of a batch of one, from the gradients of a chain of layers without norms, residuals or pooling.

        x_{i+1} = σ(z_i),  z_i = W_i x_i + b_i,  k_i = ∂L/∂z_i = σ'(z_i) ⊙ W_{i+1}ᵀ k_{i+1}
        last layer     k from ∂L/∂b, or from ∂L/∂W = k xᵀ and k = p(W x) − y together;  x from ∂L/∂W and k
        then           [W_i; K_i] x_i = [σ⁻¹(x_{i+1}) − b_i; ∂L/∂W_i],   K_i: x ↦ Σ_positions k_i x, by least squares

    The last layer's loss is cross-entropy, with one output the logistic one with labels 0 and 1. Without a bias in the last layer,
    several inputs may solve it; all are followed, as restarts, and that whose own gradient fits best is chosen. Of one output or two,
    without any bias, a second image with the very same gradient can exist, a multiple of the first: then the brightest one
    inside the box [0, 1] is chosen, and `restart_images` holds all.

    Args:    model: the attacker's copy of the architecture; weights come from the observation.  chain: as `find_chain` finds it; None
             looks for it.
    Returns: loss: ‖g(x̂) − g‖ / ‖g‖ over the chain's released tensors: 0 to rounding where the recursion is exact. Exact to rounding,
             amplified by each layer's condition number, if every system has full rank (`rgap_ranks`). Otherwise status "ok", the
             shortest solution (around mid-grey in the first layer), and `error` names the deficient layers and the index
             Σ_i (d − i + 1)/d · (rank_i − n_i) ≤ 0 over the d layers.
             Failed for batches, models that are no chain, updates that are zero or not finite, and deltas without a bias in the last layer.
    Raises:  InputError if the observation is not one of this model.
    Source:  Zhu and Blaschko 2021 (ICLR), arXiv:2010.07733; the index after its rank analysis.
    Deviates: biases are allowed; several classes; ReLU by leaving out the equations of units that are off; equations of gradients are
             scaled to the size of those of weights; systems are solved by a Cholesky factor and conjugate gradients on top, which costs
             n³/3 where an SVD costs some 10 n³; no virtual constraints.
    """
    return _attack(observation, model, image_shape, num_classes, chain)[0]


def rgap_ranks(observation: Observation, model: nn.Module, *, image_shape: Sequence[int], num_classes: int) -> list[Rank]:
    """The systems that `rgap` solves, from the first layer to the last but one. A rank below the unknowns leaves that layer's input open.

    Raises:  InputError if `rgap` has no system to solve, with its reason.
    """
    result, ranks = _attack(observation, model, image_shape, num_classes, None)
    if result.status == "failed":
        raise InputError(f"R-GAP has no system to solve: {result.error}. Attack a chain of layers, with a batch of one.")
    return ranks


def rank_index(ranks: Sequence[Rank]) -> float:
    """Σ_i (d − i + 1)/d · (rank_i − n_i) over the systems of a chain of d layers, the first one first; 0 if all are determined."""
    depth = len(ranks) + 1
    return sum((depth - place) / depth * (one.rank - one.unknowns) for place, one in enumerate(ranks))


def _attack(
    observation: Observation, model: nn.Module, image_shape: Sequence[int], num_classes: int, chain: Chain | None
) -> tuple[Reconstruction, list[Rank]]:
    """`rgap`, and the ranks of the chosen solution; none if it failed."""
    check_fit(observation, model, image_shape)
    labels = labels_of(observation, num_classes)
    found = find_chain(model, list(observation.update), image_shape) if chain is None else chain

    def fail(reason: str) -> tuple[Reconstruction, list[Rank]]:
        return failed(observation, image_shape, labels, reason), []

    if isinstance(found, str):
        return fail(found)
    if observation.num_examples != 1:
        return fail(f"the recursion is that of one image, not of a batch of {observation.num_examples}")
    weights = {name: tensor.detach().double().cpu() for name, tensor in model.named_parameters()}
    weights |= {name: tensor.detach().double().cpu() for name, tensor in observation.params.items()}
    update = {name: observation.update[name].detach().double().cpu() for name in _tensors(found) if name in observation.update}
    head = f"{found.layers[-1].name}.weight"
    if reason := trouble(observation, update):
        return fail(reason)
    if not update[head].any():
        return fail(f"the update of {head!r} is zero: the recursion begins there")
    eps = torch.finfo(observation.update[head].dtype).eps
    granted = None if observation.labels is None else int(labels[0])
    beginnings = _beginnings(found.layers[-1], weights, update, observation, granted, eps)
    if isinstance(beginnings, str):
        return fail(beginnings)
    tried = []
    for one in beginnings:
        scaled = {name: tensor / one.scale for name, tensor in update.items()}
        inputs, ranks = _descend(found, weights, scaled, one)
        image = found.mapped.image(inputs.view(1, -1), image_shape)
        tried.append((_misfit(found, weights, scaled, image, one.label), image, one.label, ranks))
    losses = torch.tensor([loss for loss, *_ in tried]).nan_to_num(nan=torch.inf)
    # twins (the paper's word) have the same gradient and are multiples of one another: the brighter one, if it stays in the box
    outside = torch.stack([(image - image.clamp(0, 1)).square().mean() for _, image, _, _ in tried]).nan_to_num(nan=torch.inf)
    twins = [place for place in range(len(tried)) if losses[place] <= 100 * losses.min()]
    restart = min(twins, key=lambda place: (max(float(outside[place]), 1e-6), -float(tried[place][1].norm())))
    loss, image, label, ranks = tried[restart]
    if not math.isfinite(losses[restart]):
        return fail("the recursion left the finite numbers: a noisy update, or an ill-conditioned layer")
    images = torch.stack([image.clamp(0, 1).float() for _, image, _, _ in tried])
    result = recovered(observation, image, torch.tensor([label]), loss)
    result = dataclasses.replace(result, restart=restart, restart_losses=losses, restart_images=images, error=_deficiency(ranks))
    return result, ranks


class _Beginning(NamedTuple):
    """A solution of the last layer: its input, k at its output, what the observed update is a multiple of the gradient by, its label."""

    features: Tensor
    error: Tensor
    scale: float
    label: int


def _layer(step: Step) -> Layer | str:
    """A module as a layer of the chain, or why it cannot be one."""
    module = step.module
    has_bias = module.bias is not None
    if isinstance(module, nn.Linear):
        if step.input.ndim != 2:
            return f"{step.name!r} acts on several positions: no convolution"
        return Layer(step.name, (module.in_features, 1, 1), (1, 1), (0, 0), (1, 1), (), has_bias)
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"{step.name!r} is a convolution with groups, or without plain zero padding"
    return Layer(step.name, tuple(step.input.shape[1:]), module.stride, module.padding, module.dilation, (), has_bias)


def _passes(step: Step) -> bool:
    """Whether a module returns what it is given, reshaped at most."""
    return step.input.numel() == step.output.numel() and torch.equal(step.input.flatten(), step.output.flatten())


def _by_itself(step: Step) -> bool:
    """Whether the module's own forward, without hooks such as a SplitModel's, gives what was recorded."""
    with torch.no_grad():
        return torch.equal(step.module.forward(step.input), step.output)


def _tensors(chain: Chain) -> list[str]:
    return [f"{layer.name}.{part}" for layer in chain.layers for part in (("weight", "bias") if layer.has_bias else ("weight",))]


def _probabilities(logits: Tensor) -> Tensor:
    """Of the loss: softmax over several outputs, the logistic function of one."""
    return logits.softmax(-1) if logits.shape[-1] > 1 else logits.sigmoid()


def _target(label: int, outputs: int) -> Tensor:
    return torch.eye(outputs, dtype=torch.float64)[label] if outputs > 1 else torch.tensor([float(label)], dtype=torch.float64)


def _beginnings(layer: Layer, weights: Tensors, update: Tensors, seen: Observation, granted: int | None, eps: float) -> list[_Beginning] | str:
    """The last layer's solutions, or why there is none."""
    weight, gradient = weights[f"{layer.name}.weight"], update[f"{layer.name}.weight"]
    outputs = len(weight)
    if f"{layer.name}.bias" not in update:
        return _unbiased_beginnings(weight, gradient, seen, granted, eps, weights.get(f"{layer.name}.bias"))
    error = update[f"{layer.name}.bias"]
    if not error.any():
        return f"the update of {layer.name + '.bias'!r} is zero: no row of the weight can be divided by it"
    features = gradient.T @ error / error.square().sum()
    uphill = error if seen.kind == "gradient" else -error
    label = granted if granted is not None else int(uphill.argmin()) if outputs > 1 else int(uphill[0] < 0)
    if seen.kind == "gradient" and seen.scaled:
        return [_Beginning(features, error, 1.0, label)]
    predicted = _probabilities(weight @ features + weights[f"{layer.name}.bias"]) - _target(label, outputs)
    return [_Beginning(features, predicted, float(error @ predicted / predicted.square().sum()), label)]


def _unbiased_beginnings(
    weight: Tensor, gradient: Tensor, seen: Observation, granted: int | None, eps: float, bias: Tensor | None
) -> list[_Beginning] | str:
    """x = s v and k = a / s with ∂L/∂W = a vᵀ: all s for which p(s W v + b) − y = a / s, a root in one number; of a multiple of ∂L/∂W all for which both
    sides have one direction, which more than two outputs tell."""
    if not seen.scaled and len(weight) <= 2:
        return f"an update of unknown scale, and no bias in the last layer, whose {len(weight)} output(s) do not tell it"
    if seen.kind != "gradient":
        return "a delta of unknown scale, and no bias in the last layer that would tell it"
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    direction, amounts = right[0], values[0] * left[:, 0]
    outputs, slope = len(weight), weight @ direction
    offset = torch.zeros(outputs, dtype=torch.float64) if bias is None else bias
    reach = 10 ** torch.linspace(-6, 6, 6001, dtype=torch.float64)
    labels = [granted] if granted is not None else [int(gradient.norm(dim=1).argmax())] if outputs > 2 else [0, 1]
    found = []
    for label in labels:
        target, row = _target(label, outputs), label if outputs > 1 else 0

        def gap(s: Tensor, target: Tensor = target) -> Tensor:
            """(points, K): zero where s solves all rows."""
            return s[:, None] * (_probabilities(s[:, None] * slope + offset) - target) - amounts

        if not seen.scaled:
            found += _parallel(gap, amounts, reach, label)
            continue
        for sign in (-1.0, 1.0):
            grid = sign * reach
            values_at = gap(grid)[:, row]
            changes = (values_at[:-1].sign() != values_at[1:].sign()).nonzero().flatten()
            low, high = grid[changes], grid[changes + 1]
            for _ in range(80):
                middle = (low + high) / 2
                same = gap(middle)[:, row].sign() == gap(low)[:, row].sign()
                low, high = torch.where(same, middle, low), torch.where(same, high, middle)
            roots = (low + high) / 2
            fits = gap(roots).norm(dim=1) / amounts.norm()
            found += [(float(fit), float(root), 1.0, label) for fit, root in zip(fits, roots, strict=True)]
    found = [one for one in found if one[0] < 1e4 * eps + 1e-9]
    if not found:
        return "no input of the last layer explains its gradient: another loss than cross-entropy, or a noisy update"
    return [_Beginning(root * direction, amounts / (root * scale), scale, label) for _, root, scale, label in sorted(found)[:4]]


def _parallel(gap: Callable[[Tensor], Tensor], amounts: Tensor, reach: Tensor, label: int) -> list[tuple[float, float, float, int]]:
    """(sine of the angle between s k and a, s, ‖a‖ / ‖s k‖, label) at the minima of the first over s; gap(s) = s k − a."""

    def apart(s: Tensor) -> tuple[Tensor, Tensor]:
        ours, theirs = gap(s) + amounts, amounts / amounts.norm()
        length, along = ours.norm(dim=1), ours @ theirs
        sine = (ours - along[:, None] * theirs).norm(dim=1) / length
        return torch.where(along > 0, sine, 2 - sine), length

    found = []
    for sign in (-1.0, 1.0):
        values = apart(sign * reach)[0]
        lowest = (values[1:-1] <= values[:-2]) & (values[1:-1] < values[2:])
        low, high = reach[:-2][lowest], reach[2:][lowest]
        for _ in range(120):
            first, second = low + (high - low) / 3, high - (high - low) / 3
            left = apart(sign * first)[0] < apart(sign * second)[0]
            low, high = torch.where(left, low, first), torch.where(left, second, high)
        roots = sign * (low + high) / 2
        found += [(float(sine), float(root), float(amounts.norm() / length), label) for root, sine, length in zip(roots, *apart(roots), strict=True)]
    return found


def _descend(chain: Chain, weights: Tensors, update: Tensors, beginning: _Beginning) -> tuple[Tensor, list[Rank]]:
    """From the last layer's input and k to the first layer's input (n,); ranks from the first layer on."""
    out = beginning.features
    back = weights[f"{chain.layers[-1].name}.weight"].T @ beginning.error
    ranks: list[Rank] = []
    for place in range(len(chain.layers) - 2, -1, -1):
        layer = chain.layers[place]
        weight = _kernel(layer, weights[f"{layer.name}.weight"])
        on = torch.ones_like(out, dtype=torch.bool)
        for activation in reversed(layer.activations):
            if isinstance(activation, nn.ReLU):
                on &= out > 1e-6 * out.abs().max()
            given = INVERSES[type(activation)](activation, out)
            back = back * _slope(activation, given) if not isinstance(activation, nn.ReLU) else torch.where(on, back, 0.0)
            out = given
        sides = _output_sides(layer, weight)
        if layer.has_bias:
            out = out - weights[f"{layer.name}.bias"].repeat_interleave(sides[0] * sides[1])
        start = torch.zeros(math.prod(layer.shape), dtype=torch.float64)
        if place == 0:
            start = chain.mapped.shift.double() + 0.5 * chain.mapped.scale.double()
        gradient = update.get(f"{layer.name}.weight")
        if not out.isfinite().all() or not back.isfinite().all():
            return torch.full((math.prod(chain.layers[0].shape),), torch.nan, dtype=torch.float64), ranks
        maps = [tensor.view(1, len(weight), *sides) for tensor in (out, back, on)]
        out, rank = _solve(layer, weight, *maps, None if gradient is None else _kernel(layer, gradient), start)
        ranks.insert(0, rank)
        back = F.conv_transpose2d(maps[1], weight, **_geometry(layer), output_padding=_output_padding(layer, weight)).flatten()
    return out if len(chain.layers) > 1 else beginning.features, ranks


def _solve(layer: Layer, weight: Tensor, values: Tensor, errors: Tensor, on: Tensor, gradient: Tensor | None, start: Tensor) -> tuple[Tensor, Rank]:
    """Least squares for a layer's input (n,), nearest to `start` where it is open.

        W x = values where `on`,   ρ K x = ρ gradient,   ρ = size of the weights' rows over that of the errors'

    The normal matrix is built and factorised as a preconditioner only; conjugate gradients on the equations themselves
    (CGLS) remove the error that squaring the condition number brings in.
    """
    unknowns, (channels, height, width) = start.numel(), layer.shape
    geometry, padding, size = _geometry(layer), _output_padding(layer, weight), tuple(weight.shape[2:])
    power = errors.square().sum()
    balance = float((weight.square().sum() / power).sqrt()) if gradient is not None and power > 0 else 0.0
    mask = on.to(weight)

    def forth(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.view(1, *layer.shape)
        # the gradient of a kernel is a correlation of inputs with errors: channels as batch, dilation and stride in each other's place
        shape = {"stride": layer.dilation, "padding": layer.padding, "dilation": layer.stride}
        sums = F.conv2d(x.transpose(0, 1), errors.transpose(0, 1), **shape)[:, :, : size[0], : size[1]].transpose(0, 1)
        return mask * F.conv2d(x, weight, **geometry), balance * sums

    def back(parts: tuple[Tensor, Tensor]) -> Tensor:
        first = F.conv_transpose2d(mask * parts[0], weight, **geometry, output_padding=padding)
        return (first + balance * F.conv_transpose2d(errors, parts[1], **geometry, output_padding=padding)).flatten()

    identity = torch.eye(unknowns, dtype=torch.float64)
    rows = (mask * F.conv2d(identity.view(-1, *layer.shape), weight, **geometry)).flatten(1)
    normal = rows @ rows.T
    if balance:  # the same for every channel: one row per filter and place in the kernel
        ones = torch.eye(size[0] * size[1], dtype=torch.float64).view(1, -1, *size)
        shifted = F.conv_transpose2d(errors.transpose(0, 1), ones, **geometry, output_padding=padding).flatten(0, 1).flatten(1)
        normal.view(channels, height * width, channels, height * width).diagonal(dim1=0, dim2=2).add_((balance**2 * shifted.T @ shifted)[:, :, None])
    largest = float(normal.diagonal().max())
    factor, flaw = torch.linalg.cholesky_ex(normal)
    rank = unknowns
    if int(flaw) or not float(factor.diagonal().min()) ** 2 > 1e-9 * largest:  # nearly singular: only now are singular values worth their price
        least = unknowns * 2.2e-16 * max(largest, 1e-300)
        rank = int((torch.linalg.eigvalsh(normal) > least).sum())
        factor = torch.linalg.cholesky(normal + 4 * least * identity)

    def precondition(x: Tensor) -> Tensor:
        return torch.cholesky_solve(x[:, None], factor)[:, 0]

    goal = (mask * values, balance * gradient if balance else torch.zeros_like(weight))
    x = start
    residual = tuple(wanted - got for wanted, got in zip(goal, forth(x), strict=True))
    slope = back(residual)
    direction = precondition(slope)
    progress = first = slope @ direction
    for _ in range(40):
        if not progress > 1e-28 * first:
            break
        move = forth(direction)
        length = progress / sum(part.square().sum() for part in move)
        x = x + length * direction
        residual = tuple(old - length * part for old, part in zip(residual, move, strict=True))
        slope = back(residual)
        solved = precondition(slope)
        before, progress = progress, slope @ solved
        direction = solved + progress / before * direction
    equations = int(on.sum()), weight.numel() if balance else 0
    return x, Rank(layer.name, unknowns, rank, *equations)


def _misfit(chain: Chain, weights: Tensors, update: Tensors, image: Tensor, label: int) -> float:
    """‖g(image) − g‖ / ‖g‖ over the released tensors of the chain."""
    names = list(update)
    used = {name: weights[name].clone().requires_grad_(name in update) for name in _tensors(chain)}
    x = (chain.mapped.shift + chain.mapped.scale * image.flatten()).detach()
    with torch.enable_grad():
        for layer in chain.layers:
            x = F.conv2d(x.view(1, *layer.shape), _kernel(layer, used[f"{layer.name}.weight"]), used.get(f"{layer.name}.bias"), **_geometry(layer))
            for activation in layer.activations:
                x = activation(x)
        logits = x.flatten()[None]
        target = _target(label, logits.shape[1])[None]
        loss = F.cross_entropy(logits, target) if logits.shape[1] > 1 else F.binary_cross_entropy_with_logits(logits, target)
        gradients = torch.autograd.grad(loss, [used[name] for name in names])
    apart = sum((got - update[name]).square().sum() for name, got in zip(names, gradients, strict=True))
    return float((apart / sum(update[name].square().sum() for name in names)).sqrt())


def _deficiency(ranks: Sequence[Rank]) -> str:
    """What is open, for people; "" if nothing is."""
    short = [f"{one.name} {one.rank} of {one.unknowns}" for one in ranks if one.rank < one.unknowns]
    return f"rank-deficient, index {rank_index(ranks):.0f}: {', '.join(short)}" if short else ""


def _slope(activation: nn.Module, given: Tensor) -> Tensor:
    with torch.enable_grad():
        given = given.detach().requires_grad_()
        return torch.autograd.grad(activation(given).sum(), given)[0]


def _kernel(layer: Layer, weight: Tensor) -> Tensor:
    return weight if weight.ndim == 4 else weight[:, :, None, None]


def _geometry(layer: Layer) -> dict[str, tuple[int, int]]:
    return {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}


def _output_sides(layer: Layer, weight: Tensor) -> tuple[int, ...]:
    sides = zip(layer.shape[1:], weight.shape[2:], layer.stride, layer.padding, layer.dilation, strict=True)
    return tuple((side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for side, kernel, stride, padding, dilation in sides)


def _output_padding(layer: Layer, weight: Tensor) -> tuple[int, ...]:
    """Pixels that the last stride did not reach, which the transposed convolution must give back."""
    parts = zip(layer.shape[1:], _output_sides(layer, weight), weight.shape[2:], layer.stride, layer.padding, layer.dilation, strict=True)
    return tuple(side - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1) for side, out, kernel, stride, padding, dilation in parts)
