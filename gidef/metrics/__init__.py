"""How much a reconstruction tells, and how good a classifier is: pure functions that never modify their inputs.

Images are floating (B, C, H, W) and clamped to [0, 1] here. Values come per image, for means, intervals and worst cases.
The trivial bounds are in `metrics.bounds`, LPIPS (a download) in `metrics.lpips`.
"""

from gidef.metrics.classify import (
    accuracy,
    attacker_accuracy,
    attacker_correct,
    auc,
    correct,
    label_recovery,
    macro_f1,
    per_class_accuracy,
)
from gidef.metrics.features import feature_distance
from gidef.metrics.identify import iip
from gidef.metrics.images import mse, nmse, pairwise_mse, psnr_db, ssim, variance
from gidef.metrics.interval import bootstrap_change, bootstrap_interval, worst_decile
from gidef.metrics.pairing import pair

__all__ = [
    "accuracy",
    "attacker_accuracy",
    "attacker_correct",
    "auc",
    "bootstrap_change",
    "bootstrap_interval",
    "correct",
    "feature_distance",
    "iip",
    "label_recovery",
    "macro_f1",
    "mse",
    "nmse",
    "pair",
    "pairwise_mse",
    "per_class_accuracy",
    "psnr_db",
    "ssim",
    "variance",
    "worst_decile",
]
