"""How well classes are told apart: a model's utility, and a judge's verdict on reconstructions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gidef.metrics.images import clamped


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the largest logit is the label's (the first of equal ones), else 0.

    Args:    logits: (B, K), finite.  labels: int64 (B,) in [0, K).
    Returns: float32 (B,) of 0 and 1, for means and intervals.
    Raises:  ValueError if shapes do not fit, B is 0, a logit is not finite or a label out of range.
    """
    _check(logits, labels)
    return (logits.argmax(1) == labels).float()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of `correct` answers, in [0, 1]."""
    return float(correct(logits, labels).double().mean())


def per_class_accuracy(logits: Tensor, labels: Tensor) -> list[float]:
    """Share of correct answers for each of the K classes; NaN for a class without examples. As in `correct`."""
    hits = torch.bincount(labels[correct(logits, labels) > 0], minlength=logits.shape[1])
    return (hits / torch.bincount(labels, minlength=logits.shape[1])).tolist()


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """Unweighted mean over classes of F1 = 2 TP / (2 TP + FP + FN), in [0, 1].

    Classes that are neither true nor predicted anywhere are left out, as in scikit-learn and TorchMetrics.
    Arguments and errors as in `correct`.
    """
    _check(logits, labels)
    predicted, classes = logits.argmax(1), logits.shape[1]
    hits = torch.bincount(labels[predicted == labels], minlength=classes).double()
    both = (torch.bincount(labels, minlength=classes) + torch.bincount(predicted, minlength=classes)).double()
    return float((2 * hits / both)[both > 0].mean())


def auc(logits: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve, one class against the rest, averaged over classes without weights.

        AUC_k = (Σ ranks of positives − P(P + 1)/2) / (P N),   ties share their mean rank

    A class is ranked by its log-softmax, the order of its probability, so pass logits (for probabilities: their logarithm).
    Classes without positives or without negatives are left out. For two classes this is the binary AUC.

    Args:    logits: (B, K), K ≥ 2, finite.  labels: int64 (B,) in [0, K).
    Returns: in [0, 1]; 0.5 is chance.
    Raises:  ValueError as `correct`, and if only one class occurs.
    Source:  Mann & Whitney 1947; the average that MedMNIST reports.
    """
    _check(logits, labels)
    scores = logits.detach().double().log_softmax(1).T.contiguous()
    truth = torch.nn.functional.one_hot(labels, logits.shape[1]).T
    positives = truth.sum(1)
    negatives = len(labels) - positives
    usable = (positives > 0) & (negatives > 0)
    if not usable.any():
        raise ValueError("auc: only one class occurs in the labels, so nothing can be ranked against it")
    ordered = scores.sort(1).values
    below, up_to = (torch.searchsorted(ordered, scores, right=right) for right in (False, True))
    wins = ((below + up_to + 1) / 2 * truth).sum(1) - positives * (positives + 1) / 2
    return float((wins[usable] / (positives * negatives)[usable]).mean())


def attacker_correct(
    judge: Callable[[Tensor], Tensor], reconstructions: Tensor, labels: Tensor, *, batch_size: int = 256
) -> Tensor:
    """`correct` of a judge that classifies reconstructions; the mean is the attacker accuracy.

    To be read beside the same on the true images (ceiling), on class means (what a label alone buys) and chance.

    Args:    judge: images (b, C, H, W) → logits (b, K); put into eval mode by the caller.  reconstructions:
             (B, C, H, W), floating, clamped to [0, 1] here.  labels: int64 (B,), true.  batch_size: b at most.
    Returns: float32 (B,) of 0 and 1.
    Raises:  ValueError as `clamped` and `correct`.
    """
    with torch.no_grad():
        logits = torch.cat([judge(part) for part in clamped(reconstructions).split(batch_size)])
    return correct(logits, labels)


def attacker_accuracy(
    judge: Callable[[Tensor], Tensor], reconstructions: Tensor, labels: Tensor, *, batch_size: int = 256
) -> float:
    """Mean of `attacker_correct`, in [0, 1]."""
    return float(attacker_correct(judge, reconstructions, labels, batch_size=batch_size).double().mean())


def label_recovery(recovered: Tensor, truth: Tensor) -> float:
    """Share of a batch's labels that were recovered, regardless of order: |multiset intersection| / B.

    Args:    recovered, truth: int64 (B,), B ≥ 1, not negative.
    Returns: in [0, 1].
    Raises:  ValueError if the lengths differ or are zero.
    """
    if recovered.shape != truth.shape or truth.dim() != 1 or not len(truth):
        raise ValueError(f"label_recovery: expected two (B,), got {tuple(recovered.shape)} and {tuple(truth.shape)}")
    classes = int(torch.maximum(recovered.max(), truth.max())) + 1
    overlap = torch.minimum(torch.bincount(recovered, minlength=classes), torch.bincount(truth, minlength=classes))
    return int(overlap.sum()) / len(truth)


def _check(logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless logits (B, K) are finite and labels (B,) index them."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"expected logits (B, K) and labels (B,), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if not logits.isfinite().all():
        raise ValueError("expected finite logits, got NaN or inf: the classifier has diverged")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(f"labels reach from {int(labels.min())} to {int(labels.max())}, logits have {logits.shape[1]} classes")
