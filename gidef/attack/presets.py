"""Published attacks with their papers' settings. Each takes image_shape, num_classes and any field of `Matching`, which wins over the preset's.

    deep_leakage                 DLG: Zhu, Liu and Han 2019, arXiv:1906.08935; labels searched with the images, L-BFGS
    improved_deep_leakage        iDLG: Zhao, Mopuri and Bilen 2020, arXiv:2001.02610; labels from the last layer's gradient
    modern_inverting_gradients   the later settings of Inverting Gradients' authors: soft sign, warm-up, cosine decay, patterned start
    gradinversion                Yin et al. 2021, arXiv:2104.07586; BatchNorm's statistics by `priors.bn_statistics`, group consistency
"""

from __future__ import annotations

from typing import Any

from gidef.attack.lbfgs import Lbfgs
from gidef.attack.matching import Matching, Prior
from gidef.attack.naive import inverting_gradients, naive
from gidef.attack.priors import l2
from gidef.attack.registration import group_consistency


def deep_leakage(*, history: int = 20, **settings: Any) -> Matching:
    """DLG: squared distance over images and label logits, L-BFGS with a line search for each attack by itself.

    history: pairs that L-BFGS keeps.
    Deviates: images stay in [0, 1], where the paper's are free; starts are uniform; the distance is over that of a zero update; steps are
              searched along their line, and 20 pairs are kept, where the authors' code takes whole steps and keeps 100.
    """
    published = {
        "distance": "l2", "iterations": 300, "search_labels": True, "tv": 0.0, "tv_boost": 1.0, "kink_width": None, "lr": 1.0, "label_lr": 1.0,
        "decay": "constant", "start": "uniform", "optimiser": Lbfgs(history=history),
    }  # fmt: skip
    return naive(**{**published, **settings})


def improved_deep_leakage(**settings: Any) -> Matching:
    """iDLG: DLG with the labels recovered first (give observations without labels), or granted."""
    return deep_leakage(**{"search_labels": False, **settings})


def modern_inverting_gradients(**settings: Any) -> Matching:
    """Inverting Gradients with a soft sign, 50 iterations of warm-up, cosine decay and a start of tiled 4-pixel patches.

    Source:   the preset "modern" of the breaching package, by the same authors.
    Deviates: 4,800 iterations for its 24,000; total variation 1e-2, anisotropic, for its 0.1 over double opponents; no feature prior. Both
              priors are there: `priors.total_variation("double_opponents")` and `priors.feature_match`.
    """
    return inverting_gradients(**{"signed": "soft", "warmup": 50, "decay": "cosine", "start": "patterned-4", **settings})


def gradinversion(
    *, pixel_norm: float = 1e-6, group: float = 1e-2, max_shift: float = 4.0, statistics: Prior | None = None, statistics_weight: float = 0.1, **settings: Any
) -> Matching:
    """GradInversion: squared distance, total variation, pixel norm, and the registered consistency of the restarts; Adam 0.1 with 50
    iterations of warm-up and a cosine decay, flat kinks.

    pixel_norm, group: weights of the mean square and of the distance to the restarts' consensus (0 for none; else two restarts or more).
    max_shift: pixels between restarts.  statistics: the BatchNorm prior, of `priors.bn_statistics`, for nets that have it.
    Deviates: weights are over means, and the distance over that of a zero update, where the paper's are over sums; no Langevin noise, which
              `optimiser=Adam(langevin=0.2)` adds as in the paper.
    """
    priors = ((pixel_norm, l2()),) + (((statistics_weight, statistics),) if statistics is not None else ())
    published = {
        "distance": "l2", "tv": 1e-4, "tv_boost": 1.0, "kink_width": None, "lr": 0.1, "decay": "cosine", "warmup": 50, "restarts": 4,
        "iterations": 20_000, "priors": priors,
        "coupling": group_consistency(group, max_shift=max_shift, permute="labels") if group else None,
    }  # fmt: skip
    return naive(**{**published, **settings})
