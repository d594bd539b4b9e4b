"""What a GPU makes of float32 products: the process' switch, and whose calls it is on for."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from gidef import parallel, precision
from gidef.clients.local import LocalSettings, train_locally
from gidef.clients.vectorised import train_together
from gidef.config import Undefended
from gidef.defence import Defence
from gidef.models import SmallNet, SplitModel
from gidef.training import train
from gidef.types import Client
from tests.small_run import RECIPE, start

ON, OFF = (True, True), (False, False)


def flags():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def as_before():
    before = flags()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_it_goes_back_once_the_last_thread_has_left():
    precision.full_float32()
    assert flags() == OFF
    entered, leave = threading.Event(), threading.Event()

    def other():
        with precision.tf32():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with precision.tf32():
        thread.start()
        entered.wait()
    assert flags() == ON  # the other is still inside
    leave.set()
    thread.join()
    assert flags() == OFF
    with pytest.raises(KeyError), precision.tf32():
        raise KeyError
    assert flags() == OFF


def test_a_client_trains_in_tf32_where_it_is_asked_to():
    precision.full_float32()
    seen, client = [], Client(0, torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8), torch.arange(6) % 2)

    def look(module, inputs):
        seen.append(flags())
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: seen.append(flags()))

    player = Defence(SplitModel(SmallNet(2, 3), image_shape=(3, 16, 16), num_classes=2)).player()
    player.model.backbone.head.register_forward_pre_hook(look)  # both passes
    weights = {name: p.detach().clone() for name, p in player.model.named_parameters()}
    for kind, wanted in (("float32", OFF), ("tf32", ON)):
        settings = LocalSettings(batch_size=3, optimiser="sgd", lr=0.1, precision=kind)
        train_locally(player, weights, client, settings, seed=0, round=0)
        assert seen == [wanted] * 4 and flags() == OFF
        seen.clear()
        train_together(player.stacked(), [weights] * 2, [{}] * 2, [client, dataclasses.replace(client, id=1)], settings, seed=0, round=0, progress=0.0, first=[True] * 2)
        assert seen and set(seen) == {wanted} and flags() == OFF
        seen.clear()


def test_a_world_on_a_gpu_switches_it_off(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    torch.backends.cudnn.allow_tf32 = True
    with parallel.open_world("cpu"):
        assert torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with parallel.open_world("auto") as world:
        assert world.device == torch.device("cuda:0") and flags() == OFF


def test_a_cpu_trains_in_float32_and_says_so(tmp_path, monkeypatch):
    heard, clients = [], dataclasses.replace(RECIPE.clients, precision="tf32")
    run = start(dataclasses.replace(RECIPE, clients=clients), tmp_path / "a")
    monkeypatch.setattr(type(run.console), "notice", lambda self, text: heard.append(text))
    monkeypatch.setattr(precision, "_switch", lambda *given: pytest.fail("a CPU's products were switched"))
    low = train(run, "plain", Undefended(), 0)
    assert heard == ["plain, seed 0: cpu has no TF32 (clients.precision): float32 is used."]
    assert low.sha256 == train(start(RECIPE, tmp_path / "b"), "plain", Undefended(), 0).sha256
