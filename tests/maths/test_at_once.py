"""How many clients train as one program: asked for, calibrated, remembered. No clock: the measurements are made up."""

import json
import math

import pytest
import torch

from gidef import at_once
from gidef.parallel import World
from gidef.types import Client, ServerState


def cohort(*sizes):
    return [Client(k, torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.long)) for k, n in enumerate(sizes)]


def measured(by_size, asked=None):
    def measure(groups):
        if asked is not None:
            asked.append([len(group) for group in groups])
        return by_size[len(groups[0])]

    return measure


def test_the_fastest_size_is_chosen_and_the_search_ends_where_sizes_stop_helping():
    asked = []
    times = {1: 1.0, 2: 0.8, 4: 0.6, 8: 1.1, 16: 0.1, 32: 0.1}
    assert at_once.calibrate(measured(times, asked), cohort(*[5] * 40), slots=1, budget_s=math.inf) == (4, {1: 1.0, 2: 0.8, 4: 0.6, 8: 1.1})
    assert asked == [[1, 1, 1, 1], [2], [4], [8]]


def test_two_at_once_may_be_slower_than_the_loop_where_more_are_not():
    found = at_once.calibrate(measured({1: 1.0, 2: 1.3, 4: 0.7, 8: 0.8}), cohort(*[5] * 16), slots=1, budget_s=math.inf)
    assert found == (4, {1: 1.0, 2: 1.3, 4: 0.7, 8: 0.8})


@pytest.mark.parametrize("times", [{1: 1.0, 2: 2.1}, {1: 1.0, 2: 1.2, 4: 1.3}, {1: 1.0, 2: 0.97, 4: 0.99, 8: 1.1}])
def test_the_loop_stays_unless_a_program_is_clearly_faster(times):
    assert at_once.calibrate(measured(times), cohort(*[5] * 16), slots=1, budget_s=math.inf)[0] == 1


def test_a_size_that_leaves_workers_idle_is_not_chosen():
    times = {1: 1.0, 2: 0.9, 4: 0.8, 8: 0.7}
    assert at_once.calibrate(measured(times), cohort(*[5] * 8), slots=1, budget_s=math.inf)[0] == 8
    assert at_once.calibrate(measured(times), cohort(*[5] * 8), slots=2, budget_s=math.inf)[0] == 4
    assert at_once.calibrate(measured(times), cohort(*[5] * 8), slots=8, budget_s=math.inf)[0] == 1


def test_no_size_beyond_the_cohort_or_the_budget_is_tried():
    times = {1: 1.0, 2: 0.5, 4: 0.25, 8: 0.125}
    assert at_once.calibrate(measured(times), cohort(5, 5, 5), slots=1, budget_s=math.inf)[1].keys() == {1, 2}
    budget = 1.0 * 2 * at_once.STEPS * (at_once.REPETITIONS + 1) + 1.0  # of sizes 2 and 4, which begin at the same cost
    assert at_once.calibrate(measured(dict.fromkeys(times, 1.0)), cohort(*[5] * 8), slots=1, budget_s=budget)[1].keys() == {1, 2}


class Fake:
    """Stands for a Participation."""

    moves_statistics = False

    def __init__(self, fails=None, can_vectorise=True):
        self.fails, self.can_vectorise, self.players, self.seen = fails, can_vectorise, [object()], []

    def rehearse(self, server, clients, steps):
        self.seen.append(len(clients))
        if self.fails and len(clients) > 1:
            raise self.fails
        return steps * len(clients)


def choose(asked, fake, path, name="learned"):
    return at_once.choose(asked, fake, ServerState({}), cohort(5, 6, 7, 8), world=World(), slots=1, path=path, name=name)


def test_the_loop_asks_nothing_and_writes_nothing(tmp_path):
    fake, path = Fake(), tmp_path / "clients.json"
    assert choose(1, fake, path) == at_once.Choice(1) and not fake.seen and not path.exists()


def test_what_was_chosen_is_written_and_chosen_again(tmp_path):
    path, fake = tmp_path / "run" / "clients.json", Fake()
    assert choose(4, fake, path) == at_once.Choice(4) and fake.seen == [4]
    assert json.loads(path.read_text())["learned"]["at_once"] == 4
    assert choose(0, fake, path).at_once == 4 and fake.seen == [4]
    other = choose(0, fake, path, name="undefended")
    assert set(other.milliseconds) >= {1, 2} and set(json.loads(path.read_text())) == {"learned", "undefended"}
    assert choose(0, fake, path, name="undefended") == other


@pytest.mark.parametrize("asked", [0, 4])
def test_a_program_that_cannot_be_leaves_the_loop_with_a_reason(asked, tmp_path):
    stuck = choose(asked, Fake(fails=NotImplementedError("no batching rule\nmore")), tmp_path / "a.json")
    assert stuck == at_once.Choice(1, reason="NotImplementedError: no batching rule")
    assert choose(asked, Fake(can_vectorise=False), tmp_path / "b.json") == at_once.Choice(1, reason="object cannot be stacked")
