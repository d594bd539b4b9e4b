"""Weights' gradients as products over small maps, against nn.Conv2d's."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from gidef import build
from gidef.config import DPSGD, Model
from gidef.models import multiply_over_small_maps, small_maps
from gidef.parallel import World
from gidef.rng import generator
from tests.small_run import RECIPE, start

# side, kernel, stride, padding, dilation: maps of 1, 2 × 2, 1 × 2 and 2 × 2
SMALL = [(1, 3, 1, 1, 1), (4, 3, 2, 1, 1), (3, (3, 2), (2, 1), (0, 0), 1), (4, 2, 1, 0, 2)]


@pytest.fixture
def taken(monkeypatch):
    """How often the product's way was taken; every weight is large enough."""
    calls, apply = [], small_maps._Convolution.apply
    monkeypatch.setattr(small_maps, "ENTRIES", 0)
    monkeypatch.setattr(small_maps._Convolution, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


def pair(*args, **kwargs):
    torch.manual_seed(0)
    plain = nn.Conv2d(*args, dtype=torch.float64, **kwargs)
    fast = nn.Sequential(copy.deepcopy(plain))
    multiply_over_small_maps(fast)
    return plain, fast


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("side", "kernel", "stride", "padding", "dilation"), SMALL)
def test_gradients_equal_those_of_the_plain_layer(taken, side, kernel, stride, padding, dilation, bias):
    plain, fast = pair(5, 6, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias)
    x = torch.randn(3, 5, side, side, dtype=torch.float64, generator=generator(0, "small maps"))
    found = []
    for layer in (plain, copy.deepcopy(fast)):
        here = x.clone().requires_grad_()
        out = layer(here).tanh()
        first = torch.autograd.grad(out.square().sum(), [here, *layer.parameters()], create_graph=True)
        found.append([out, *first, *torch.autograd.grad(sum(part.square().sum() for part in first), [here, *layer.parameters()])])
    assert len(taken) == 1
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert list(fast.state_dict()) == ["0." + name for name in plain.state_dict()]


def test_larger_maps_transforms_and_autocast_are_the_plain_layers(taken):
    plain, fast = pair(5, 6, 3, padding=1)
    large, small = torch.randn(2, 5, 3, 2, dtype=torch.float64), torch.randn(2, 5, 2, 2, dtype=torch.float64)
    assert torch.equal(fast(large), plain(large))
    weights = dict(fast.named_parameters())
    slopes = vmap(lambda one: grad(lambda w: functional_call(fast, w, (one[None],)).square().sum())(weights)["0.weight"])(small)
    fast.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(small.float()).dtype == torch.bfloat16
    with torch.no_grad():
        fast(small.float())
    assert not taken
    expected = [torch.autograd.grad(plain(one[None]).square().sum(), plain.weight)[0] for one in small]
    torch.testing.assert_close(slopes, torch.stack(expected))
    fast(small.float())
    assert taken


def test_only_large_plain_convolutions_are_changed():
    class Own(nn.Conv2d):
        pass

    net = nn.Sequential(
        nn.Conv2d(256, 512, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(1024, 1024, 3, groups=2), nn.Conv2d(256, 512, 3, padding="same"),
        nn.Conv2d(256, 512, 3, padding_mode="circular"), Own(256, 512, 3), nn.Linear(1024, 1024),
    )  # fmt: skip
    assert multiply_over_small_maps(net) == ["0"] and isinstance(net[0], nn.Conv2d)


@pytest.mark.parametrize(("changes", "defence", "expected"), [
    ({}, None, True), ({"small_maps": False}, None, False), ({"compile_training": True}, None, False), ({}, DPSGD(), False),
])  # fmt: skip
def test_the_setting_reaches_the_clients_networks_and_no_other(changes, defence, expected, tmp_path):
    recipe = dataclasses.replace(RECIPE, model=Model(name="resnet18", cut="layer2"), speed=dataclasses.replace(RECIPE.speed, **changes))
    setting = start(recipe, tmp_path).setting
    training = build.make_training(setting, defence or RECIPE.defences["undefended"], seed=0, world=World(), state_folder=tmp_path)
    kinds = [{type(m) for m in model.modules() if isinstance(m, nn.Conv2d)} for model in (training.participation.players[0].model, training.defence.model)]
    assert kinds == [{nn.Conv2d, small_maps.SmallMapConv2d} if expected else {nn.Conv2d}, {nn.Conv2d}]


def test_a_net_made_for_larger_images_trains_as_with_plain_layers():
    from gidef.models import make_backbone

    nets = [make_backbone("resnet18", num_classes=4, image_shape=(3, 28, 28), small_stem=False, seed=0) for _ in range(2)]
    assert len(multiply_over_small_maps(nets[1])) == 8
    images, labels = torch.rand(4, 3, 28, 28, generator=generator(0, "images")), torch.tensor([0, 1, 2, 3])
    for net in nets:
        F.cross_entropy(net(images), labels).backward()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5 * float(q.grad.abs().max()) + 1e-9)
