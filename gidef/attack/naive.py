"""A0: match the model without noise."""

from __future__ import annotations

from typing import Any

from gidef.attack.matching import Matching


def naive(**settings: Any) -> Matching:
    """The naive attack, tuned: the engine's defaults with no noise searched. Give it a simulator that ignores the noise.

    settings: image_shape, num_classes, and any field of `Matching` but noise_shape.
    Measured: untrained small net, batch 1, 16 Blood images of 28 px not used for tuning, mean PSNR: 28.2 dB after 600 iterations,
              29.3 after 1,000, 30.6 after 2,000. `inverting_gradients`: 12.2 after 2,000; with curved kinks and nothing else
              changed, 24.8 (on the tuning images). A trained net needs restarts, and perhaps lr 0.03: watch the losses.
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
