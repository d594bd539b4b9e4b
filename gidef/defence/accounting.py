"""The (ε, δ) of noisy training, by the accountants of Opacus."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gidef.errors import InputError

Accountant = Literal["prv", "rdp"]
LARGE = 50.0
"""Beyond this target the RDP accountant answers for PRV, whose grid grows without bound as the noise falls: 17 s to find the noise of ε = 50."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Releases that one unit, an image or a client, may be part of: `steps` of them, in each with probability rate in (0, 1]."""

    rate: float
    steps: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What a training spends: the noise multiplier, and (ε, δ) of the unit that is worst off. Without noise ε is infinite.

    unit: whose presence the guarantee hides, "image" or "client".
    """

    noise_multiplier: float
    epsilon: float
    delta: float
    unit: Literal["image", "client"]


def needs_opacus() -> None:
    """Raises: InputError if Opacus cannot be imported."""
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise InputError(f"DPSGD needs Opacus, which cannot be imported ({error}): pip install -e '.[dp]', or leave the defence out.") from error


@functools.lru_cache(maxsize=1024)
def epsilon(schedule: Schedule, *, noise_multiplier: float, delta: float, accountant: Accountant = "prv") -> float:
    """ε at δ of the Gaussian mechanism on Poisson samples, composed over the schedule.

    Args:    noise_multiplier: standard deviation of the noise over the largest norm of one unit's part.  delta: in (0, 1).
    Returns: an upper bound: 0 for no steps, ∞ without noise. PRV's stands 0.01 above its estimate, and is RDP's where noise all but vanishes.
    Raises:  InputError without Opacus.
    Source:  PRV: Gopi et al. 2021, arXiv:2106.02848.  RDP: Mironov et al. 2019, arXiv:1908.10530. Neighbours differ by one unit more or less.
    """
    if schedule.steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    needs_opacus()
    from opacus.accountants import create_accountant

    one = create_accountant("rdp" if _distance(schedule, noise_multiplier) > 30 else accountant)
    one.history = [(noise_multiplier, schedule.rate, schedule.steps)]
    return float(_quietly(one.get_epsilon, delta=delta))


def _distance(schedule: Schedule, noise: float) -> float:
    """Roughly μ of Gaussian differential privacy, by the central limit theorem (Bu et al. 2020, arXiv:1911.11607) or without sampling."""
    sampled = schedule.rate * math.sqrt(schedule.steps * math.expm1(min(noise**-2, 700.0)))
    return min(sampled, math.sqrt(schedule.steps) / noise)


@functools.lru_cache(maxsize=1024)
def _solved(schedule: Schedule, target: float, delta: float, accountant: Accountant) -> float:
    """Opacus' noise multiplier for one schedule."""
    needs_opacus()
    from opacus.accountants.utils import get_noise_multiplier

    try:
        return _quietly(
            get_noise_multiplier, target_epsilon=target, target_delta=delta, sample_rate=schedule.rate, steps=schedule.steps,
            accountant=accountant if target <= LARGE else "rdp", epsilon_tolerance=min(0.01, 0.01 * target),
        )  # fmt: skip
    except ValueError as error:
        cure = " Or set accountant=prv: rdp knows no epsilon below log(1 / delta) / 62." if accountant == "rdp" else ""
        raise InputError(f"target_epsilon={target} at delta={delta} cannot be reached ({error}): raise one, or train for fewer rounds.{cure}") from error


def noise_for(schedules: Iterable[Schedule], *, target: float, delta: float, accountant: Accountant = "prv") -> float:
    """The noise multiplier with which no schedule spends more than ε = target; the one that is worst off spends 99 % of it or more.

    Raises: InputError without Opacus, or if there is no such noise.
    """
    noise = 0.0
    # worst first by rate · √steps, on which ε mostly depends: the others are then seen to be within the target
    for schedule in sorted({one for one in schedules if one.steps}, key=lambda one: (-one.rate * one.steps**0.5, one.rate)):
        if epsilon(schedule, noise_multiplier=noise, delta=delta, accountant=accountant) > target:
            noise = max(noise, _solved(schedule, target, delta, accountant))
    return noise


def budget(
    schedules: Iterable[Schedule], *, noise_multiplier: float | None, target_epsilon: float | None, delta: float,
    unit: Literal["image", "client"], accountant: Accountant = "prv",
) -> Budget:  # fmt: skip
    """What a training with these schedules, one per client or one for all, spends. Exactly one of noise_multiplier and target_epsilon is given.

    Raises: ValueError for both or neither; see `noise_for`.
    """
    if (noise_multiplier is None) == (target_epsilon is None):
        raise ValueError(f"noise_multiplier={noise_multiplier}, target_epsilon={target_epsilon}: give exactly one")
    schedules = tuple(dict.fromkeys(schedules))
    if noise_multiplier is None:
        noise_multiplier = noise_for(schedules, target=target_epsilon, delta=delta, accountant=accountant)
    spent = [epsilon(one, noise_multiplier=noise_multiplier, delta=delta, accountant=accountant) for one in schedules]
    return Budget(float(noise_multiplier), max(spent, default=0.0), delta, unit)


def _quietly(compute: Callable[..., float], *args: Any, **options: Any) -> float:
    """The accountants warn of orders at the edge of their list and of logarithms of 0 that they then leave out."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return compute(*args, **options)
