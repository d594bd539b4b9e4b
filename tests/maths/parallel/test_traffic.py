"""Counted traffic against what ranks, here threads of one process, hand to their collectives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gidef import build, config
from gidef.parallel import mean_over_world, robust, robust_over_world, traffic
from gidef.parallel.sharded_server import Slices, sharded_step, whole
from gidef.rng import generator
from gidef.types import Client, ServerState, Update
from tests.threads import Counted, Post

TEMPLATE = {"w": torch.zeros(400, 9), "b": torch.zeros(24)}
COHORT = 12


def shared_update(client: Client, worker: int) -> Update:
    draws = generator(0, client.id)
    return Update({name: torch.randn(t.shape, generator=draws) for name, t in TEMPLATE.items()}, 1, {"loss": 0.0})


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("reduction", "aggregate"),
    [("fixed_point", config.Mean()), ("float32", config.Mean()), ("fixed_point", config.Median()), ("fixed_point", config.TrimmedMean()), ("fixed_point", config.Krum(chosen=3))],
)
def test_a_round_sends_what_was_counted(size, sharded, reduction, aggregate, monkeypatch):
    monkeypatch.setattr(robust, "BLOCK", 256)
    monkeypatch.setattr(traffic, "BLOCK", 256)
    cohort = [Client(k, torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)) for k in range(COHORT)]
    recipe = config.Recipe(
        data=config.Data(num_clients=COHORT), rounds=config.Rounds(server=config.FedAdam(), aggregate=aggregate),
        speed=config.Speed(reduction=reduction, sharded_server=sharded),
    )  # fmt: skip
    step, rule, post = build.server_step(recipe.rounds.server, num_clients=COHORT, cohort_size=COHORT), build.robust_rule(aggregate), Post(size)

    def rank(number: int) -> tuple[float, ServerState]:
        world = Counted(number, size, post)
        slices = Slices(world, TEMPLATE) if sharded else None
        over = robust_over_world(world, rule) if rule else mean_over_world(world, reduction=reduction, slices=slices)
        mean = over(shared_update, cohort, template=TEMPLATE, metric_names=["loss"])
        server = ServerState({name: torch.zeros_like(tensor) for name, tensor in TEMPLATE.items()})
        if slices is None:
            return world.sent, step(server, mean.delta)
        server = sharded_step(step, slices, sliced=rule is None)(server, mean.delta)
        return (whole(server, slices), world.sent)[1], server  # a checkpoint's

    with ThreadPoolExecutor(size) as pool:
        told = list(pool.map(rank, range(size)))
    sent, after = sum(one for one, _ in told) / size, told[0][1]
    counted = build.traffic(recipe, after, TEMPLATE).reduced(size)
    few = isinstance(aggregate, config.Krum)  # the chosen three divide by neither number of ranks
    assert 2 * (size - 1) / size * counted == pytest.approx(sent, rel=0.01 if few else 1e-9)
