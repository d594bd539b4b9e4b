"""What a gradient-matching attack minimises and how it descends: its settings, distance and schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gidef.errors import InputError
from gidef.types import Tensors

Simulate = Callable[[Tensors, Tensors, Tensor, Tensor, Tensor | None], Tensors]
"""simulate(params, known, images (B, C, H, W), labels (B, classes) probabilities, noise) → the update that a client would
release, with the observed update's names. Pure, differentiable and vmappable."""

Start = Callable[[int, int], tuple[Tensor, Tensor | None]]
"""start(index of the observation, restart) → images (B, C, H, W) and noise (noise_shape) to begin from; None is the default noise."""

DISTANCES = ("cosine", "l2")
DECAYS = ("step", "linear", "quadratic")
STARTS = ("normal", "uniform")


@dataclass(frozen=True, kw_only=True, slots=True)
class Matching:
    """Settings of a gradient-matching attack; `naive` and `joint` give tuned ones.

        min over x (and e)   distance(g(x, e), g_observed) + tv · TV(x) + noise_weight · mean e²

    image_shape:  (C, H, W).  num_classes: of the labels.
    noise_shape:  of one observation's noise e, as `simulate` takes it, e.g. (B, *latent); None searches no noise.
    distance:     "cosine" 1 − cos over all tensors as one vector, in [0, 2]; "l2" ‖g − g_observed‖² / ‖g_observed‖².
    tv:           weight of the anisotropic total variation (mean over images).  tv_boost: it starts this many times higher and
                  falls geometrically to `tv` over the first 3/4; ≥ 1.
    lr, noise_lr: Adam's first step, in image units [0, 1] and in standard deviations of the noise.
    signed:       Adam sees only the sign of the pixels' gradient (never of the noise's).
    decay:        of both steps: "step" ×0.1 after 3/8, 5/8 and 7/8; "linear" 1 − t; "quadratic" (1 − t)².
    kink_width:   first and last width of `CurvedKinks`, geometric in between; None leaves autograd's flat kinks.
    start:        images "normal" 0.5 + 0.2 N(0, 1), clipped, "uniform" on [0, 1], or a Start.
    noise_start:  standard deviation of the first e.
    iterations:   steps per attack; the loss is evaluated iterations + 1 times.  restarts: starts per observation.

    Reported losses and the choice of candidates use the final `tv`: the schedules bend the path, never the objective.
    Raises: InputError for values out of range.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    noise_shape: tuple[int, ...] | None = None
    distance: Literal["cosine", "l2"] = "cosine"
    tv: float = 1e-3
    tv_boost: float = 100.0
    noise_weight: float = 1e-3
    lr: float = 0.1
    noise_lr: float = 0.3
    signed: bool = False
    decay: Literal["step", "linear", "quadratic"] = "quadratic"
    kink_width: tuple[float, float] | None = (1.0, 0.1)
    start: Literal["normal", "uniform"] | Start = "normal"
    noise_start: float = 0.0
    iterations: int = 1000
    restarts: int = 1

    def __post_init__(self) -> None:
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise InputError(f"image_shape={self.image_shape}: expected (channels, height, width).")
        for name, value, allowed in (("distance", self.distance, DISTANCES), ("decay", self.decay, DECAYS)):
            if value not in allowed:
                raise InputError(f"{name}={value!r} is unknown: choose one of {', '.join(allowed)}.")
        if not callable(self.start) and self.start not in STARTS:
            raise InputError(f"start={self.start!r} is unknown: choose one of {', '.join(STARTS)}, or give a function.")
        least_values = {"num_classes": 2, "restarts": 1, "iterations": 0, "tv": 0, "noise_weight": 0, "noise_start": 0, "tv_boost": 1}
        for name, least in least_values.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise InputError(f"{name}={value!r}: expected a number of at least {least}.")
        positive = {"lr": self.lr, "noise_lr": self.noise_lr}
        if self.kink_width is not None:
            positive |= {"kink_width[0]": self.kink_width[0], "kink_width[1]": self.kink_width[1]}
        for name, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name}={value!r}: expected a number above 0.")


def step_factor(matching: Matching, iteration: int) -> float:
    """What multiplies the step sizes at an iteration in [0, iterations)."""
    done = iteration / max(matching.iterations, 1)
    if matching.decay == "step":
        return 0.1 ** sum(done >= mark / 8 for mark in (3, 5, 7))
    return 1 - done if matching.decay == "linear" else (1 - done) ** 2


def tv_weight(matching: Matching, iteration: int) -> float:
    """Weight of the total variation that the step at an iteration follows."""
    done = iteration / max(matching.iterations, 1)
    return matching.tv * matching.tv_boost ** max(0.0, 1 - done / 0.75)


def kink_width(matching: Matching, iteration: int) -> float | None:
    """Width of CurvedKinks at an iteration."""
    if matching.kink_width is None:
        return None
    first, last = matching.kink_width
    return first * (last / first) ** (iteration / max(matching.iterations, 1))


def distance(name: str, update: Tensors, target: Tensors, scale: Tensor) -> Tensor:
    """Distance of an update from the observed one, a scalar.

        cosine   ½ ‖u/‖u‖ − t‖² = 1 − cos(u, t), without its cancellation near 0
        l2       ‖scale · u − t‖²

    target: t, the observed update over its norm.  scale: one over that norm. ‖u‖ is softened below 1e-6 of the observed norm,
    so that a vanishing update has a finite gradient.
    """
    if name == "cosine":
        squared = sum(tensor.square().sum() for tensor in update.values()) * scale.square()
        return 0.5 * sum((tensor * (scale * (squared + 1e-12).rsqrt()) - target[key]).square().sum() for key, tensor in update.items())
    return sum((tensor * scale - target[key]).square().sum() for key, tensor in update.items())
