"""The defences that a recipe may choose. Those with `changes_update` act on what leaves, and combine with any other in a tuple."""

from dataclasses import dataclass
from typing import ClassVar, Literal

_config = dataclass(frozen=True, kw_only=True, slots=True)


@_config
class Undefended:
    """Cross-entropy, and everything leaves as it is."""


@_config
class LearnedPerturbation:
    """Noise of learned level on the latent, played against a decoder: arXiv 2503.16542, as reconstructed in the docs of `defence`."""

    strength: float = 1.0
    """kappa, multiplies the learned level; the latent has unit RMS."""
    dependence: Literal["pearson2", "ssim", "neg_mse", "dcor", "cka"] = "pearson2"
    """R(image, reconstruction), which the client minimises."""
    dependence_weight: float = 1.0
    """lambda, against cross-entropy in nats; 0 learns the level without a decoder."""
    ramp: float = 0.1
    """Share of the rounds over which lambda rises linearly from 0."""
    level: Literal["global", "conditional"] = "global"
    """A level per channel, or one computed from the latent by a 1x1 convolution."""
    law: Literal["gaussian", "laplace"] = "gaussian"
    frozen: bool = False
    """One noise draw per image for ever, against averaging over rounds."""
    mean: bool = False
    """Also learn a shift of the latent."""
    std_init: float = 1.0
    std_floor: float = 0.1
    """sigma_min, enforced by the client whatever the server sends."""
    kl_weight: float = 0.0
    """beta, on KL(N(m, sigma^2) || N(0, 1)) per latent entry; Gaussian only."""
    decoder_steps: int = 1
    decoder_steps_first: int = 5
    """Decoder steps per batch in a client's first epoch."""
    decoder_lr: float = 1e-3
    decoder_width: float = 1.0
    """Multiplies the decoder's channels."""
    ssim_threshold: float = 0.1
    mse_cap: float = 0.1


# --- of updates: what happens before they leave ------------------------------------------------------------------------


@_config
class Pruning:
    """Only the largest entries of every tensor leave; the others are zero (Zhu et al. 2019; Lin et al. 2018)."""

    changes_update: ClassVar[bool] = True
    share: float = 0.9
    """Of a tensor's entries that are set to zero, in [0, 1]."""


@_config
class GradientNoise:
    """Noise is added to every entry (Zhu et al. 2019)."""

    changes_update: ClassVar[bool] = True
    std: float = 0.1
    """Standard deviation; 0 adds none."""
    law: Literal["gaussian", "laplace"] = "gaussian"
    relative: bool = True
    """std counts in 95th percentiles of each tensor's absolute values; else in the update's units."""


@_config
class Clipping:
    """Updates of a larger L2 norm are scaled down to it (McMahan et al. 2018)."""

    changes_update: ClassVar[bool] = True
    bound: float = 1.0
    """Largest norm, in the update's units."""
    per_tensor: bool = False
    """Each tensor by itself, instead of the whole update."""


@_config
class Sign:
    """Only signs leave, times each tensor's mean absolute value (signSGD, Bernstein et al. 2018)."""

    changes_update: ClassVar[bool] = True


@_config
class Quantisation:
    """Entries are rounded at random, right on average (QSGD, Alistarh et al. 2017)."""

    changes_update: ClassVar[bool] = True
    bits: int = 4
    """Of an entry, its sign included, in [2, 16]."""
    norm: Literal["max", "l2"] = "max"
    """What the largest level stands for."""


@_config
class Censor:
    """A random direction orthogonal to each tensor leaves in its place, the best of some draws (Zhang et al. 2025)."""

    changes_update: ClassVar[bool] = True
    draws: int = 20


@_config
class Soteria:
    """Of one linear layer's gradient, the columns of the features that tell most of the image are zero (Sun et al. 2021)."""

    changes_update: ClassVar[bool] = True
    share: float = 0.8
    """Of the features that are pruned, in [0, 1]."""
    layer: str | None = None
    """Name of a linear layer, e.g. backbone.head; the classifier by default."""


@_config
class GradDefense:
    """Slices of the update that tell equally much of the image; some of them get Gaussian noise (Wang et al. 2022)."""

    changes_update: ClassVar[bool] = True
    std: float = 0.1
    relative: bool = True
    """As in GradientNoise."""
    slices: int = 10
    noisy: int = 5
    """Slices that get noise, at most `slices`."""


DEFENCES = (Undefended, LearnedPerturbation, Pruning, GradientNoise, Clipping, Sign, Quantisation, Censor, Soteria, GradDefense)
