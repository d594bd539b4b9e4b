"""Published attacks with their papers' settings. Each takes image_shape, num_classes and any field of `Matching`, which wins over the preset's.

    deep_leakage                 DLG: Zhu, Liu and Han 2019, arXiv:1906.08935; labels searched with the images, L-BFGS
    improved_deep_leakage        iDLG: Zhao, Mopuri and Bilen 2020, arXiv:2001.02610; labels from the last layer's gradient
    modern_inverting_gradients   the later settings of Inverting Gradients' authors: soft sign, warm-up, cosine decay, patterned start,
                                 total variation of colours
    gradinversion                Yin et al. 2021, arXiv:2104.07586; BatchNorm's statistics by `priors.bn_statistics`, group consistency, noise
"""

from __future__ import annotations

import dataclasses
from typing import Any

from gidef.attack.lbfgs import Lbfgs
from gidef.attack.matching import Matching, Prior
from gidef.attack.naive import inverting_gradients, naive
from gidef.attack.optimisers import Adam
from gidef.attack.priors import l2, total_variation
from gidef.attack.registration import group_consistency
from gidef.errors import InputError


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


def modern_inverting_gradients(*, opponents: bool = True, sharpening: bool = True, **settings: Any) -> Matching:
    """Inverting Gradients with a soft sign, 50 iterations of warm-up, cosine decay, a start of tiled 4-pixel patches and a total variation of colours.

    opponents: `tv` weighs the isotropic total variation over the channels and their differences; else `Matching`'s own.
    sharpening: the soft sign is the authors', tanh(s g) / s (`Adam(soft_over=iterations)`); else `Matching`'s, in units of the gradient's root mean square.
    Source:   the preset "modern" of the breaching package, by the same authors.
    Deviates: pixels in [0, 1], where the package's are normalised by mean and deviation; no prior on the last layer's features, of weight 0.1 there, which
              `priors.feature_match` adds.
    """
    published = {"iterations": 24_000, "signed": "soft", "warmup": 50, "decay": "cosine", "start": "patterned-4", "tv": 0.1}
    made = inverting_gradients(**{**published, **settings})
    if sharpening and made.optimiser is None and made.signed == "soft":
        made = dataclasses.replace(made, optimiser=Adam(sign="soft", soft_over=max(made.iterations, 1)))
    if not opponents:
        return made
    if made.tv_boost != 1 or any({"tv", "tv_boost"} & change.keys() for change in made.variants):
        raise InputError(
            f"tv_boost={made.tv_boost:g}, variants={made.variants}: the total variation of colours has one weight, always and for all. Set opponents=False, or leave "
            "tv_boost at 1 and tv out of the variants."
        )
    return dataclasses.replace(made, tv=0.0, priors=(*made.priors, (made.tv, total_variation("double_opponents"))))


def gradinversion(
    *, pixel_norm: float = 1e-6, group: float = 1e-2, max_shift: float = 4.0, statistics: Prior | None = None, statistics_weight: float = 0.1,
    langevin: float = 0.2, **settings: Any,
) -> Matching:  # fmt: skip
    """GradInversion: squared distance, total variation, pixel norm, and the registered consistency of the restarts; Adam 0.1 with 50
    iterations of warm-up, a cosine decay and noise in every step, flat kinks.

    pixel_norm, group: weights of the mean square and of the distance to the restarts' consensus (0 for none; else two restarts or more).
    max_shift: pixels between restarts.  statistics: the BatchNorm prior, of `priors.bn_statistics`, for nets that have it.
    langevin: the noise's standard deviation in step sizes, of an optimiser that is not given.
    Deviates: weights are over means, and the distance over that of a zero update, where the paper's are over sums.
    """
    priors = ((pixel_norm, l2()),) + (((statistics_weight, statistics),) if statistics is not None else ())
    published = {
        "distance": "l2", "tv": 1e-4, "tv_boost": 1.0, "kink_width": None, "lr": 0.1, "decay": "cosine", "warmup": 50, "restarts": 4,
        "iterations": 20_000, "priors": priors,
        "coupling": group_consistency(group, max_shift=max_shift, permute="labels") if group else None,
    }  # fmt: skip
    made = naive(**{**published, **settings})
    return made if made.optimiser is not None or not langevin else dataclasses.replace(made, optimiser=dataclasses.replace(made.descent(), langevin=langevin))
