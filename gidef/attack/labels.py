"""Label recovery from the last linear layer's update."""

from __future__ import annotations

import torch
from torch import Tensor

from gidef.errors import InputError
from gidef.types import Observation, Tensors


def classifier_names(update: Tensors, num_classes: int) -> tuple[str, str | None]:
    """Names of the last linear layer's weight and bias: the last 2-D tensor with num_classes rows, and its sibling `bias`.

    Returns: (weight, bias); bias is None if the update holds none.
    Raises:  InputError if there is no such tensor.
    """
    weights = [name for name, tensor in update.items() if tensor.ndim == 2 and len(tensor) == num_classes]
    if not weights:
        raise InputError(f"labels cannot be recovered: no released tensor is 2-D with {num_classes} rows. Grant the labels, or name the last layer.")
    weight = weights[-1]
    bias = weight.rpartition(".")[0] + ".bias" if "." in weight else "bias"
    return weight, bias if bias in update and update[bias].shape == (num_classes,) else None


def recover_labels(
    observation: Observation, num_classes: int, *, weight: str | None = None, bias: str | None = None, mean_probabilities: Tensor | None = None
) -> Tensor:
    """Labels of the private batch, from the cross-entropy gradient g of the last linear layer.

        one image          only the true class has ∂L/∂b = p − 1 < 0; without a bias, its row of ∂L/∂W = (p − y) hᵀ is the longest
        B images, bias     n_c = B (p̄_c − g_c), rounded to whole numbers that add up to B
        B images, weight   row sums: classes with a negative one are there once; m = (1 + 1/K) Σ negative / B per label, and then
                           again and again the class that stays lowest after taking m off for each label found

    The last rule is free of scale, so a delta, whose step sizes are unknown, uses it with its bias too, as −Δ.

    Args:    observation: of num_examples = B images.  weight, bias: names of the layer's tensors; found if both are None.
             mean_probabilities: p̄ (num_classes,), the model's mean prediction; None takes the uniform one of an untrained model.
    Returns: int64 (B,), sorted; repeated labels and B > num_classes are fine. The order within the batch cannot be known.
    Raises:  InputError if there is no such layer, or its update is not finite.
    Source:  iDLG (Zhao et al. 2020, arXiv:2001.02610); LLG (Wainakh et al. 2021, arXiv:2105.09369) for m.
    Deviates: iDLG's sign test is replaced by the longest row, which holds for features of either sign; with two classes both rows
             are equally long, and the sign of the row sum decides, which takes features of positive mean.
    """
    update, size = observation.update, observation.num_examples
    if weight is None and bias is None:
        weight, bias = classifier_names(update, num_classes)
    for name in (weight, bias):
        if name is not None and (name not in update or len(update[name]) != num_classes):
            raise InputError(f"labels cannot be recovered from {name!r}: it is not a released tensor with {num_classes} rows. Name the last layer's.")
    sign = 1.0 if observation.kind == "gradient" else -1.0
    rows = sign * update[weight].double().cpu() if weight is not None else None
    scores = sign * update[bias].double().cpu() if bias is not None else rows.sum(1)  # per class, lower is likelier
    if not scores.isfinite().all():
        raise InputError("labels cannot be recovered: the last layer's update is not finite.")
    if size == 1:
        return scores.argmin().view(1) if bias is not None or num_classes == 2 else rows.norm(dim=1).argmax().view(1)
    if bias is not None and observation.kind == "gradient":
        uniform = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
        prior = uniform if mean_probabilities is None else mean_probabilities.double().cpu()
        counts = _whole_counts(size * (prior - scores), size)
    else:
        counts = _impact_counts(scores, size)
    return torch.repeat_interleave(torch.arange(num_classes), counts)


def _whole_counts(wanted: Tensor, total: int) -> Tensor:
    """Non-negative whole numbers that add up to `total`, each step going where it is missed most."""
    counts = torch.zeros(len(wanted), dtype=torch.int64)
    for _ in range(total):
        counts[(wanted - counts).argmax()] += 1
    return counts


def _impact_counts(scores: Tensor, total: int) -> Tensor:
    """LLG's rule, see `recover_labels`."""
    counts, left = torch.zeros(len(scores), dtype=torch.int64), scores.clone()
    impact = (1 + 1 / len(scores)) * scores.clamp(max=0).sum() / total
    for label in scores.argsort()[:total].tolist():
        if scores[label] < 0:
            counts[label] += 1
            left[label] -= impact
    while int(counts.sum()) < total:
        label = int(left.argmin())
        counts[label] += 1
        left[label] -= impact
    return counts
