"""A3: match over the images and the noise together."""

from __future__ import annotations

from typing import Any

from gidef.attack.matching import Matching


def joint(*, noise_shape: tuple[int, ...], **settings: Any) -> Matching:
    """The joint attack: min over x, e of distance + tv · TV(x) + noise_weight · mean e², for noise of unit variance.

    noise_shape: of one observation's noise, as the simulator takes it.  settings: image_shape, num_classes and any
    other field of `Matching`.
    """
    return Matching(noise_shape=noise_shape, **settings)
