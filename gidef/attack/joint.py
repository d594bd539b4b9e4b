"""A3: match over the images and the noise together."""

from __future__ import annotations

from typing import Any

from gidef.attack.matching import Matching


def joint(*, noise_shape: tuple[int, ...], **settings: Any) -> Matching:
    """The joint attack: min over x, e of distance + tv · TV(x) + noise_weight · mean e², for noise of unit variance.

    noise_shape: of one observation's noise, as the simulator takes it.  settings: image_shape, num_classes and any
    other field of `Matching`, which wins over a tv of 1e-3.
    Measured: as in `naive`, with Gaussian noise of σ = 1 on the normalised latent 64×7×7: 25.6 dB after 600 iterations, 27.1 after
              1,000, 27.9 after 2,000, where the naive attack gets 10.2.
    """
    return Matching(noise_shape=noise_shape, **{"tv": 1e-3, **settings})
