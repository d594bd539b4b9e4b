"""Between two reports the host asks the device for nothing: no value is read, and no shape depends on one."""

import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad
from torch.utils._python_dispatch import TorchDispatchMode

from gidef.attack import (
    Matching,
    Searched,
    averaged,
    deep_leakage,
    gradinversion,
    inverting_gradients,
    joint,
    modern_inverting_gradients,
    naive,
    run_chunk,
)
from gidef.attack.large import invert_large
from gidef.attack.lbfgs import Lbfgs
from gidef.attack.optimisers import Adam
from gidef.attack.simulate import DRAWS

ASKING = ("_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "bincount", "repeat_interleave")
EVERY, ITERATIONS = 4, 9
REPORTED = {0: 3, 4: 3, 8: 3, 9: 3}  # iterations → what a report may read: failures, the mean loss, and whether patience is over


class Heard(TorchDispatchMode):
    """Notes what makes the host wait for a device, and after how many steps of the optimiser."""

    def __init__(self):
        super().__init__()
        self.steps, self.asked = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        of_numbers = name == "lift_fresh" and args[0].ndim > 0  # of Python's numbers, also a list of indices: made on the host, and a device's copy waits
        if name in ASKING or by_mask or of_numbers:
            self.asked.append((self.steps, name))
        return function(*args, **(kwargs or {}))


class Counted:
    """An optimiser that tells how often it stepped."""

    def __init__(self, real, heard):
        self._real, self._heard, self.begin = real, heard, real.begin

    def step(self, *arguments, **named):
        self._heard.steps += 1
        return self._real.step(*arguments, **named)


def heard_of(settings: Matching, running) -> Heard:
    """What a run of settings, by running(settings), asks for from its first report to its last one."""
    heard = Heard()
    generator = running(dataclasses.replace(settings, iterations=ITERATIONS, optimiser=Counted(settings.descent(), heard)))
    next(generator)
    reports = 1
    while True:
        with heard:  # not while the chunk is prepared, nor while its result is taken to the host
            try:
                next(generator)
                reports += 1
            except StopIteration:
                break
        if heard.steps == ITERATIONS:
            break
    assert reports == len(REPORTED) and heard.steps == ITERATIONS
    return heard


def assert_unasked(heard: Heard):
    """Within a step nothing is read; at a report, which comes before the next step, two or three values."""
    for steps, count in Counter(steps for steps, name in heard.asked if name == "_local_scalar_dense").items():
        assert count <= REPORTED.get(steps, 0), heard.asked
    others = [(steps, name) for steps, name in heard.asked if name != "_local_scalar_dense"]
    assert all(steps in REPORTED and name == "index" for steps, name in others) and len(others) <= len(REPORTED), others  # the mean of those that live


def made(tiny, **changes):
    model = tiny.Net(sigma=0.5)
    simulate, params = tiny.simulator(model), tiny.weights(model)

    def loss(params, known, images, labels, noise):
        return F.cross_entropy(functional_call(model, params, (images, noise)), labels)

    simulate.loss = loss
    observation = tiny.observe(simulate, params, size=2, noise=tiny.draw_noise(0, 2))[0]
    return dataclasses.replace(observation, **changes), simulate


NOISE = {"noise_shape": (2, 4, 3, 3)}
PROGRAMS = {
    "signed Adam": lambda tiny: inverting_gradients(**tiny.settings),
    "soft sign": lambda tiny: modern_inverting_gradients(**tiny.settings),
    "joint": lambda tiny: joint(**NOISE, restarts=2, **tiny.settings),
    "patience": lambda tiny: naive(patience=3, **tiny.settings),
    "snapshots": lambda tiny: naive(snapshots=4, **tiny.settings),
    "Langevin": lambda tiny: naive(optimiser=Adam(langevin=0.2, clip=1.0), **tiny.settings),
    "L-BFGS": lambda tiny: deep_leakage(optimiser=Lbfgs(history=3, max_evaluations=4, max_search=3), **tiny.settings),
    "consistent restarts": lambda tiny: gradinversion(restarts=2, **tiny.settings),
    "forward over reverse": lambda tiny: naive(form="forward_over_reverse", **tiny.settings),
    "central difference": lambda tiny: naive(form="central_difference", **tiny.settings),
    "per layer, searched": lambda tiny: naive(distance="cosine_layers", searched={"unused": Searched(shape=(3,))}, **tiny.settings),
    "drawn": lambda tiny: naive(drawn={DRAWS: lambda draw: torch.randn((3, *NOISE["noise_shape"]), generator=draw)}, **tiny.settings),
}


@pytest.mark.parametrize(("name", "mode"), [*((name, "vmap") for name in PROGRAMS), ("joint", "traced"), ("joint", "loop"), ("central difference", "traced")])
def test_no_program_asks_the_device_for_anything_between_reports(tiny, name, mode):
    observation, simulate = made(tiny)
    if name == "drawn":
        simulate = averaged(simulate)
    settings = PROGRAMS[name](tiny)
    chunk = tuple((0, start) for start in range(2)) if settings.restarts == 2 else ((0, 0),)
    assert_unasked(heard_of(settings, lambda one: run_chunk(chunk, [observation], simulate, one, seed=0, mode=mode, every=EVERY)))


def test_the_attack_on_the_module_itself_asks_for_nothing_either(tiny):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(36, 3))
    params = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    simulate = lambda params, known, x, y, e: grad(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y))(params)  # noqa: E731
    observation = tiny.observe(lambda p, k, x, y, e: simulate(p, k, x.float(), y.float(), e), params)[0]
    assert_unasked(heard_of(naive(**tiny.settings), lambda one: invert_large(observation, model, one, seed=0, every=EVERY)))


def test_a_prior_that_asks_is_heard(tiny):
    """The guard can fail: in a loop, where such a prior runs."""
    observation, simulate = made(tiny)

    def asking(point):
        return point.images.square().mean() * (2.0 if float(point.labels.detach().sum()) > 0 else 1.0)

    settings = naive(priors=((1.0, asking),), **tiny.settings)
    heard = heard_of(settings, lambda one: run_chunk(((0, 0),), [observation], simulate, one, seed=0, mode="loop", every=EVERY))
    with pytest.raises(AssertionError):
        assert_unasked(heard)
