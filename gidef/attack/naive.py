"""A0: match the model without noise."""

from __future__ import annotations

from typing import Any

from gidef.attack.matching import Matching


def naive(**settings: Any) -> Matching:
    """The naive attack, tuned: the engine's defaults with no noise searched. Give it a simulator that ignores the noise.

    settings: image_shape, num_classes, and any field of `Matching` but noise_shape.
    """
    return Matching(**settings, noise_shape=None)


def inverting_gradients(**settings: Any) -> Matching:
    """The same as published: signed Adam 0.1, step decay, constant total variation, and autograd's flat kinks.

    settings: as `naive`; they come before the published ones (tv: the paper takes 1e-4 to 1e-1).
    Source:  Geiping et al. 2020, arXiv:2003.14053.
    Deviates: starts, steps and box are those of plain pixels in [0, 1]; the paper's are of pixels normalised by mean and deviation.
    """
    published = {"signed": True, "decay": "step", "kink_width": None, "tv": 1e-2, "tv_boost": 1.0, "lr": 0.1, "iterations": 4_800}
    return naive(**{**published, **settings})
