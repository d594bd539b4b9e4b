"""Which cores a rank has, and which clients it gets."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from gidef import build, config
from gidef.job import _clients
from gidef.parallel import Seat, World, seated, seats
from gidef.types import Client


def told(*ranks):
    """A world whose ranks say (machine, host, cores)."""
    answers = [[machine, host, "cpu", list(cores)] for machine, host, cores in ranks]
    return SimpleNamespace(device=torch.device("cpu"), all_gather_json=lambda value: answers)


@pytest.mark.parametrize(
    ("ranks", "cores"),
    [
        ([("a", "a", range(8))], [8]),
        ([("a", "a", range(8)), ("a", "a", range(8))], [4, 4]),  # torchrun: ranks share the host's cores
        ([("a", "a", range(4)), ("a", "a", range(4, 8))], [4, 4]),  # srun --cpus-per-task=4 bound each to its own
        ([("a", "a", range(8)), ("b", "b", range(8)), ("b", "b", range(8))], [8, 4, 4]),
        ([("a", "node1", range(2)), ("a", "node2", range(2))], [1, 1]),  # two nodes that are one machine
        ([("a", "a", range(2))] * 3, [1, 1, 1]),  # never none
    ],
)
def test_ranks_that_may_use_the_same_cores_share_them(ranks, cores):
    found = seats(told(*ranks))
    assert [seat.cores for seat in found] == cores
    assert [(seat.rank, seat.host) for seat in found] == [(rank, host) for rank, (_, host, _) in enumerate(ranks)]


def test_workers_follow_the_cores_and_the_threads(monkeypatch):
    monkeypatch.setattr(sys.modules[Seat.__module__], "allowed_cores", lambda: list(range(12)))
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    world = seated(World())
    assert world.cores == 12 and seats(world)[0].host == "node7"
    for threads, workers, expected in ((1, 0, 12), (4, 0, 3), (5, 0, 2), (16, 0, 1), (1, 5, 5)):
        recipe = config.Recipe(speed=config.Speed(threads=threads, workers=workers))
        assert build.num_workers(recipe, world) == expected


def test_every_client_of_a_round_has_one_rank_and_the_largest_comes_first():
    sizes = [30, 5, 20, 10, 40, 1]
    clients = [Client(k, torch.zeros(size, 1, 1, 1, dtype=torch.uint8), torch.zeros(size, dtype=torch.int64)) for k, size in enumerate(sizes)]
    recipe = config.Recipe(data=config.Data(num_clients=6), rounds=config.Rounds(cohort_size=5))
    setting = SimpleNamespace(recipe=recipe, clients=clients)
    rounds = [build.shards(setting, 3, seed=4, round=number) for number in range(3)]
    for shards in rounds:
        assert len(shards) == 3 and len({k for one in shards for k in one}) == 5 == sum(map(len, shards))
        assert all(sizes[a] >= sizes[b] for one in shards for a, b in zip(one, one[1:], strict=False))
    assert len({str(sorted(k for one in shards for k in one)) for shards in rounds}) > 1  # cohorts are drawn anew
    assert sum(not one for one in build.shards(setting, 8, seed=4, round=0)) == 3  # more ranks than clients
    [cohort] = build.shards(setting, 1, seed=4, round=0)
    setting.recipe = config.Recipe(data=recipe.data, rounds=recipe.rounds, speed=config.Speed(clients_schedule="static"))
    [drawn] = build.shards(setting, 1, seed=4, round=0)
    assert sorted(drawn) == sorted(cohort) and build.shards(setting, 2, seed=4, round=0) == [drawn[::2], drawn[1::2]]


def test_a_ranks_clients_in_words():
    assert _clients({"clients": [], "examples": 0}) == "no client"
    assert _clients({"clients": [3], "examples": 7}) == "client 3 (7 images)"
    assert _clients({"clients": list(range(12)), "examples": 50}) == "clients 0 1 2 3 4 5 6 7 8 9 and 2 more (50 images)"
