"""Which rank does what."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def longest_first(costs: Sequence[float], num_bins: int) -> list[list[int]]:
    """Spread items over bins: the costliest first, each to the bin with the least work so far.

    The fullest bin holds at most 4/3 − 1/(3·num_bins) of the best possible (Graham 1969, "Bounds on multiprocessing
    timing anomalies"). Ties go to the lower index and the lower bin, so equal costs give equal plans everywhere.

    Args:    costs: at least 0, one per item, any unit.  num_bins: at least 1.
    Returns: num_bins lists of item indices, each from costly to cheap; together every index once.
    Raises:  ValueError for a negative or NaN cost, or no bin.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}: at least one is needed")
    if not all(cost >= 0 for cost in costs):
        raise ValueError("every cost must be at least 0, and not NaN")
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0.0, index) for index in range(num_bins)]
    for item in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, index = heapq.heappop(loads)
        bins[index].append(item)
        heapq.heappush(loads, (load + costs[item], index))
    return bins
