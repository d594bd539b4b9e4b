"""Longest first over bins."""

import itertools
import random

import pytest

from gidef.parallel.plan import longest_first


def test_every_item_lands_once_and_each_bin_goes_from_costly_to_cheap() -> None:
    draw = random.Random(0)
    for num_items, num_bins in itertools.product((0, 1, 2, 7, 40), (1, 2, 3, 8)):
        costs = [draw.paretovariate(1.2) for _ in range(num_items)]
        bins = longest_first(costs, num_bins)
        assert len(bins) == num_bins and sorted(itertools.chain(*bins)) == list(range(num_items))
        assert all([costs[item] for item in one] == sorted((costs[item] for item in one), reverse=True) for one in bins)
        assert bins == longest_first(list(costs), num_bins)


def test_the_fullest_bin_stays_within_graham_s_bound_of_the_best_plan() -> None:
    draw = random.Random(1)
    for num_bins in (2, 3):
        for _ in range(20):
            costs = [draw.randint(1, 20) for _ in range(7)]
            plans = itertools.product(range(num_bins), repeat=7)
            best = min(max(sum(c for c, b in zip(costs, plan, strict=True) if b == one) for one in range(num_bins)) for plan in plans)
            fullest = max(sum(costs[item] for item in one) for one in longest_first(costs, num_bins))
            assert fullest <= best * (4 / 3 - 1 / (3 * num_bins)) + 1e-9


def test_ties_go_to_the_lower_index_and_the_lower_bin() -> None:
    assert longest_first([1, 1, 1, 1, 1], 2) == [[0, 2, 4], [1, 3]]
    assert longest_first([0, 0], 3) == [[0, 1], [], []]


@pytest.mark.parametrize(("costs", "bins"), [([1.0], 0), ([-1.0], 1), ([float("nan")], 1)])
def test_bad_costs_and_no_bin_are_refused(costs: list[float], bins: int) -> None:
    with pytest.raises(ValueError, match=r"num_bins=0|at least 0"):
        longest_first(costs, bins)
