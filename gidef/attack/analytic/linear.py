"""A4: what a biased linear layer's update says of the layer's inputs; the images themselves where the layer comes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gidef.attack.analytic.outcome import check_fit, failed, labels_of, recovered, trouble
from gidef.attack.analytic.probe import ImageMap, attack_copy, first_layers
from gidef.errors import InputError
from gidef.rng import generator
from gidef.types import Observation, Reconstruction, Tensors

# B images, m neurons (rows of the weight), F features (its columns), r: rank of the update
MOST_MIXED = 10
"""Largest rank that `separate_inputs` takes apart: r − 1 random rows all miss one image with probability 2^(1 − r) each."""


class FirstLinear(NamedTuple):
    """A biased linear layer on the image: names of its tensors, and what was done to the image before it."""

    weight: str
    bias: str
    mapped: ImageMap


def linear_inputs(update: Tensors, weight: str, bias: str) -> Tensor:
    """The input x of a biased linear layer y = W x + b, from its update on one example; also the features before a classifier.

        ∂L/∂W = δ xᵀ,  ∂L/∂b = δ   ⇒   x = ∂L/∂Wᵀ ∂L/∂b / ‖∂L/∂b‖²

    the least-squares x over all rows, in which well-conditioned rows (large |∂L/∂bᵢ|) count most.

    Args:    update: a gradient, or a delta of one SGD step: the scale cancels.  weight, bias: names of (m, F) and (m,) in it.
    Returns: float64 (F,) on the CPU. Exact for one example. For several, and for a layer that sees several positions of one
             example, a mean of their inputs with weights Σᵢ δᵢ · ∂L/∂bᵢ, which add up to 1 but may be negative.
    Raises:  InputError if a name is missing, shapes do not belong to a linear layer, or ∂L/∂b is zero or not finite.
    Source:  Phong et al. 2018 (IEEE TIFS 13(5)); Geiping et al. 2020, arXiv:2003.14053, proposition 3.1.
    """
    gradient, error = _rows(update, weight, bias)
    power = error.square().sum()
    if not power > 0 or not gradient.isfinite().all() or not power.isfinite():
        raise InputError(f"the input of {weight!r} cannot be read: the update of {bias!r} is zero, or one of the two is not finite.")
    return gradient.T @ error / power


def input_candidates(update: Tensors, weight: str, bias: str) -> tuple[Tensor, Tensor]:
    """Each neuron's own ratio ∂L/∂Wᵢ / ∂L/∂bᵢ: the input itself if the neuron passed gradient for one example of the batch only.

    Args:    as `linear_inputs`.
    Returns: candidates float64 (n, F), distinct, and repeats int64 (n,): how many neurons agree on each. Neurons with the same
             ratio either see one example alone or are copies of one another, so candidates come by repeats, then by |∂L/∂bᵢ|.
             A candidate without repeats may be a blend. n may be 0.
    Source:  Boenisch et al. 2023, arXiv:2112.02918 ("When the curious abandon honesty"), for honest weights: their passive baseline.
    """
    gradient, error = _rows(update, weight, bias)
    eps = torch.finfo(update[weight].dtype).eps
    live = error.abs() > 100 * eps * error.abs().max()
    ratios, size = gradient[live] / error[live, None], error[live].abs()
    ratios, size = ratios[finite := ratios.isfinite().all(1)], size[finite]
    order = size.argsort(descending=True)
    ratios = ratios[order]
    if not len(ratios):
        return ratios, torch.zeros(0, dtype=torch.int64)
    # differences decide, so all is measured from the strongest neuron's ratio; rounding grows with the share of it that |∂L/∂bᵢ| is
    apart = torch.cdist(ratios, ratios)
    scale = ratios.norm(dim=1).clamp(min=1e-300)
    rounding = 30 * eps * error.abs().max() / size[order]
    same = apart <= (rounding[:, None] + rounding[None, :] + 1e-6) * scale[None, :]
    taken = torch.zeros(len(ratios), dtype=torch.bool)
    leaders, repeats = [], []
    for one in range(len(ratios)):
        if taken[one]:
            continue
        group = same[one] & ~taken
        group[one] = True
        taken |= group
        leaders.append(one)
        repeats.append(int(group.sum()))
    counts = torch.tensor(repeats)
    by_count = counts.argsort(descending=True, stable=True)
    return ratios[torch.tensor(leaders)[by_count]], counts[by_count]


def separate_inputs(update: Tensors, weight: str, bias: str, count: int, *, params: Tensors, tries: int = 150) -> Tensor | None:
    """The inputs of all examples of a batch, where the layer is followed by ReLU; exact up to rounding.

        [∂L/∂W | ∂L/∂b] = Δ [X | 1] = L R (truncated SVD, rank r),   Δ = L Q,   [X | 1] ∝ Q⁻¹ R

    A column of Δ is zero wherever ReLU was off for its example, which is about half of all neurons. So a column q of Q is
    orthogonal to many rows of L: it is the null vector of r − 1 rows drawn at random with luck, and then far more rows vanish than
    those drawn. The ones in the last column of [X | 1] fix the scale. A result is returned only if each column of Δ is zero where
    the layer, run on that row of X, is off.

    Args:    update, weight, bias: as `linear_inputs`.  count: B, an upper bound on r.  params: the layer's own weight and bias, by the
             same names.  tries: draws of 2,048 subsets.
    Returns: float64 (r, F), in no order; r < B if examples repeat or passed no gradient. None if the examples could not be told
             apart: no ReLU, r > MOST_MIXED, too few neurons, a noisy update, or errors behind ReLU that depend on one another, as those of
             more images than classes do where most neurons are on for all images.
    Source:  Dimitrov et al. 2024, arXiv:2403.03945 (SPEAR), whose rank, sparsity and consistency this uses.
    Deviates: the scale comes from the bias column in the same product; null vectors are refined on all rows found to vanish.
    """
    gradient, error = _rows(update, weight, bias)
    rows = torch.cat([gradient, error[:, None]], 1)
    if not rows.isfinite().all() or not rows.any():
        return None
    eps = torch.finfo(update[weight].dtype).eps
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    rank = min(count, int((values > 100 * eps * values[0]).sum()))
    if rank > MOST_MIXED or rank >= len(rows):
        return None
    left, right = left[:, :rank], values[:rank, None] * right[:rank]
    layer = _rows(params, weight, bias)
    if rank == 1:
        return right[:, :-1] / right[:, -1:]

    def inputs_of(mixing: Tensor) -> Tensor | None:
        found = torch.linalg.solve(mixing, right)
        inputs, delta = found[:, :-1] / found[:, -1:], (left @ mixing).abs()
        off = (inputs @ layer[0].T + layer[1]).T < 0
        silent = delta < 1e-2 * delta.amax(0)
        return inputs if inputs.isfinite().all() and float(silent[off].double().mean()) > 0.99 else None

    return _unmixed(left, inputs_of, zero=0.1 * eps**0.5, tries=tries)


def layer_inputs(observation: Observation, weight: str, bias: str) -> Tensor:
    """The inputs of any biased linear layer, such as the classifier's features, for the whole batch.

    Returns: float64 (B, F) on the CPU. One example: exact. Several: exact where `separate_inputs` can, in no order, with
             examples that repeat given once and the last row repeated; otherwise B times their weighted mean.
    Raises:  as `linear_inputs`.
    """
    mean, size = linear_inputs(observation.update, weight, bias), observation.num_examples
    if size == 1:
        return mean[None]
    inputs = separate_inputs(observation.update, weight, bias, size, params=observation.params)
    if inputs is None:
        return mean.expand(size, -1).clone()
    return torch.cat([inputs, inputs[-1:].expand(size - len(inputs), -1)])


def find_first_linear(model: nn.Module, names: Sequence[str], image_shape: Sequence[int]) -> FirstLinear | str:
    """The model's biased linear layer on the (normalised) image, if its tensors are among `names`; otherwise why not."""
    layers = first_layers(attack_copy(model), image_shape, (nn.Linear,))
    if not layers:
        return "no linear layer sees the image itself"
    for name, module, mapped in layers:
        weight, bias = (f"{name}.{part}" if name else part for part in ("weight", "bias"))
        if module.bias is not None and weight in names and bias in names:
            return FirstLinear(weight, bias, mapped)
    return f"the first linear layer, {layers[0][0]!r}, has no bias, or its weight and bias are not both released"


def invert_linear(
    observation: Observation, model: nn.Module, *, image_shape: Sequence[int], num_classes: int, layer: FirstLinear | None = None
) -> Reconstruction:
    """Images from the update of a biased linear layer that sees them.

    One image: `linear_inputs`, exact. Several: `separate_inputs`, exact; or else the most trustworthy of `input_candidates`: those
    that several neurons agree on, then those inside the box [0, 1] that lie farthest from all chosen ones, since blends lie between.

    Args:    model: the attacker's copy of the architecture, a normalisation of the image included.  layer: as `find_first_linear`
             finds it; None looks for it.
    Returns: loss in [0, 1]: what no combination of the reconstructed images explains of the layer's update, ‖residual‖ / ‖update‖,
             or, if larger, the share of images that rest on one neuron alone and may be blends. 0 to rounding where all are exact.
             Where fewer images are found than there are, the first is repeated. Labels are granted or recovered, and in no relation to
             the images' order. Failed if there is no such layer, or its update is zero or not finite.
    Raises:  InputError if the observation is not one of this model.
    """
    check_fit(observation, model, image_shape)
    labels = labels_of(observation, num_classes)
    found = find_first_linear(model, list(observation.update), image_shape) if layer is None else layer
    if isinstance(found, str):
        return failed(observation, image_shape, labels, found)
    update, size = observation.update, observation.num_examples
    if reason := trouble(observation, (found.weight, found.bias)):
        return failed(observation, image_shape, labels, reason)
    if not update[found.bias].any():
        return failed(observation, image_shape, labels, f"the update of {found.bias!r} is zero: no row of the weight can be divided by it")
    doubtful = 0.0
    if size == 1:
        inputs = linear_inputs(update, found.weight, found.bias)[None]
    else:
        inputs = separate_inputs(update, found.weight, found.bias, size, params=observation.params)
        if inputs is None:
            inputs, agreed = _chosen(*input_candidates(update, found.weight, found.bias), found.mapped, size)
            doubtful = 1 - agreed / size
    gradient, error = _rows(update, found.weight, found.bias)
    loss = max(doubtful, _unexplained(torch.cat([gradient, error[:, None]], 1), inputs))
    inputs = torch.cat([inputs, inputs[:1].expand(size - len(inputs), -1)])
    return recovered(observation, found.mapped.image(inputs, image_shape), labels, loss)


def _rows(update: Tensors, weight: str, bias: str) -> tuple[Tensor, Tensor]:
    """The layer's two tensors in float64 on the CPU, checked."""
    for name in (weight, bias):
        if name not in update:
            raise InputError(f"{name!r} is not released: the update holds {sorted(update)[:8]}. Name a layer's weight and bias that it holds.")
    gradient, error = (update[name].detach().double().cpu() for name in (weight, bias))
    if gradient.ndim != 2 or error.shape != gradient.shape[:1]:
        raise InputError(f"{weight!r} {tuple(gradient.shape)} and {bias!r} {tuple(error.shape)} are no linear layer's: expected (m, F) and (m,).")
    return gradient, error


def _unmixed(left: Tensor, inputs_of: Callable[[Tensor], Tensor | None], *, zero: float, tries: int) -> Tensor | None:
    """What `inputs_of` accepts of (r, r) matrices whose columns are orthogonal to as many rows of `left` (m, r) as possible."""
    rank = left.shape[1]
    lengths = left.norm(dim=1)
    live = left[lengths > 0.01 * lengths.max()]
    rows = live / live.norm(dim=1, keepdim=True)
    enough = rank + max(3, len(rows) // 20)
    if len(rows) <= enough:
        return None
    draw = generator(0, "separate")
    pool: list[tuple[int, Tensor]] = []
    refused = 0
    for _ in range(tries):
        picked = rows[torch.randint(len(rows), (2048, rank - 1), generator=draw)]
        # a null vector with last entry −1; LU is many times faster than SVD, and the singular systems give vectors that fit no other row
        normals = torch.linalg.solve_ex(picked[:, :, :-1], picked[:, :, -1]).result
        normals = F.normalize(torch.cat([normals, -torch.ones_like(normals[:, :1])], 1))
        counts = ((rows @ normals.T).abs() < zero).sum(0)
        order = counts.argsort(descending=True)
        left_over = normals[order[counts[order] >= enough]]
        for _, known in pool:
            left_over = left_over[(left_over @ known).abs() < 1 - 1e-6]
        added = False
        for _ in range(100):
            if not len(left_over):
                break
            normal = left_over[0]
            left_over = left_over[(left_over @ normal).abs() < 1 - 1e-6]
            # Rows that miss two examples leave a plane of vectors that look sparse, and one more row, of length 1, picks one of them:
            # only a vector that several rows fix in every direction is a column.
            vanishing = rows[(rows @ normal).abs() < zero]
            _, values, basis = torch.linalg.svd(vanishing, full_matrices=False)
            if values[-2] > 1.2:
                pool.append((len(vanishing), basis[-1]))
                added = True
        if added and len(pool) >= rank:
            pool.sort(key=lambda one: -one[0])
            mixing = _independent([normal for _, normal in pool], rank)
            if mixing is not None:
                if (inputs := inputs_of(mixing)) is not None:
                    return inputs
                refused += 1
                if refused == 10:
                    return None
    return None


def _independent(vectors: Sequence[Tensor], rank: int) -> Tensor | None:
    """The first `rank` unit vectors that do not lie in the span of those before, as columns."""
    chosen: list[Tensor] = []
    for vector in vectors:
        basis = torch.linalg.qr(torch.stack(chosen, 1)).Q if chosen else vector.new_zeros(rank, 0)
        if float((vector - basis @ (basis.T @ vector)).norm()) > 1e-4:
            chosen.append(vector)
        if len(chosen) == rank:
            return torch.stack(chosen, 1)
    return None


def _chosen(candidates: Tensor, repeats: Tensor, mapped: ImageMap, size: int) -> tuple[Tensor, int]:
    """At most `size` of the candidates (n, F), see `invert_linear`, and how many of them several neurons agree on; n ≥ 1."""
    images = (candidates - mapped.shift) / mapped.scale
    inside = ((images > -0.05) & (images < 1.05)).all(1)
    agreed = (repeats > 1) & inside
    chosen = agreed.nonzero().flatten()[:size].tolist()
    pool = (inside & ~agreed).nonzero().flatten().tolist() or (~agreed).nonzero().flatten().tolist()
    if not chosen:
        chosen.append(pool.pop(0))
    while pool and len(chosen) < size:
        nearest = torch.cdist(images[pool], images[chosen]).amin(1)
        chosen.append(pool.pop(int(nearest.argmax())))
    return candidates[chosen], min(size, int(agreed.sum()))


def _unexplained(rows: Tensor, inputs: Tensor) -> float:
    """‖rows − projection of rows on the span of [inputs | 1]‖ / ‖rows‖."""
    basis = torch.linalg.qr(torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1).T).Q
    return float((rows - rows @ basis @ basis.T).norm() / rows.norm())
