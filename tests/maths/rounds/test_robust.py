"""Robust rules against plain NumPy and SciPy, and what they are for: a client that lies."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean

from gidef.build import robust_rule
from gidef.config import DPSGD, Data, Dirichlet, Krum, Mean, Median, Recipe, Rounds, Scaffold, SingleGradient, Speed, TrimmedMean, problems
from gidef.errors import Diverged, InputError
from gidef.parallel import World, robust, robust_over_world
from gidef.rng import generator
from gidef.rounds.robust import krum, mean_in_order, median, trimmed, trimmed_mean
from gidef.rounds.server import fed_avg
from gidef.types import Client, ServerState, Update
from gidef.updates import mean_over


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(robust, "BLOCK", 64)


DRAWS = np.random.default_rng(0)


def values(count, width=50):
    return DRAWS.normal(size=(count, width)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_median_is_numpys(count):
    x = values(count)
    assert np.array_equal(median().combine(torch.from_numpy(x)).numpy(), np.median(x.astype(np.float64), axis=0))


@pytest.mark.parametrize(("count", "share", "cut"), [(10, 0.2, 2), (7, 0.1, 1), (5, 0.0, 0), (9, 0.34, 4), (3, 1 / 3, 1), (10, 0.3, 3)])
def test_the_trimmed_mean_is_scipys_with_its_share_rounded_up(count, share, cut):
    x = values(count)
    assert trimmed(share, count) == cut
    expected = trim_mean(x.astype(np.float64), cut / count + 1e-9, axis=0)
    np.testing.assert_allclose(trimmed_mean(share=share).combine(torch.from_numpy(x)).numpy(), expected, rtol=1e-14, atol=1e-16)


def by_hand(x, byzantine, chosen):
    """Krum as the paper says it, over all subsets of neighbours."""
    scores = []
    for i in range(len(x)):
        squared = [float(((x[i].astype(np.float64) - x[j]) ** 2).sum()) for j in range(len(x)) if j != i]
        scores.append(min(sum(subset) for subset in itertools.combinations(squared, len(x) - byzantine - 2)))
    return sorted(np.argsort(scores, kind="stable")[:chosen].tolist())


@pytest.mark.parametrize(("count", "byzantine", "chosen"), [(3, 0, 1), (5, 1, 1), (7, 2, 1), (7, 1, 4), (8, 2, 6)])
def test_krum_chooses_as_its_definition(count, byzantine, chosen):
    x = values(count)
    distances = torch.tensor([[((a.astype(np.float64) - b) ** 2).sum() for b in x] for a in x])
    assert krum(byzantine=byzantine, chosen=chosen).choose(distances) == by_hand(x, byzantine, chosen)


def test_a_mean_in_order_has_the_bits_of_each_coordinate_alone():
    x = torch.from_numpy(values(9, 1001)) * 10.0 ** torch.arange(9)[:, None]
    assert torch.equal(mean_in_order(x), torch.cat([mean_in_order(x[:, k : k + 1]) for k in range(1001)]))


def test_sums_of_distances_do_not_depend_on_their_order_and_infinities_are_kept_apart():
    x = torch.from_numpy(DRAWS.normal(size=200) ** 2 * 10.0 ** DRAWS.integers(-25, 25, 200))
    limbs = robust._limbs(x)
    total = robust._value(limbs.sum(0))
    assert float(total) == float(robust._value(limbs.flip(0).sum(0))) == pytest.approx(float(x.sum()), rel=1e-12)
    assert float(robust._value(robust._limbs(torch.tensor(1e-20, dtype=torch.float64)))) == pytest.approx(1e-20, rel=1e-12)
    for bad in (float("inf"), float("nan"), 1e300):
        assert float(robust._value(robust._limbs(torch.tensor([1.0, bad], dtype=torch.float64)).sum(0))) == float("inf")


def test_distances_are_those_of_numpy():
    x = values(4, 50)
    expected = [[((a.astype(np.float64) - b) ** 2).sum() for b in x] for a in x]
    np.testing.assert_allclose(robust._distances(torch.from_numpy(x)).numpy(), expected, rtol=1e-13)


TEMPLATE = {"w": torch.zeros(30, 3), "b": torch.zeros(5, dtype=torch.float64)}


def clients(count=7):
    return [Client(k, torch.zeros(k + 1, 1, 1, 1, dtype=torch.uint8), torch.zeros(k + 1, dtype=torch.long)) for k in range(count)]


def honest(client, worker):
    draws = generator(0, client.id)
    return Update({name: 1 + 0.1 * torch.randn(t.shape, generator=draws, dtype=t.dtype) for name, t in TEMPLATE.items()}, client.num_examples, {"loss": 2.0})


RULES = {"median": Median(), "trimmed": TrimmedMean(share=0.2), "krum": Krum(), "multi": Krum(byzantine=2, chosen=3)}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("lie", [1e6, -1e6, float("nan"), float("inf")])
def test_a_client_that_lies_breaks_the_mean_and_not_these(name, lie):
    def one_lies(client, worker):
        update = honest(client, worker)
        return update if client.id != 2 else Update({n: t * lie for n, t in update.delta.items()}, update.num_examples, update.metrics)

    found = robust_over_world(World(), robust_rule(RULES[name]))(one_lies, clients(), template=TEMPLATE, metric_names=["loss"])
    assert all(t.dtype == TEMPLATE[n].dtype and t.shape == TEMPLATE[n].shape and (t - 1).abs().max() < 0.5 for n, t in found.delta.items())
    assert (found.num_examples, found.metrics, found.count) == (28, {"loss": 2.0}, 7)
    try:
        spoilt = mean_over(one_lies, clients(), template=TEMPLATE, metric_names=["loss"]).delta["w"]
    except InputError:
        assert not np.isfinite(lie)  # refused: training would stop
    else:
        assert spoilt.abs().min() > 1e4


def test_lies_of_more_clients_than_a_rule_can_pass_over_are_an_error():
    def most_lie(client, worker):
        update = honest(client, worker)
        return update if client.id < 3 else Update({n: t * float("nan") for n, t in update.delta.items()}, update.num_examples, update.metrics)

    with pytest.raises(Diverged, match="the median of the cohort's updates is not finite"):
        robust_over_world(World(), median())(most_lie, clients(), template=TEMPLATE, metric_names=["loss"])


def test_rounds_with_a_liar_reach_the_honest_clients_optimum_by_the_median_alone():
    goals = [torch.tensor([1.0, -2.0]) + 0.01 * k for k in range(-3, 4)]

    def train(server):
        def update(client, worker):
            step = 0.5 * (goals[client.id] - server.params["w"])
            return Update({"w": -20 * step if client.id == 6 else step}, client.num_examples, {})

        return update

    found = {}
    for name, over in (("mean", mean_over), ("median", robust_over_world(World(), median()))):
        server = ServerState({"w": torch.zeros(2)})
        for _ in range(8):
            server = fed_avg()(server, over(train(server), clients(), template=server.params).delta)
        found[name] = float((server.params["w"] - goals[3]).norm())
    assert found["median"] < 0.05 and found["mean"] > 1e3


def test_what_makes_no_sense_together_is_refused_with_the_reason():
    def said(**changes):
        rounds = {key: changes.pop(key) for key in ("aggregate", "server", "cohort_size") if key in changes}
        return "\n".join(problems(Recipe(rounds=Rounds(**rounds), **changes)))

    assert "adds nothing up" in said(aggregate=Median(), speed=Speed(reduction="float32"))
    assert "whole of Scaffold's control" in said(server=Scaffold(), clients=SingleGradient(), speed=Speed(sharded_server=True))
    for rule in (Median(), TrimmedMean(), Krum(), Krum(byzantine=3, chosen=7), Mean()):
        assert not said(aggregate=rule)
    assert "control variate" in said(aggregate=Median(), server=Scaffold(), clients=SingleGradient())
    assert "for their mean" in said(aggregate=Krum(), defences={"dp": DPSGD(level="client", noise_multiplier=1.0, target_epsilon=None)})
    assert "for their mean" not in said(aggregate=Krum(), defences={"dp": DPSGD(level="sample", noise_multiplier=1.0, target_epsilon=None)})
    assert "leaves no client" in said(aggregate=TrimmedMean(share=0.4), cohort_size=2)
    assert "negative" in said(aggregate=TrimmedMean(share=-0.1)) and "leaves no client" in said(aggregate=TrimmedMean(share=0.5))
    assert "cohort of 11 or more" in said(aggregate=Krum(byzantine=4))
    assert "give at most 9" in said(aggregate=Krum(chosen=10), data=Data(partition=Dirichlet()))
