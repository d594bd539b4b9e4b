"""A4: a vision transformer's first layer. The position embedding's gradient makes its patch projection a system that can be solved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gidef.attack.analytic.outcome import check_fit, failed, labels_of, recovered, trouble
from gidef.attack.analytic.probe import ImageMap, attack_copy, first_layers, probes
from gidef.errors import InputError
from gidef.types import Observation, Reconstruction, Tensors

# N patches, D width of the tokens, P = C·p·p entries of a patch, r: rank of the position embedding's gradient


class PatchLayer(NamedTuple):
    """A patch projection and the position embedding that is added to its tokens: names, and what was done to the image before it.

    weight: (D, C, p, q).  position: (1, k + N, D), the patches last.  patch: (p, q).
    """

    weight: str
    position: str
    patch: tuple[int, int]
    mapped: ImageMap


class Patches(NamedTuple):
    """inputs: float64 (N, P).  rank: directions of N that were solved for.  residual: ‖Gᵀ X − ∂L/∂W‖ / ‖∂L/∂W‖."""

    inputs: Tensor
    rank: int
    residual: float


def patch_inputs(
    weight_gradient: Tensor, position_gradient: Tensor, *, start: Tensor | None = None, plausible: Callable[[Tensor], bool] | None = None
) -> Patches:
    """The inputs of a patch projection z_t = W x_t + b + pos_t, t = 1 … N, from two gradients of one example.

        ∂L/∂pos_t = ∂L/∂z_t = g_t   and   ∂L/∂W = Σ_t g_t x_tᵀ = Gᵀ X   ⇒   X = X₀ + (Gᵀ)⁺ (∂L/∂W − Gᵀ X₀)

    Whatever follows the sum z_t (norm before or after the attention, residuals, class and distillation tokens, noise on a later latent,
    a decoder's loss) changes g_t and not these two lines.

    Args:    weight_gradient: (D, P) or (D, C, p, q).  position_gradient: G (N, D), the patches' rows alone. Deltas of one SGD step
             do as well: the scale cancels.  start: X₀ (N, P), what is kept in directions that G does not tell; None for zeros.
             plausible: (N, P) → whether a solution is acceptable.
    Returns: Patches. Exact to rounding, times the condition number of G (about 1e4 in ViT-Tiny, 2e4 in ViT-Small), if G has rank N,
             for which D ≥ N is needed: ViT-Tiny at 224 pixels has N = 196 > D = 192 and leaves a few directions of 196 open.
             The number r of singular directions used is the least one that minimises the generalised cross-validation
             ‖Gᵀ X_r − ∂L/∂W‖² / (D − r)² over plausible solutions: all of them in an exact update, few in a noisy one.
             Several examples share one G, the sum of theirs, and X becomes a blend.
    Raises:  InputError if the shapes do not fit.
    Source:  Golub, Heath, Wahba 1979 for the cross-validation.
    """
    rows, tokens = weight_gradient.detach().flatten(1).double().cpu(), position_gradient.detach().double().cpu()
    if tokens.ndim != 2 or tokens.shape[1] != len(rows):
        raise InputError(
            f"gradients {tuple(weight_gradient.shape)} of the projection and {tuple(position_gradient.shape)} of the patches' positions: "
            "expected (D, …) and (N, D)."
        )
    inputs = rows.new_zeros(len(tokens), rows.shape[1]) if start is None else start.double().cpu()
    left, values, right = torch.linalg.svd(tokens, full_matrices=False)
    missing = rows - tokens.T @ inputs
    size, smallest = rows.norm().clamp(min=1e-300), 30 * torch.finfo(weight_gradient.dtype).eps * values[0]
    best, least = Patches(inputs, 0, float(missing.norm() / size)), torch.inf
    for direction in range(min(int((values > smallest).sum()), len(rows) - 1)):
        part = right[direction] @ missing
        inputs = inputs + torch.outer(left[:, direction] / values[direction], part)
        missing = missing - torch.outer(right[direction], part)
        score = float(missing.square().sum()) / (len(rows) - direction - 1) ** 2
        if score < least and (plausible is None or plausible(inputs)):
            best, least = Patches(inputs, direction + 1, float(missing.norm() / size)), score
    return best


def april_tokens(params: Tensors, update: Tensors, *, weights: Sequence[str], position: str) -> Tensor:
    """APRIL's own form: the tokens z_t that linear layers alone read, as the query, key and value of an attention without a norm
    before it and without a residual around it.

        Σ_w W_wᵀ ∂L/∂W_w = Σ_t (∂L/∂z_t) z_tᵀ = Gᵀ Z   ⇒   Z = (Gᵀ)⁺ Σ_w W_wᵀ ∂L/∂W_w

    timm's blocks normalise first and add a residual, so there this does not hold; `patch_inputs` does.

    Args:    weights: names of (·, D), one fused or three.  position: name of (1, N, D), added to every token.
    Returns: float64 (N, D), unique if G has rank N. `pixels_of_tokens` undoes the projection.
    Source:  Lu et al. 2022 (CVPR), arXiv:2112.14087, section 3.1.
    """
    product = sum(params[name].detach().double().cpu().T @ update[name].detach().double().cpu() for name in weights)
    return patch_inputs(product.to(update[position].dtype), update[position].flatten(0, -2)).inputs


def pixels_of_tokens(tokens: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor) -> Tensor:
    """Patches (N, P) with W x_t + b + pos_t = z_t, by W's pseudo-inverse: exact if D ≥ P and W has rank P, else the shortest x_t.

    Args:    tokens, position: (N, D), the patches' rows.  weight: (D, …).  bias: (D,) or None.
    """
    offset = position.double() if bias is None else position.double() + bias.double()
    return torch.linalg.lstsq(weight.detach().flatten(1).double(), (tokens.double() - offset).T, driver="gelsd").solution.T


def find_patch_layer(model: nn.Module, names: Sequence[str], image_shape: Sequence[int]) -> PatchLayer | str:
    """The model's patch projection and position embedding, if both are among `names`; otherwise why not.

    Names decide nothing: the attacker runs its copy on an image of its own and keeps the pair of tensors for which
    ∂L/∂W = Gᵀ X holds. A norm between projection and position, positions that are interpolated, or a stem of overlapping
    convolutions do not pass.
    """
    net = attack_copy(model)
    for name, conv, mapped in first_layers(net, image_shape, (nn.Conv2d,)):
        weight = f"{name}.weight" if name else "weight"
        patch = tuple(conv.kernel_size)
        if (
            tuple(conv.stride) != patch
            or conv.padding not in ((0, 0), "valid")
            or conv.groups != 1
            or any(s % p for s, p in zip(image_shape[1:], patch, strict=True))
        ):
            continue
        patches = image_shape[1] * image_shape[2] // (patch[0] * patch[1])
        candidates = [
            position
            for position, tensor in net.named_parameters()
            if tensor.ndim == 3 and tensor.shape[0] == 1 and tensor.shape[2] == conv.out_channels and tensor.shape[1] >= patches
        ]
        if not candidates:
            return "a patch projection without a learned position embedding"
        for position in candidates:
            found = PatchLayer(weight, position, patch, mapped)
            if _holds(net, found, image_shape, patches):
                missing = [tensor for tensor in (weight, position) if tensor not in names]
                return f"{missing[0]!r} is not released" if missing else found
        return f"the gradient of the position embedding {candidates[0]!r} is not that of the patch tokens"
    return "no patch projection sees the image itself"


def invert_patches(
    observation: Observation, model: nn.Module, *, image_shape: Sequence[int], num_classes: int, layer: PatchLayer | None = None
) -> Reconstruction:
    """Images from the gradients of a ViT's patch projection and position embedding, see `patch_inputs`.

    Directions that G does not tell stay mid-grey. Solutions that leave the box [0, 1] by more than 0.1 (root mean square) are not
    plausible, which in a batch leaves the few strong directions.

    Args:    model: the attacker's copy of the architecture, a normalisation of the image included.  layer: as `find_patch_layer` finds
             it; None looks for it.
    Returns: loss: the relative residual of `patch_inputs`; for one example 0 to rounding. A batch gives one blend, B times: its
             residual tells, if D > N. Failed if there is no such layer, or its update is zero or not finite.
    Raises:  InputError if the observation is not one of this model.
    Source:  Lu et al. 2022 (CVPR), arXiv:2112.14087: the position embedding's gradient as ∂L/∂z.
    Deviates: the paper solves for the input of the first attention and needs an encoder without a norm and a residual before it, and
             then a pseudo-inverse of W; the projection's own gradient needs neither.
    """
    check_fit(observation, model, image_shape)
    labels = labels_of(observation, num_classes)
    found = find_patch_layer(model, list(observation.update), image_shape) if layer is None else layer
    if isinstance(found, str):
        return failed(observation, image_shape, labels, found)
    for name in (found.weight, found.position):
        if reason := trouble(observation, (name,)):
            return failed(observation, image_shape, labels, f"{reason} ({name!r})")
    grid = image_shape[1] // found.patch[0], image_shape[2] // found.patch[1]
    tokens = observation.update[found.position].flatten(0, -2)[-grid[0] * grid[1] :]
    if not tokens.any():
        return failed(observation, image_shape, labels, f"the update of the patches' rows of {found.position!r} is zero: it holds nothing to invert")
    mapped = found.mapped

    def image_of(inputs: Tensor) -> Tensor:
        return mapped.image(F.fold(inputs.T[None], tuple(image_shape[1:]), found.patch, stride=found.patch), image_shape)

    def in_the_box(inputs: Tensor) -> bool:
        image = image_of(inputs)
        return bool((image - image.clamp(0, 1)).square().mean() < 0.01)

    grey = _unfolded((mapped.shift + 0.5 * mapped.scale).view(1, *image_shape), found)
    solved = patch_inputs(observation.update[found.weight], tokens, start=grey, plausible=in_the_box)
    return recovered(observation, image_of(solved.inputs).expand(observation.num_examples, -1, -1, -1), labels, solved.residual)


def _unfolded(image: Tensor, layer: PatchLayer) -> Tensor:
    """(1, C, H, W) → (N, P)."""
    return F.unfold(image, layer.patch, stride=layer.patch)[0].T


def _holds(net: nn.Module, layer: PatchLayer, image_shape: Sequence[int], patches: int) -> bool:
    """Whether ∂L/∂W = Gᵀ X on an image of the attacker's own."""
    weights = dict(net.named_parameters())
    image = probes(image_shape, weights[layer.weight].dtype)[2:]
    wanted = [weights[layer.weight].requires_grad_(), weights[layer.position].requires_grad_()]
    with torch.enable_grad():
        logits = net(image)
        gradients = torch.autograd.grad(F.cross_entropy(logits, torch.zeros(1, dtype=torch.int64)), wanted, allow_unused=True)
    if any(gradient is None for gradient in gradients):
        return False
    given = (layer.mapped.shift + layer.mapped.scale * image.double().flatten()).view_as(image)
    rows, tokens = gradients[0].flatten(1).double(), gradients[1].flatten(0, -2)[-patches:].double()
    return bool((tokens.T @ _unfolded(given, layer) - rows).norm() < 1e-3 * rows.norm())
