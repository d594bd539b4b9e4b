"""The forecast of a round: by hand where it can be done by hand."""

from __future__ import annotations

import math

import pytest

from gidef.parallel.forecast import ALGORITHMS, Evaluation, Network, forecast, reduce_s

FLAT = Network(gpus_per_node=1, intra_gbytes=1.0, inter_gbytes=1.0, intra_us=0, inter_us=0, meet_us=0)


def test_equal_clients_that_divide_evenly_scale_ideally():
    for ranks in (1, 2, 4, 8):
        one = forecast([0.5] * 8, ranks, FLAT)
        assert one.round_s == pytest.approx(4 / ranks) == one.ideal_s and one.useful == 8
    assert forecast([0.5] * 8, 16, FLAT).round_s == 0.5  # half of the ranks have nothing to do


def test_the_longest_client_bounds_the_speed_up():
    one = forecast([3.0, 1.0, 1.0, 1.0], 4, FLAT)
    assert one.clients_s == 3.0 and one.useful == 2.0 and one.ideal_s == 1.5


def test_a_ring_moves_twice_the_message_but_a_share_and_waits_for_the_slowest_link():
    network = Network(gpus_per_node=4, intra_gbytes=100, inter_gbytes=10, intra_us=1, inter_us=20, algorithm="ring")
    assert reduce_s(network, 1e9, 1) == 0
    assert reduce_s(network, 1e9, 4) == pytest.approx(2 * 3 / 4 * 1e9 / 100e9 + 6e-6)
    assert reduce_s(network, 1e9, 8) == pytest.approx(2 * 7 / 8 * 1e9 / 10e9 + 14 * 20e-6)


def test_two_hosts_of_one_gpu_move_the_message_once_each_way_in_every_ring():
    for algorithm in ("ring", "hierarchical"):
        network = Network(gpus_per_node=1, inter_gbytes=0.01, intra_us=0, inter_us=0, algorithm=algorithm)
        assert reduce_s(network, 1e6, 2) == pytest.approx(0.1)


def test_a_hierarchy_pays_the_network_once_per_node_and_a_tree_grows_with_the_logarithm():
    network = Network(gpus_per_node=8, intra_gbytes=300, inter_gbytes=20, intra_us=5, inter_us=15)
    nodes = 512
    by_hand = 14 * 5e-6 + 2 * 7 / 8 * 90e6 / 300e9 + 2 * (nodes - 1) * 15e-6 + 2 * (nodes - 1) / nodes * 90e6 / 20e9
    assert reduce_s(network, 90e6, 4096) == pytest.approx(by_hand)
    tree = Network(gpus_per_node=8, intra_us=5, inter_us=15, algorithm="tree")
    assert reduce_s(tree, 0.0, 4096) == pytest.approx(2 * (3 * 5e-6 + 9 * 15e-6))
    with pytest.raises(ValueError, match="ring, tree, hierarchical"):
        reduce_s(Network(algorithm="star"), 1.0, 2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_more_bytes_never_cost_less_and_one_rank_pays_nothing(algorithm):
    network = Network(algorithm=algorithm)
    for ranks in (1, 2, 8, 9, 64, 4096):
        times = [reduce_s(network, message, ranks) for message in (0.0, 1e3, 1e6, 1e9)]
        assert times == sorted(times) and (ranks > 1 or times == [0.0] * 4)


def test_what_the_planner_does_not_see_makes_rounds_longer_and_the_same_seed_the_same():
    times = [1.0] * 64
    calm, wild = forecast(times, 8, FLAT), forecast(times, 8, FLAT, spread=0.5, rounds=200)
    assert calm.round_s == 8.0 and wild.round_s > 9.0
    assert wild.ideal_s == pytest.approx(8.0, rel=0.03)  # the factor's mean is one
    assert forecast(times, 8, FLAT, spread=0.5) == forecast(times, 8, FLAT, spread=0.5)


def test_a_cohort_is_drawn_of_the_clients_and_the_rest_and_roll_calls_are_added():
    one = forecast([1.0, 2.0, 3.0], 1, FLAT, cohort=2, rounds=4000)
    assert one.clients_s == pytest.approx(4.0, rel=0.02)
    assert forecast([1.0], 2, FLAT, cohort=10).clients_s == 5.0  # a larger federation of the same kind
    network = Network(gpus_per_node=1, intra_us=0, inter_us=0, meet_us=100)
    more = forecast([1.0] * 4, 4, network, rest_s=0.25, collectives=3)
    assert more.round_s == pytest.approx(1.25 + 3 * 4 * 100e-6)
    for wrong in ([], [0.0], [math.nan]):
        with pytest.raises(ValueError, match="client times"):
            forecast(wrong, 1, FLAT)


def test_rank_0_saves_while_the_others_train_and_ranks_share_the_chunks_of_an_evaluation():
    assert forecast([1.0] * 4, 2, FLAT, save_s=0.3).round_s == pytest.approx(2.3)  # as busy as the other, and saving
    assert forecast([1.0, 4.0], 2, FLAT, save_s=0.3).round_s == pytest.approx(4.3)  # the planner gives rank 0 the longest
    uneven = forecast([3.0, 2.0, 2.0], 2, FLAT, save_s=0.3)  # rank 0 has 3, rank 1 has 4
    assert uneven.save_s == 0 and uneven.round_s == 4.0 and forecast([3.0, 2.0, 2.0], 2, FLAT, save_s=1.5).save_s == pytest.approx(0.5)
    evaluation = Evaluation(seconds=0.6, models=1, chunks=3)
    assert [forecast([1.0], ranks, FLAT, evaluation=evaluation).evaluate_s for ranks in (1, 2, 3, 4)] == pytest.approx([0.6, 0.4, 0.2, 0.2])
    beside = Evaluation(seconds=6.0, models=1, chunks=3, overlapped=True)
    hidden = [forecast([1.0] * 4, ranks, FLAT, evaluation=beside, rest_s=0.5, save_s=0.25) for ranks in (1, 2, 3, 4)]
    assert [one.evaluate_s for one in hidden] == pytest.approx([6 - 4.5, 4 - 2.5, 0.0, 2 - 1.5])  # beyond clients and rest; saving comes after it
    assert hidden[0].round_s == pytest.approx(6.25) and hidden[2].round_s == pytest.approx(2.5 + hidden[2].save_s)
    network = Network(gpus_per_node=1, inter_gbytes=0.01, inter_us=1000, algorithm="ring", meet_us=100)
    sent = forecast([1.0], 2, network, evaluation=Evaluation(seconds=0.0, models=3, bytes=1e5))
    assert sent.evaluate_s == pytest.approx(3 * (0.002 + 0.01)) and sent.meet_s == pytest.approx(5 * 2 * 100e-6 + 0.002)
