"""What the gradient of a layer's weight tells of its inputs whatever lies behind: the space that they span, and a prior that holds candidates to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gidef.attack.matching import Point, Prior
from gidef.rng import generator
from gidef.types import Tensors

ROWS = "rows/"
"""Prefix in an observation's `known` of a layer's row space."""
LEAST = 3e-4
"""Least singular value that counts, of the largest one: below it, rounding turns the space."""
APART = 1e-2
"""Up to which part of the least one the next must fall: else there are more inputs, or noise."""
MOST = 8
"""Layers, the earliest that tell theirs: the later a layer, the less it says of the pixels."""
LARGE = 512
"""Rows and columns from which on a weight's gradient is sketched first: its space and rank are the sketch's, whose singular values are spread up to 6 times as wide."""
SHARE = 0.7
"""Of an input's entries that the space may span: beyond it, it says little."""


def _inputs(layer: nn.Linear | nn.Conv2d, given: Tensor) -> Tensor:
    """(B · P, entries) from what a layer is given: of each image its vector, its P tokens, or what its kernel covers in P positions."""
    if isinstance(layer, nn.Linear):
        return given.flatten(0, -2)
    return F.unfold(given, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT.flatten(0, 1)


def _positions(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, int]:
    """P of the layers that run once in a pass, and whose inputs are rows of their weight, by name."""
    seen: dict[str, list[int]] = {}
    handles = []

    def look(name: str, module: nn.Module, given: Tensor) -> None:
        plain = isinstance(module, nn.Linear) or (module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str))
        seen.setdefault(name, []).append(len(_inputs(module, given)) if plain else 0)

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_pre_hook(lambda module, given, name=name: look(name, module, given[0])))
    try:
        with torch.no_grad():
            model(next(model.parameters()).new_zeros(1, *image_shape))
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[0] for name, found in seen.items() if len(found) == 1 and found[0]}


def row_spaces(model: nn.Module, update: Tensors, image_shape: tuple[int, int, int], size: int, num_classes: int) -> Tensors:
    """Orthonormal rows (r, entries) that span what a layer read of a batch, float32, by the name of the layer; of those whose gradient tells it.

    The gradient of a weight is Σ δ uᵀ over the r = B · P inputs u that the layer reads, whatever loss lies behind and whatever couples the images: where r is
    no more than its rows, the row space of that gradient is the span of the inputs. It takes r singular values that stand out.

    Args:    model: model(images (B, C, H, W)), in the client's mode.  update: gradient, mean of gradients, or delta of steps of SGD, whose inputs are those at the
             weights that each step met; a factor for each tensor does not matter.  size: B, images in it.  num_classes: logits' gradients sum to zero, so a layer that gives these tells an input less.
    Source:  as `unmix.latent_basis`, of which this is the part that needs no reading of the latent; ours.
    """
    found = {}
    for name, positions in _positions(model, image_shape).items():
        weight, count = update.get(f"{name}.weight"), size * positions
        if weight is None or not weight.isfinite().all():
            continue
        rows = weight.double().flatten(1)
        most = min(len(rows) - (len(rows) == num_classes), int(SHARE * rows.shape[1]))
        if count > most:
            continue
        if min(rows.shape) > LARGE and 2 * count < len(rows):
            rows = torch.randn(2 * count, len(rows), generator=generator(0, "row space", name), dtype=torch.float64).to(rows.device) @ rows
        _, singular, space = torch.linalg.svd(rows, full_matrices=False)
        last, beyond = float(singular[count - 1]), float(singular[count]) if count < len(singular) else 0.0
        if last > LEAST * float(singular[0]) and beyond <= APART * last:
            found[name] = space[:count].to(torch.float32)
        if len(found) == MOST:
            break
    return found


def within_rows(mine: Callable[[], nn.Module], names: list[str], passes: Callable[[Point], list[tuple[Tensors, Tensor]]]) -> Prior:
    """The mean over layers of ‖u − V Vᵀ u‖² / ‖u‖², u their inputs from a candidate, V the row spaces in `known`; 1 of a layer whose V is nought.

    mine: the model, of each thread's own.  passes: of a point, its tensors and images in each of the client's passes, one for every local step.
    """

    def inputs_of(weights: Tensors, images: Tensor) -> Tensors:
        module, given, handles = mine(), {}, []
        for name in names:
            handles.append(module.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: given.__setitem__(name, inputs[0])))
        try:
            functional_call(module, weights, (images,))
        finally:
            for handle in handles:
                handle.remove()
        return {name: _inputs(module.get_submodule(name), given[name]) for name in names}

    def prior(point: Point) -> Tensor:
        each = [inputs_of(weights, images) for weights, images in passes(point)]
        total = torch.zeros_like(point.images.sum())
        for name in names:
            inputs, space = torch.cat([one[name] for one in each]), point.known[f"{ROWS}{name}"]
            total = total + (inputs - (inputs @ space.T) @ space).square().sum() / inputs.square().sum().clamp_min(torch.finfo(inputs.dtype).tiny)
        return total / len(names)

    return prior
