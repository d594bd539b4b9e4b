"""Aggregation that a few false updates cannot steer: rules on every client's own update, where a mean only needs their sum.

A rule may `choose` some clients by their squared distances, and `combine`s the updates of those, or of all, coordinate by coordinate. Examples are
not counted: a client that may lie about its update may lie about their number. All rules need single updates, which secure aggregation hides.

Each coordinate's result is a function of the clients' values in the cohort's order alone, the same bits on every device: selections are exact, and means
are added up in float64, one client after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rule:
    """combine: (n, b) values of n clients → (b,) float64.  choose: squared distances (n, n) float64, inf where a client sent NaN → the rows to combine,
    ascending; None combines all.  name: for messages."""

    name: str
    combine: Callable[[Tensor], Tensor]
    choose: Callable[[Tensor], list[int]] | None = None


def median() -> Rule:
    """Coordinate-wise median; of an even number the mean of the middle two.

    Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning", arXiv:1803.01498, Definition 1. Holds while fewer than half of the clients lie.
    NaN counts as the largest value.
    """

    def combine(values: Tensor) -> Tensor:
        ordered, number = torch.sort(values, dim=0, stable=True).values, len(values)
        low, high = ordered[(number - 1) // 2].double(), ordered[number // 2].double()
        return low if number % 2 else (low + high) / 2

    return Rule("the median", combine)


def trimmed(share: float, number: int) -> int:
    """Clients whose values a trimmed mean leaves out at each end: ⌈share · number⌉."""
    return math.ceil(share * number - 1e-9)


def trimmed_mean(*, share: float) -> Rule:
    """Coordinate-wise mean of what is left without the largest and the smallest values, ⌈share · n⌉ of each.

    Args:    share: β in [0, 1/2).
    Source:  Yin et al. 2018, arXiv:1803.01498, Definition 2. Holds while at most a share β of the clients lies.
    Deviates: β n is rounded up, so that no share trims nothing.
    """
    if not 0 <= share < 0.5:
        raise ValueError(f"share={share}: expected one in [0, 1/2)")

    def combine(values: Tensor) -> Tensor:
        cut = trimmed(share, len(values))
        if 2 * cut >= len(values):
            raise ValueError(f"share={share} of {len(values)} clients leaves none in the middle")
        return mean_in_order(torch.sort(values, dim=0, stable=True).values[cut : len(values) - cut])

    return Rule("the trimmed mean", combine)


def krum(*, byzantine: int, chosen: int = 1) -> Rule:
    """The update, or the mean of the `chosen` updates, with the smallest sum of squared distances to its n − f − 2 nearest others; ties go to the first.

    Args:    byzantine: f ≥ 0, with n ≥ 2 f + 3.  chosen: m in [1, n − f]; 1 is Krum, more Multi-Krum.
    Source:  Blanchard et al. 2017, "Machine Learning with Adversaries", arXiv:1703.02757, section 4; Multi-Krum from its section 6.
    """
    if byzantine < 0 or chosen < 1:
        raise ValueError(f"byzantine={byzantine}, chosen={chosen}: expected at least 0 and at least 1")

    def choose(distances: Tensor) -> list[int]:
        number = len(distances)
        if number < 2 * byzantine + 3 or chosen > number - byzantine:
            raise ValueError(f"byzantine={byzantine}, chosen={chosen} of {number} clients: expected n >= 2 f + 3 and m <= n - f")
        scores = []
        for row in range(number):
            others = sorted(value for column, value in enumerate(distances[row].tolist()) if column != row)
            scores.append(math.fsum(others[: number - byzantine - 2]))
        return sorted(sorted(range(number), key=lambda row: (scores[row], row))[:chosen])

    return Rule("Krum", mean_in_order, choose)


def mean_in_order(values: Tensor) -> Tensor:
    """(n, b) → (b,) float64, added up row after row: a reduction's own order would depend on b."""
    total = values[0].double()
    for row in values[1:]:
        total = total + row
    return total / torch.tensor(len(values), dtype=torch.float64, device=values.device)
