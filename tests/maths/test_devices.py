"""Training on a device of its own: nothing of the CPU meets the device's tensors, as a GPU would refuse. See tests/stand_in.py."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from gidef import build, config, evaluation
from gidef.errors import InputError
from gidef.parallel import Beside, World, cohort
from gidef.parallel.world import _choose_device
from gidef.report import Console
from gidef.runs import Run
from gidef.training import train
from tests.small_run import RECIPE
from tests.stand_in import DEVICE, Mixed, watched

SGD = config.LocalTraining(batch_size=8, optimiser="sgd", lr=0.1, momentum=0.9)
CASES = {
    "control variates, private fronts": (config.LearnedPerturbation(ramp=0.0), {"share_policy": "head", "clients": SGD, "server": config.Scaffold()}),
    "a stack, frozen noise": (config.IsotropicNoise(frozen=True), {"at_once": 3, "server": config.FedAdam()}),
    "mixtures, orthogonal updates": ((config.MixUp(), config.Censor(draws=2)), {"aggregate": config.Median()}),
    "private steps": (config.DPSGD(noise_multiplier=1.0, target_epsilon=None, form="ghost"), {}),
}


@pytest.fixture
def one_thread_and_values_made_up(monkeypatch):
    """Evaluation on this thread, which is watched; and counters that came back are not checked, as they were made up."""

    class Pool(contextlib.nullcontext):
        def map(self, do, items):
            return map(do, items)

    def settle(part, counters):
        for error in part.errors.values():
            raise error
        return [0.1] * len(part.cohort), [0] * len(part.cohort)

    def call(beside, function, *args):
        beside.found = function(*args)

    monkeypatch.setattr(evaluation, "ThreadPoolExecutor", lambda workers: Pool(Pool()))
    monkeypatch.setattr(Beside, "call", call)
    monkeypatch.setattr(Beside, "wait", lambda beside: beside.found)
    monkeypatch.setattr(build, "_home", lambda images, device, notice: device)
    monkeypatch.setattr(cohort.Part, "settle", settle)


@pytest.mark.parametrize("case", CASES)
def test_a_run_takes_nothing_of_the_cpu_to_its_device(case, tmp_path, one_thread_and_values_made_up):
    chosen, asked = CASES[case]
    if case == "private steps":
        pytest.importorskip("opacus")
    rounds = dataclasses.replace(RECIPE.rounds, count=2, **{name: asked[name] for name in ("server", "aggregate") if name in asked})
    recipe = dataclasses.replace(
        RECIPE, rounds=rounds, clients=asked.get("clients", RECIPE.clients), share_policy=asked.get("share_policy", "full"),
        speed=dataclasses.replace(RECIPE.speed, clients_at_once=asked.get("at_once", 1)),
    )  # fmt: skip
    world = World(device=DEVICE, cores=2)  # one of them free, for the evaluation beside
    with watched():
        run = Run(build.load_setting(recipe, world=world, notice=lambda text: None), world, tmp_path, Console(rank=1), None, "mark")
        found = train(run, "d", chosen, 0)
    assert found.training.participation.at_once == asked.get("at_once", 1)
    assert all(tensor.device == DEVICE for tensor in found.snapshots["final"].params.values())


def test_the_stand_in_refuses_what_a_gpu_refuses():
    with watched():
        there, here = torch.zeros(3, 4, device=DEVICE), torch.zeros(4)
        assert there[torch.tensor([0, 2])].shape == (2, 4) and float(there.sum()) == 0.25 and there.cpu().device.type == "cpu"
        for mixed in (
            lambda: there * here, lambda: torch.cat([there, here[None]]), lambda: here[torch.zeros(1, dtype=torch.int64, device=DEVICE)],
            lambda: torch.randn(3, generator=torch.Generator(), device=DEVICE), lambda: torch.randn(3, generator=torch.Generator(DEVICE)),
            lambda: torch.nn.functional.linear(there, here[None]), lambda: torch.where(here > 0, there, 0.0),
        ):  # fmt: skip
            with pytest.raises(Mixed):
                mixed()


@pytest.mark.parametrize(("asked", "gpus", "expected"), [
    ("auto", 0, ["cpu"] * 4), ("auto", 1, ["cuda:0"] * 4), ("auto", 2, ["cuda:0", "cuda:1"] * 2), ("auto", 8, [f"cuda:{rank}" for rank in range(4)]),
    ("cuda", 1, ["cuda:0"] * 4), ("cuda", 3, ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]), ("cuda:1", 2, ["cuda:1"] * 4), ("cpu", 2, ["cpu"] * 4),
])  # fmt: skip
def test_ranks_of_a_host_go_round_its_gpus_and_share_one(asked, gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert [str(_choose_device(asked, local_rank)) for local_rank in range(4)] == expected


@pytest.mark.parametrize(("asked", "gpus"), [("cuda", 0), ("cuda:2", 2), ("tpu", 1), ("meta", 1)])
def test_a_device_that_is_not_there_is_refused(asked, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=f"device='{asked}'"):
        _choose_device(asked, 0)
