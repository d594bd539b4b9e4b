"""What an attacker believes of images before looking at an update. Each function gives a prior without a weight; `Matching.priors` weighs it.

A prior is a pure function of one candidate, prior(point) → scalar, where point has images (B, C, H, W) in [0, 1], labels (B, K) as
probabilities, noise, params and known. All are vmappable, and differentiable twice where they are smooth; where they have a kink
(a norm at 0, |0|), the gradient there is 0. What differs from one observation to the next must come from `point.known`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gidef import similarity
from gidef.errors import InputError
from gidef.types import Tensors

# B images, C channels, H, W; K classes, d features
Prior = Callable[[Any], Tensor]
Statistics = Sequence[tuple[Tensor, Tensor]]
"""(mean, variance) of each BatchNorm layer's input, (channels,) both."""
Reference = Tensor | str | Callable[[Any], Tensor]
"""A tensor for every observation alike, the name of one in `point.known`, or a function of the point."""

TV_KINDS = ("anisotropic", "isotropic", "double_opponents", "squared")
SOURCES = ("batch", "running", "proxy")


def l2(centre: float = 0.5, *, squared: bool = True) -> Prior:
    """Distance from a grey level.

        squared       mean over all pixels of (x − centre)²
        not squared   mean over images of ‖x − centre‖ / √(CHW)

    Source:   Yin et al. 2021, arXiv:2104.07586, equation 7, the norm of an image.
    Deviates: the paper's images are normalised by mean and deviation, so its 0 is about grey; the norm is over √(CHW), so that one weight
              does for all sizes.
    """

    def prior(point: Any) -> Tensor:
        mean_squares = (point.images - centre).square().mean((-3, -2, -1))
        return mean_squares.mean() if squared else _root(mean_squares).mean()

    return prior


def total_variation(kind: Literal["anisotropic", "isotropic", "double_opponents", "squared"] = "anisotropic", *, softening: float = 1e-8) -> Prior:
    """Roughness of the images, mean over images.

        anisotropic        mean |∂x| + mean |∂y|, as `similarity.total_variation`
        isotropic          mean √(∂x² + ∂y² + softening) − √softening, differences to the right and below; smooth
        double_opponents   isotropic, over the channels and the C (C − 1) / 2 differences of channels, which keeps edges of the channels together
        squared            mean ∂x² + mean ∂y²

    Source:   Rudin et al. 1992; Åström et al. 2016 (Double-Opponent Vectorial Total Variation), for opponents. breaching's "modern" variant of
              Inverting Gradients takes the last but one.
    Deviates: colours are differences of channels, not the orthogonal opponents of Åström et al., and the channels themselves stay.
    Raises:   InputError for another kind, or a softening that is not positive.
    """
    if kind not in TV_KINDS or not softening > 0:
        raise InputError(f"total_variation: kind={kind!r}, softening={softening}: expected one of {', '.join(TV_KINDS)} and a softening above 0.")

    def prior(point: Any) -> Tensor:
        images = point.images
        if kind == "anisotropic":
            return similarity.total_variation(images).mean()
        if kind == "squared":
            return sum(step.square().sum() / max(step.numel(), 1) for step in (images.diff(dim=-1), images.diff(dim=-2)))
        if kind == "double_opponents":
            channels = images.unbind(-3)
            opponents = [one - other for place, one in enumerate(channels) for other in channels[place + 1 :]]
            images = torch.stack([*channels, *opponents], -3)
        # the last column and row have no neighbour: their difference is 0
        across = torch.nn.functional.pad(images.diff(dim=-1), (0, 1)).square()
        down = torch.nn.functional.pad(images.diff(dim=-2), (0, 0, 0, 1)).square()
        return ((across + down + softening).sqrt() - softening**0.5).mean()

    return prior


def bn_statistics(
    statistics_of: Callable[[Tensors, Tensors, Tensor], Statistics],
    target: Statistics | Callable[[Tensors, Tensors], Statistics],
    *,
    source: Literal["batch", "running", "proxy"],
    squared: bool = False,
    first_layer: float = 1.0,
) -> Prior:
    """Statistics of the BatchNorm layers' inputs, as the candidate gives them, against known ones.

        published   Σ_l w_l (‖μ_l(x) − μ_l‖ + ‖σ²_l(x) − σ²_l‖)
        squared     Σ_l w_l (mean (μ_l(x) − μ_l)² / (σ²_l + ε) + mean (σ²_l(x) / (σ²_l + ε) − 1)²),   free of each layer's scale

    Args:    statistics_of: (params, known, images) → (mean, variance) of each layer, as `surgery.batch_statistics` of the attack copy.
             target: what they should be, or a function (params, known) → that. A tensor given here is the same for all observations.
             source: where the target comes from, for the threat model's sake: "batch", the victim's own statistics, which no FL protocol
             sends unless BatchNorm is averaged after one step; "running", the model's buffers; "proxy", those of public images.
             first_layer: w of the first layer; 1 elsewhere.
    Returns: the prior; its attribute `source` says what was declared.
    Raises:  InputError for another source; from the prior, if the numbers of layers differ.
    Source:  Yin et al. 2021, arXiv:2104.07586, equation 9. Hatamizadeh et al. 2022, arXiv:2202.06924, show that with "batch" it decides whether
             the attack works.
    """
    if source not in SOURCES:
        raise InputError(f"source={source!r} of BatchNorm statistics is unknown: choose one of {', '.join(SOURCES)}.")
    if not callable(target):
        target = [(mean.detach(), variance.detach()) for mean, variance in target]

    def prior(point: Any) -> Tensor:
        found = list(statistics_of(point.params, point.known, point.images))
        wanted = list(target(point.params, point.known)) if callable(target) else target
        if len(found) != len(wanted) or not found:
            raise InputError(
                f"BatchNorm statistics of {len(found)} layers against a target of {len(wanted)}: give one pair per layer, for a net that has any."
            )
        total = 0.0
        for place, ((mean, variance), (goal, spread)) in enumerate(zip(found, wanted, strict=True)):
            goal, spread = goal.to(mean), spread.to(mean)
            if squared:
                scale = spread + 1e-5
                apart = ((mean - goal).square() / scale).mean() + (variance / scale - 1).square().mean()
            else:
                apart = _root((mean - goal).square().sum()) + _root((variance - spread).square().sum())
            total = total + (first_layer if place == 0 else 1.0) * apart
        return total

    prior.source = source
    return prior


def proxy_statistics(
    statistics_of: Callable[[Tensors, Tensors, Tensor], Statistics], params: Tensors, known: Tensors, images: Tensor, *, batch_size: int = 32
) -> list[tuple[Tensor, Tensor]]:
    """Statistics of public images, for `bn_statistics(…, source="proxy")`: means over batches of what `statistics_of` gives.

    Args:    images: (n, C, H, W) in [0, 1], public. batch_size: that of the victims is best, since a small batch has a smaller variance;
             the last batch is left out if it is smaller, unless it is the only one.
    Raises:  InputError if there are no images or batch_size is below 1.
    """
    if len(images) == 0 or batch_size < 1:
        raise InputError(
            f"proxy statistics of {len(images)} images in batches of {batch_size}: expected at least one image and a batch size of at least 1."
        )
    batches = [part for part in images.split(batch_size) if len(part) == min(batch_size, len(images))]
    with torch.no_grad():
        each = [list(statistics_of(params, known, part)) for part in batches]
    return [tuple(torch.stack(parts).mean(0) for parts in zip(*pairs, strict=True)) for pairs in zip(*each, strict=True)]


def toward(reference: Reference) -> Prior:
    """Stay close to an image: mean (x − reference)².

    Args:    reference: (B, C, H, W), the name of one in `point.known`, or a function of the point, through which the gradient flows.
    Raises:  InputError, from the prior, if `known` lacks the name or shapes differ.
    """

    def prior(point: Any) -> Tensor:
        goal = _looked_up(reference, point, "toward")
        if goal.shape != point.images.shape:
            raise InputError(f"toward: a reference of shape {tuple(goal.shape)} for images {tuple(point.images.shape)}: give one image each.")
        return (point.images - goal.to(point.images)).square().mean()

    return prior


def decoder_aware(decode: Callable[[Tensors, Tensors, Tensor, Tensor | None], Tensor], *, through: bool = True) -> Prior:
    """A6, for a share policy that releases the trained decoder: stay close to what it makes of the candidate's own latent.

        mean (x − D(z̃(x, e)))²

    Args:    decode: (params, known, images, noise) → D(z̃), (B, C, H, W).  through: whether the gradient also flows through the decoder;
             if not, D(z̃(x)) is held constant and x is pulled to it.
    Raises:  InputError, from the prior, if the decoded images have another shape than the candidate's.
    """

    def decoded(point: Any) -> Tensor:
        images = decode(point.params, point.known, point.images, point.noise)
        return images if through else images.detach()

    return toward(decoded)


def orthogonality() -> Prior:
    """Images of one batch should have little in common: mean over pairs of cos², each image without its channels' means; 0 for one image.

    Source:   Qian et al. 2020, arXiv:2010.15718, who add orthogonality to keep a batch's candidates from becoming mixtures of one another.
    Deviates: the cosine of centred images, not the product of raw ones, which would reward dark images. An image without variance has
              nothing in common with any, and the gradient there is 0.
    """

    def prior(point: Any) -> Tensor:
        images = point.images
        count = images.shape[0]
        if count < 2:
            return images.sum() * 0.0
        flat = (images - images.mean((-2, -1), keepdim=True)).flatten(1)
        powers = flat.square().sum(1)
        empty = powers <= flat.shape[1] * (8 * torch.finfo(flat.dtype).eps) ** 2
        lengths = torch.where(empty, 1.0, powers)
        common = torch.where(empty[:, None] | empty, 0.0, (flat @ flat.T).square() / (lengths[:, None] * lengths))
        return (common.sum() - common.diagonal().sum()) / (count * (count - 1))

    return prior


def feature_match(features_of: Callable[[Tensors, Tensors, Tensor, Tensor | None], Tensor], target: Reference, *, per_class: bool = True) -> Prior:
    """The last layer's inputs should be those that its update gives away: mean (f(x) − h)² / mean h².

    Args:    features_of: (params, known, images, noise) → (B, d).
             target: h (B, d) in the order of the labels, as `labels.recover_features` gives it.
             per_class: compare means over the images of one label, on both sides: within a class the order is unknown, and the recovered
             features may be its mean anyhow. Exact for one-hot labels.
    Raises:  InputError, from the prior, if `known` lacks the name or shapes differ.
    Source:  breaching's "features" regulariser, for which the features of an image are the row of its label, (∂L/∂W)_y / (∂L/∂b)_y.
    """

    def prior(point: Any) -> Tensor:
        found = features_of(point.params, point.known, point.images, point.noise)
        goal = _looked_up(target, point, "feature_match").to(found)
        if found.shape != goal.shape:
            raise InputError(
                f"feature_match: features of shape {tuple(found.shape)} against recovered ones of {tuple(goal.shape)}: give (B, d) both."
            )
        if per_class:
            alike = (point.labels @ point.labels.mT).to(found)
            alike = alike / alike.sum(1, keepdim=True)
            found, goal = alike @ found, alike @ goal
        return (found - goal).square().mean() / goal.square().mean().clamp_min(torch.finfo(goal.dtype).tiny)

    return prior


def _looked_up(reference: Reference, point: Any, prior: str) -> Tensor:
    """The tensor that a reference stands for."""
    if isinstance(reference, str):
        if reference not in point.known:
            raise InputError(f"{prior}: the observation's known tensors hold no {reference!r}, only {sorted(point.known)[:5]}: put it there.")
        return point.known[reference]
    return reference(point) if callable(reference) else reference


def _root(squares: Tensor) -> Tensor:
    """√ with slope 0 at 0."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
