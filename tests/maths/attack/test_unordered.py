"""Labels of a delta of several local batches whose order nobody granted: the attack searches it."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from gidef.attack import drain, naive
from gidef.attack.batch import orders
from gidef.attack.engine import plan, run, run_chunk
from gidef.attack.lbfgs import Lbfgs
from gidef.attack.matching import EXCHANGES, Unordered
from gidef.attack.simulate import cohort_mean, local_sgd
from gidef.errors import InputError
from gidef.types import Observation

DOUBLE = {"seed": 3, "dtype": torch.float64}
TRUE = [2, 0, 1]


@pytest.fixture
def case(tiny):
    """One delta of three local steps, an image each, of labels 2, 0, 1 in this order; its simulator, settings, and the
    images in the order of their labels."""
    model = tiny.Net()
    simulate, params = local_sgd(tiny.simulator(model), steps=3, lr=1.0), tiny.weights(model)
    _, images, _ = tiny.observe(tiny.simulator(model), params, size=3, seed=1)
    matching = naive(iterations=80, tv=0.0, unordered=Unordered(batches=3), **tiny.settings)
    rows = images[torch.tensor(TRUE).argsort()].float()
    update = simulate(params, {}, rows.double()[TRUE], F.one_hot(torch.tensor(TRUE), tiny.classes).double(), None)
    return Observation(params, update, 3, kind="delta", labels=torch.tensor(TRUE).sort().values), simulate, matching, rows


def test_the_right_order_is_found_which_alone_explains_the_delta(case):
    observation, simulate, matching, _ = case
    ordered = [dataclasses.replace(observation, labels=torch.tensor(order)) for order in itertools.permutations(range(3))]
    each = run(ordered, lambda: simulate, dataclasses.replace(matching, unordered=None), at_once=6, **DOUBLE)
    losses = {tuple(one.labels.tolist()): one.loss for one in each}
    right = losses.pop(tuple(TRUE))
    assert min(losses.values()) > 2.5 * right, "a known answer: no other order gets near"
    found = drain(run_chunk(((0, 0), (0, 1), (0, 2)), [observation], simulate, dataclasses.replace(matching, restarts=3), **DOUBLE))
    best = int(found["loss"].argmin())
    assert found["loss"][best] < 0.5 * min(losses.values())
    assert found["labels"][best][found["order"][best]].tolist() == TRUE and found["labels"][best].tolist() == sorted(TRUE)


@pytest.mark.parametrize(("change", "least"), [({}, 0.05), ({"optimiser": Lbfgs(max_evaluations=4), "kink_width": None, "decay": "constant"}, 0.7)])
def test_exchanges_alone_mend_a_wrong_order(case, change, least):
    """Begun at the true images in the order of their labels; the right order needs two exchanges."""
    observation, simulate, matching, rows = case
    matching = dataclasses.replace(matching, iterations=24, lr=1e-3, start=lambda o, s: (rows, None), **change)
    stuck, freed = (
        drain(run_chunk(((0, 0),), [observation], simulate, one, **DOUBLE)) for one in (dataclasses.replace(matching, unordered=None), matching)
    )
    assert freed["labels"][0][freed["order"][0]].tolist() == TRUE and "order" not in stuck
    assert freed["loss"] < least * stuck["loss"]


def test_at_the_truth_in_the_right_order_it_stays_and_its_order_goes_with_it(case):
    observation, simulate, matching, rows = case
    order = torch.tensor(TRUE)
    unordered = Unordered(batches=3, first=lambda observation, start: order)
    settings = dataclasses.replace(matching, unordered=unordered, start=lambda o, s: (rows, None), iterations=8)
    found = drain(run_chunk(((0, 0),), [observation], simulate, settings, **DOUBLE))
    assert found["first_fit"] < 1e-10 and torch.equal(found["order"][0], order) and torch.equal(found["images"][0], rows)


def test_orders_are_the_same_in_every_mode_and_however_attacks_are_cut(case):
    observation, simulate, matching, _ = case
    seen, settings = [observation] * 2, dataclasses.replace(matching, iterations=8, restarts=2, halving=2)
    reference = drain(run_chunk(plan(2, 2, 4)[0], seen, simulate, settings, **DOUBLE))
    for mode, width in (("loop", 2), ("traced", 4)):
        parts = [drain(run_chunk(chunk, seen, simulate, settings, mode=mode, **DOUBLE)) for chunk in plan(2, 2, width)]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        assert torch.equal(joined["order"], reference["order"])
        torch.testing.assert_close(joined["losses"], reference["losses"], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_noise_moves_with_its_image(tiny):
    """Two clients of two steps of two images, two rounds, noise of two epochs: the simulated sum against a loop that looks each image up."""
    clients, steps, size, rounds, draws = 2, 2, 2, 2, 2
    count, draw = clients * steps * size, torch.Generator().manual_seed(0)
    images = torch.rand(1, count, *tiny.shape, generator=draw)
    noise = torch.randn(1, rounds, draws * steps, clients * size, *tiny.latent, generator=draw)
    order = torch.randperm(count, generator=draw)[None]
    unordered = Unordered(batches=steps, clients=clients, latent_dims=len(tiny.latent))
    placed = unordered.placed({"images": images, "noise": noise, "alpha": order}, order)
    assert placed["alpha"] is order

    def where(row):
        """(client, step, number in the batch) of a row of images."""
        return row // (steps * size), row // size % steps, row % size

    for place, row in enumerate(order[0].tolist()):
        (k, t, j), (from_k, from_t, from_j) = where(place), where(row)
        assert torch.equal(placed["images"][0, place], images[0, row])
        for epoch in range(draws):
            assert torch.equal(placed["noise"][0, :, epoch * steps + t, k * size + j], noise[0, :, epoch * steps + from_t, from_k * size + from_j])
    back = unordered.returned(placed, order)
    assert torch.equal(back["images"], images) and torch.equal(back["noise"], noise)


def test_exchanging_within_a_batch_changes_nothing_and_between_batches_does(tiny):
    """So an image and its noise stay together in the simulator of a sum over clients."""
    model = tiny.Net(sigma=0.3)
    simulate, params = cohort_mean(local_sgd(tiny.simulator(model), steps=2, lr=0.5), 2, stepped=True), tiny.weights(model)
    draw = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(1, *shape, generator=draw, dtype=torch.float64) for shape in ((8, *tiny.shape), (2, 4, *tiny.latent)))
    labels, unordered = F.one_hot(torch.arange(8) % tiny.classes, tiny.classes).double(), Unordered(batches=2, clients=2)

    def update(order):
        placed = unordered.placed({"images": images, "noise": noise}, torch.tensor([order]))
        return torch.cat([t.flatten() for t in simulate(params, {}, placed["images"][0], labels[order], placed["noise"][0]).values()])

    plain = update([0, 1, 2, 3, 4, 5, 6, 7])
    torch.testing.assert_close(update([1, 0, 2, 3, 4, 5, 7, 6]), plain)
    torch.testing.assert_close(update([4, 5, 6, 7, 0, 1, 2, 3]), plain)
    assert (update([2, 1, 0, 3, 4, 5, 6, 7]) - plain).abs().max() > 1e-4


def test_restarts_begin_with_different_deals_and_every_pair_of_different_labels_has_its_turn(tiny):
    matching = naive(iterations=10 * EXCHANGES, restarts=4, unordered=Unordered(batches=2), **tiny.settings)
    targets = F.one_hot(torch.tensor([[0, 0, 1, 2]] * 4), 3).double()
    first, exchanges = orders(tuple((5, start) for start in range(4)), targets, matching, 3)
    assert first[0].tolist() == [0, 1, 2, 3] and (first.sort(1).values == torch.arange(4)).all()
    deals = {tuple(torch.tensor([0, 0, 1, 2])[one].view(2, 2).sort(1).values.flatten().tolist()) for one in first}
    assert len(deals) == 4  # 00|12, 12|00, 01|02, 02|01
    for row in range(4):
        assert {tuple(pair) for pair in exchanges[:5, row].tolist()} == {(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}
    alone, turns = orders(((5, 2),), targets[:1], matching, 3)
    assert torch.equal(alone[0], first[2]) and torch.equal(turns[:, 0], exchanges[:, 2])
    _, idle = orders(((5, 0),), F.one_hot(torch.ones(1, 4, dtype=torch.int64), 3).double(), matching, 3)
    assert not idle.any()


def test_what_does_not_fit_is_refused(case, tiny):
    observation, simulate, matching, _ = case
    with pytest.raises(InputError, match="batches=1 of unordered"):
        Unordered(batches=1)
    with pytest.raises(InputError, match="search_labels and unordered"):
        naive(search_labels=True, unordered=Unordered(batches=2), **tiny.settings)
    with pytest.raises(InputError, match="3 images do not divide into 2"):
        drain(run_chunk(((0, 0),), [observation], simulate, dataclasses.replace(matching, unordered=Unordered(batches=2)), **DOUBLE))


OF_COHORT = torch.tensor([0, 2, 1, 1])
"""Labels of two clients, two images each."""


@pytest.fixture
def cohort(tiny):
    """The sum of two clients' three epochs of one step over their two images; its simulator, settings, the images in the order of their labels, and the order
    in which these stand client after client."""
    model = tiny.Net()
    simulate, params = cohort_mean(local_sgd(tiny.simulator(model), steps=3, epochs=3, lr=1.0), 2, stepped=True), tiny.weights(model)
    _, images, _ = tiny.observe(tiny.simulator(model), params, size=4, seed=1)
    update = simulate(params, {}, images, F.one_hot(OF_COHORT, tiny.classes).double(), None)
    matching = naive(iterations=80, tv=0.0, unordered=Unordered(batches=1, clients=2), **tiny.settings)
    by_label = OF_COHORT.argsort(stable=True)
    return Observation(params, update, 4, kind="delta", labels=OF_COHORT[by_label]), simulate, matching, images[by_label].float(), by_label.argsort()


def of_clients(labels, order):
    """Each client's labels, in an order that clients have in common."""
    return sorted(sorted(one) for one in labels[order].view(2, 2).tolist())


def test_whose_images_have_which_label_is_found_which_alone_explains_the_sum(cohort):
    """Every start is grey, so that only the deals differ."""
    observation, simulate, matching, _, _ = cohort
    matching = dataclasses.replace(matching, iterations=24, start="grey", restarts=3)
    deals = [dataclasses.replace(observation, labels=torch.tensor(labels)) for labels in ([0, 2, 1, 1], [0, 1, 1, 2])]
    right, wrong = (one.loss for one in run(deals, lambda: simulate, dataclasses.replace(matching, unordered=None, restarts=1), at_once=2, **DOUBLE))
    assert right < 0.7 * wrong, "a known answer: there are these two, and the sorted one gets nowhere near"
    found = drain(run_chunk(((0, 0), (0, 1), (0, 2)), [observation], simulate, matching, **DOUBLE))
    best = int(found["loss"].argmin())
    assert float(found["loss"][best]) == pytest.approx(right, rel=1e-4)
    assert of_clients(found["labels"][best], found["order"][best]) == [[0, 2], [1, 1]] and found["labels"][best].tolist() == [0, 1, 1, 2]


def test_exchanges_between_clients_mend_a_wrong_deal_and_at_the_truth_it_stays(cohort):
    observation, simulate, matching, rows, order = cohort
    begun = dataclasses.replace(matching, iterations=24, lr=1e-3, start=lambda o, s: (rows, None))
    stuck, freed = (drain(run_chunk(((0, 0),), [observation], simulate, one, **DOUBLE)) for one in (dataclasses.replace(begun, unordered=None), begun))
    assert of_clients(freed["labels"][0], freed["order"][0]) == [[0, 2], [1, 1]] and freed["loss"] < 0.1 * stuck["loss"]
    settings = dataclasses.replace(begun, iterations=8, unordered=dataclasses.replace(matching.unordered, first=lambda observation, start: order))
    found = drain(run_chunk(((0, 0),), [observation], simulate, settings, **DOUBLE))
    assert found["first_fit"] < 1e-10 and torch.equal(found["order"][0], order) and torch.equal(found["images"][0], rows)


def test_noise_of_a_gradient_moves_between_clients_with_its_image(tiny):
    draw = torch.Generator().manual_seed(0)
    images, noise = torch.rand(1, 6, *tiny.shape, generator=draw), torch.randn(1, 2, 6, *tiny.latent, generator=draw)
    order, unordered = torch.randperm(6, generator=draw)[None], Unordered(batches=1, clients=3, latent_dims=len(tiny.latent))
    placed = unordered.placed({"images": images, "noise": noise}, order)
    assert torch.equal(placed["images"][0], images[0, order[0]]) and torch.equal(placed["noise"][0], noise[0][:, order[0]])
    back = unordered.returned(placed, order)
    assert torch.equal(back["images"], images) and torch.equal(back["noise"], noise)


@pytest.mark.parametrize("iterations", [3, 4, 11, 12])
def test_evaluations_are_counted_with_those_of_exchanged_rows(case, iterations):
    observation, simulate, matching, _ = case
    calls = []

    def counted(*given):
        calls.append(1)
        return simulate(*given)

    for settings in (matching, dataclasses.replace(matching, unordered=None)):
        settings, made = dataclasses.replace(settings, iterations=iterations), []
        for one in (settings, dataclasses.replace(settings, iterations=0)):  # what is looked at before the first evaluation is in both
            calls.clear()
            drain(run_chunk(((0, 0),), [observation], counted, one, mode="loop", **DOUBLE))
            made.append(len(calls))
        assert settings.evaluations() == made[0] - made[1] + 1
        assert settings.evaluations() == sum(settings.evaluations(first, min(first + 5, iterations)) for first in range(0, iterations, 5))
