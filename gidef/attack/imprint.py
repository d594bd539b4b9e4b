"""A11: a malicious server. An imprint block before the backbone (Robbing the Fed), and a noise level set to nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gidef.attack.analytic.outcome import failed, labels_of, recovered, trouble
from gidef.errors import InputError
from gidef.rng import generator
from gidef.types import Observation, Reconstruction, Tensors

# B images, P = C·H·W pixels, n bins
MEASURE, OFFSET, BACK = "imprint.measure.weight", "imprint.measure.bias", "imprint.back"
FAR = 12.0
"""How many standard deviations below the mean the first bin begins: no image lies below."""


class Imprinted(nn.Module):
    """A backbone behind an imprint block, as a malicious server sends it.

        a_i = ReLU(⟨m_i, x⟩ + b_i), i = 1 … n;   backbone(x + v Σ_i a_i)      (without `skip`: backbone(v Σ_i a_i))
        sparse: a_i = min(b_i − b_{i+1}, ReLU(⟨m_i, x⟩ + b_i)), the last one without a limit

    Parameters: imprint.measure.weight (n, P) and .bias (n,), the bins; imprint.back (P, n), whose columns are all v; the backbone's
    under backbone. Weights are those of a linear layer until `craft` makes others.

    Args:    backbone: images (B, *image_shape) → logits; may be a SplitModel. Its further inputs, such as noise, pass through.
             sparse: the form for clients that take several local steps: a row sees only the images of its own bin, and goes on doing so
             after a step.
    Raises:  InputError for fewer than 2 bins.
    """

    def __init__(self, backbone: nn.Module, *, image_shape: Sequence[int], bins: int = 256, skip: bool = True, sparse: bool = False) -> None:
        super().__init__()
        if bins < 2:
            raise InputError(f"bins={bins} of the imprint block: expected at least 2, and several times the batch size to tell images apart.")
        self.image_shape, self.skip, self.sparse = tuple(image_shape), skip, sparse
        pixels = math.prod(self.image_shape)
        self.imprint = nn.Module()
        self.imprint.measure = nn.Linear(pixels, bins)
        self.imprint.back = nn.Parameter(torch.zeros(pixels, bins))
        self.backbone = backbone

    def forward(self, images: Tensor, *inputs: Tensor | None) -> Tensor:
        active = F.relu(self.imprint.measure(images.flatten(1)))
        if self.sparse:
            edges = -self.imprint.measure.bias.detach()
            active = torch.minimum(active, torch.cat([edges.diff(), edges.new_full((1,), torch.inf)]))
        pattern = F.linear(active, self.imprint.back).view_as(images)
        return self.backbone(images + pattern if self.skip else pattern, *inputs)


def imprint(
    backbone: nn.Module, *, image_shape: Sequence[int], bins: int = 256, skip: bool = True, sparse: bool = False, **statistics: object
) -> Imprinted:
    """An `Imprinted` with the weights that `craft` makes from public statistics."""
    model = Imprinted(backbone, image_shape=image_shape, bins=bins, skip=skip, sparse=sparse)
    some = next((p for p in backbone.parameters()), model.imprint.back)
    model.imprint.to(some.device, some.dtype)
    with torch.no_grad():
        for name, tensor in craft(dict(model.named_parameters()), **statistics).items():
            model.get_parameter(name).copy_(tensor)
    return model


def craft(
    params: Tensors,
    *,
    public: Tensor | None = None,
    mean: float | None = None,
    std: float | None = None,
    law: Literal["normal", "laplace"] = "normal",
    measure: Tensor | None = None,
    gain: float = 1.0,
    seed: int = 0,
) -> Tensors:
    """What the malicious server sends: the model's parameters with the imprint block's set.

        h(x) = ⟨m, x⟩,   edges c_1 < … < c_n: quantiles i/n of h over the public distribution, c_1 below all images
        rows   m_i = m, b_i = −c_i        v   a pattern of ± gain / n from a seed, the same in every column

    As all columns are equal, ∂L/∂a_i is the same number for all bins that an image passes, so that the gradients of neighbouring rows
    differ by the images between their edges alone.

    Args:    params: as `Imprinted.named_parameters()`, names and shapes.
             public: images (m, C, H, W) in [0, 1] of the same kind; or mean and std of h, with its law.
             measure: m (C, H, W); None is the mean over all pixels, h = brightness.
             gain: size of the pattern, in units of h; for several local steps so small that weights hardly move.
    Returns: new map; other tensors are those of `params`, no input is modified.
    Raises:  InputError for missing tensors or statistics, or a spread of zero.
    Source:  Fowl et al. 2022 (ICLR), arXiv:2110.13057; `sparse` after their variant for FedAvg.
    Deviates: the quantiles may come from public images; the pattern's signs are random, since nets hardly react to a brighter image;
             the sparse form limits each unit at the next edge instead of scaling its row to a common limit of 1, since large weights
             drown a delta in rounding.
    """
    missing = [name for name in (MEASURE, OFFSET, BACK) if name not in params]
    if missing:
        raise InputError(f"{missing[0]!r} is missing in params: craft weights for an Imprinted model.")
    bins, pixels = params[MEASURE].shape
    row = torch.full((pixels,), 1 / pixels, dtype=torch.float64) if measure is None else measure.detach().double().cpu().flatten()
    if row.numel() != pixels or not gain > 0:
        raise InputError(f"measure of {row.numel()} entries, gain={gain}: expected {pixels} entries, and a gain above 0.")
    edges = _edges(bins, row, public, mean, std, law)
    signs = torch.randint(2, (pixels, 1), generator=generator(seed, "imprint"), dtype=torch.float64) * 2 - 1
    made = {MEASURE: row.expand(bins, pixels), OFFSET: -edges, BACK: (signs * gain / bins).expand(pixels, bins)}
    return {name: made[name].to(tensor).contiguous() if name in made else tensor.detach() for name, tensor in params.items()}


class Bins(NamedTuple):
    """Occupied bins, in the order of their edges.

    index: int64 (k,).  images: float64 (k, P), not clamped.  low, high: float64 (k,), the edges; high of the last bin is infinite.
    single: bool (k,), whether a bin holds one image, as far as the attacker can tell.  weight: float64 (k,), |Σ ∂L/∂a| of its images,
    or the norm of the row for a delta.
    """

    index: Tensor
    images: Tensor
    low: Tensor
    high: Tensor
    single: Tensor
    weight: Tensor


def read_bins(observation: Observation, *, sparse: bool = False) -> Bins:
    """What each bin of the imprint block holds.

        G_i = ∂L/∂m_i,  g_i = ∂L/∂b_i:   (G_i − G_{i+1}) / (g_i − g_{i+1}) = Σ δ(x) x / Σ δ(x) over the images x with h(x) in [c_i, c_{i+1})

    the image itself if there is one; a blend if there are several. A bin of several is noticed by ∂L/∂v, whose column j is
    Σ_x o(x) ReLU(h(x) − c_j), linear in c_j between occupied edges, with o(x) = ∂L/∂(block's output): below a bin of one
    image it decreases by o at the value o · (h − c), which are parallel. Bins with an occupied neighbour cannot be tested so and count
    as single.

    Args:    sparse: whether the block is; then rows are read one by one.
    Returns: Bins. A bin counts as empty below 1,000 units of rounding of the strongest one, and, for a delta, below 8 of the weights
             that it is the difference of.
    Raises:  InputError without the block's tensors.
    """
    for what, tensors in (("params", observation.params), ("update", observation.update)):
        if MEASURE not in tensors or OFFSET not in tensors:
            raise InputError(f"{MEASURE!r} or {OFFSET!r} is missing in the {what}: the observation is not one of an Imprinted model.")
    rows, sums = (observation.update[name].detach().double().cpu() for name in (MEASURE, OFFSET))
    weight, offset = (observation.params[name].detach().double().cpu() for name in (MEASURE, OFFSET))
    if rows.shape != weight.shape or sums.shape != offset.shape or rows.ndim != 2:
        raise InputError(
            f"{MEASURE!r} is {tuple(rows.shape)} in the update and {tuple(weight.shape)} in params: the observation is not one of this model."
        )
    edges, eps = -offset, torch.finfo(observation.update[OFFSET].dtype).eps
    high = torch.cat([edges[1:], edges.new_full((1,), torch.inf)])
    if not sparse:
        rows, sums = (tensor - torch.cat([tensor[1:], torch.zeros_like(tensor[:1])]) for tensor in (rows, sums))
    strength = rows.norm(dim=1) if observation.kind == "delta" else sums.abs()
    least = 1_000 * eps * strength.max()
    if observation.kind == "delta":
        least = torch.maximum(least, 8 * eps * weight.norm(dim=1))
    index = (strength > least).nonzero().flatten()
    images = rows[index] / sums[index, None]
    single = torch.ones(len(index), dtype=torch.bool)
    if observation.kind == "delta":
        # a delta of biases is rounded far more than one of rows, but only sets the scale, which the bin's edges bound
        measured = rows[index] @ weight[0]
        value = (measured / sums[index]).nan_to_num(nan=torch.inf).clamp(edges[index], high[index])
        value = torch.where(value.isfinite(), value, edges[index])
        images = rows[index] * (value / measured)[:, None]
    elif not sparse and BACK in observation.update:
        single = _alone(observation.update[BACK].detach().double().cpu().T, edges, index, images @ weight[0])
    return Bins(index, images, edges[index], high[index], single, strength[index])


def invert_imprint(observation: Observation, *, image_shape: Sequence[int], num_classes: int, sparse: bool = False) -> Reconstruction:
    """Images of a batch from the imprint block's gradients, see `read_bins`; nothing of the backbone or its defence enters.

    Args:    observation: of an `Imprinted` model with crafted weights; kind "delta" for `sparse` clients of several steps, or for one
             step of SGD.
    Returns: images of single bins first, then blends, each in the order of the edges; places left are filled with the image of the
             heaviest bin, which repeats if images repeat. loss: share of the B images that no bin holds alone, in [0, 1).
             Labels are granted or recovered, in no relation to the images' order. Failed if the update is zero or not finite.
    Raises:  InputError if the observation is not one of an Imprinted model for images of this shape.
    """
    labels, size = labels_of(observation, num_classes), observation.num_examples
    for name in (MEASURE, OFFSET):
        if name in observation.update and (reason := trouble(observation, [name])):
            return failed(observation, image_shape, labels, f"{reason} ({name!r})")
    found = read_bins(observation, sparse=sparse)
    pixels = math.prod(image_shape)
    if found.images.shape[1] != pixels:
        raise InputError(
            f"the imprint block sees {found.images.shape[1]} pixels, image_shape={tuple(image_shape)} has {pixels}: give the client's shape."
        )
    if not len(found.index):
        return failed(
            observation, image_shape, labels, "no bin holds an image beyond rounding: craft the block from other statistics, or with more gain"
        )
    order = torch.cat([found.single.nonzero().flatten(), (~found.single).nonzero().flatten()])
    if len(order) > size:  # more bins than images: some are rounding, the heaviest are not
        heaviest = found.weight.argsort(descending=True)[:size]
        order = order[torch.isin(order, heaviest)]
    alone = int(found.single[order].sum())
    fill = found.weight.argmax().view(1).expand(size - len(order))
    images = found.images[torch.cat([order, fill])].view(size, *image_shape)
    return recovered(observation, images, labels, 1 - alone / size)


def zeroed_level(params: Tensors, *, prefix: str = "perturbation.") -> Tensors:
    """What a malicious server sends that wants the learned perturbation off: s = −10⁴, so that softplus(s) = 0, and no shift μ.

    A level that is predicted from the latent gets zero weights and that bias. Other tensors are those of `params`.
    The client's own floor σ_min, which no tensor reaches, is what is left of the noise.

    Raises:  InputError if there is no level.
    """
    level = prefix + "level"
    names = [name for name in params if name == level or name.startswith((level + ".", prefix + "shift."))]
    if not any(name.startswith(level) for name in names):
        raise InputError(f"{level!r} is missing in params: the model has no perturbation, or the server does not send its tensors.")
    made = {name: torch.full_like(params[name], -1e4 if name in (level, level + ".bias") else 0.0) for name in names}
    return {name: made.get(name, tensor) for name, tensor in params.items()}


def _edges(bins: int, row: Tensor, public: Tensor | None, mean: float | None, std: float | None, law: str) -> Tensor:
    """(n,): where the bins begin."""
    shares = torch.arange(1, bins, dtype=torch.float64) / bins
    if public is not None:
        values = public.detach().double().cpu().flatten(1) @ row
        mean, std = float(values.mean()), float(values.std()) if len(values) > 1 else 0.0
        inner = torch.quantile(values, shares)
    elif mean is None or std is None:
        raise InputError("craft needs public images, or mean and std of what is measured: give public=, or mean= and std=.")
    elif law == "normal":
        inner = mean + std * math.sqrt(2) * torch.erfinv(2 * shares - 1)
    elif law == "laplace":
        inner = mean - std / math.sqrt(2) * (shares - 0.5).sign() * torch.log1p(-2 * (shares - 0.5).abs())
    else:
        raise InputError(f'law={law!r} is unknown: choose "normal" or "laplace".')
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise InputError(f"mean={mean}, std={std} of what is measured: expected finite numbers, std above 0, or several different public images.")
    edges = torch.cat([inner.new_tensor([mean - FAR * std]), inner])
    # few public images, or equal ones, give equal quantiles: a bin of no width would divide by zero
    least = 1e-5 * std * torch.arange(bins, dtype=torch.float64)
    return (edges - least).cummax(0).values + least


def _alone(columns: Tensor, edges: Tensor, index: Tensor, measured: Tensor) -> Tensor:
    """bool (k,): which occupied bins hold one image, by C = ∂L/∂(back) as (n, P) over bins.

    With S_j the sum of o(x) over all images above c_j: an empty bin j gives S_j = S_{j+1} = (C_j − C_{j+1}) / (c_{j+1} − c_j). For an
    occupied bin i between empty ones, Σ o = S_i − S_{i+1} and Σ o (h − c_i) = C_i − C_{i+1} − (c_{i+1} − c_i) S_{i+1} over its images.
    """
    bins, occupied = len(edges), set(index.tolist())
    columns = torch.cat([columns, torch.zeros_like(columns[:1])])
    widths = torch.cat([edges.diff(), edges.new_zeros(1)])  # the last bin has no end, and nothing above

    def above(empty: int) -> Tensor:
        return (columns[empty] - columns[empty + 1]) / widths[empty] if empty < bins - 1 else torch.zeros_like(columns[0])

    alone = torch.ones(len(index), dtype=torch.bool)
    for place, one in enumerate(index.tolist()):
        if one == 0 or {one - 1, one + 1} & occupied:
            continue
        higher = above(one + 1)
        total = above(one - 1) - higher
        moment = columns[one] - columns[one + 1] - widths[one] * higher
        alone[place] = bool((moment - (measured[place] - edges[one]) * total).norm() <= 0.05 * moment.norm())
    return alone
