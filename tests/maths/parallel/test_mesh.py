"""How groups of ranks share out a cohort. What their clients learn is in tests/ranks/test_shards.py."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

from gidef.parallel import Costs, mean_over_mesh
from gidef.types import Client, Update
from tests.threads import Counted, Post

TEMPLATE = {"w": torch.zeros(3)}


def test_groups_deal_by_the_seconds_that_clients_took_which_all_ranks_know_alike():
    columns, shards = [Post(2), Post(2)], [Post(2), Post(2)]
    cohort = [Client(k, torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.long)) for k, n in enumerate((4, 3, 2, 2))]
    trained: dict[tuple[int, int], list[list[int]]] = {}

    def rank(number: int) -> tuple[dict, list]:
        group, place = divmod(number, 2)
        mesh = SimpleNamespace(clients=Counted(group, 2, columns[place]), shard=Counted(place, 2, shards[group]))
        costs, means = Costs(), []
        over = mean_over_mesh(mesh, costs=costs, learn=costs.learn)
        rounds = trained[group, place] = []

        def update(client: Client, worker: int) -> Update:
            rounds[-1].append(client.id)
            time.sleep(0.3 if client.id == 3 else 0.02 * place)  # few images, and slow; and ranks of a group differ
            return Update({"w": torch.full((3,), float(client.id))}, client.num_examples, {"loss": 0.0})

        for _ in range(2):
            rounds.append([])
            means.append(over(update, cohort, template=TEMPLATE, metric_names=["loss"]))
        assert all(torch.equal(mean.delta["w"], torch.full((3,), (3 + 4 + 6) / 11)) for mean in means)
        return costs.state(), [mean.seconds for mean in means]

    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(rank, range(4)))
    assert all(one == told[0] for one in told)
    by_examples, by_seconds = [[0, 3], [1, 2]], [[3], [0, 1, 2]]
    for place in (0, 1):
        assert [sorted(trained[group, place][0]) for group in (0, 1)] == by_examples
        assert [sorted(trained[group, place][1]) for group in (0, 1)] == by_seconds
