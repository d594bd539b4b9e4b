"""Ghost clipping against the images' own gradients in float64, and what it does not know."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from gidef.config import DPSGD, Data, Recipe
from gidef.defence.ghost import Ghost, _squares
from gidef.defence.private import PrivatePlayer, clipped_sum, factors_of
from gidef.errors import InputError
from gidef.models import SplitModel, make_backbone
from gidef.rng import generator
from gidef.types import Client

CLASSES, SIDE = 5, 16


def model_of(name, side=SIDE):
    backbone = make_backbone(name, num_classes=CLASSES, image_shape=(3, side, side), seed=3)
    return SplitModel(backbone, image_shape=(3, side, side), num_classes=CLASSES, input_mean=(0.5,) * 3, input_std=(0.25,) * 3).double()


def batch(count=5, side=SIDE):
    draw = generator(0, "ghost")
    return torch.rand(count, 3, side, side, generator=draw, dtype=torch.float64), torch.randint(CLASSES, (count,), generator=draw)


def own_gradients(model, images, labels):
    def loss(params, image, label):
        return nn.functional.cross_entropy(functional_call(model, params, (image[None],)), label[None])

    return vmap(grad(loss), in_dims=(None, 0, 0))({name: p.detach() for name, p in model.named_parameters()}, images, labels)


@pytest.mark.parametrize("name", ["small", "resnet10t", "mlp"])
def test_sums_are_those_of_the_images_own_gradients(name):
    """Additions in place of a residual net included; both forms of a convolution."""
    if name == "mlp":
        model = nn.Sequential(nn.Flatten(2), nn.Linear(SIDE * SIDE, 7), nn.LayerNorm(7), nn.GELU(), nn.Flatten(), nn.Linear(21, CLASSES)).double()
    else:
        model = model_of(name)
    hooks = sum(len(layer._forward_hooks) for layer in model.modules())
    images, labels = batch()
    own = own_gradients(model, images, labels)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in own.values()]).sum(0).sqrt()
    clip = float(norms.median())
    wanted = clipped_sum(own, clip)
    found, losses = Ghost(model).clipped_sum(images, labels, lambda squares: factors_of(squares, clip))
    assert norms.min() < clip < norms.max()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(losses, nn.functional.cross_entropy(model(images), labels, reduction="none").detach())
    assert sum(len(layer._forward_hooks) for layer in model.modules()) == hooks


@pytest.mark.parametrize("layer", [
    nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(40, 30, 3, stride=2), nn.Conv2d(4, 8, 2, groups=2, bias=False), nn.Conv2d(3, 4, 3, dilation=2, padding=2),
    nn.GroupNorm(2, 4), nn.LayerNorm(9), nn.Linear(9, 4),
], ids=str)  # fmt: skip
def test_each_layer_s_norm_is_that_of_its_own_gradients(layer):
    layer = layer.double()
    shape = {nn.Conv2d: (getattr(layer, "in_channels", 0), 7, 7), nn.GroupNorm: (4, 5, 5), nn.LayerNorm: (6, 2, 9), nn.Linear: (6, 2, 9)}[type(layer)]
    given = torch.randn(3, *shape, generator=generator(0, "layer"), dtype=torch.float64)
    output = layer(given)
    gradient = torch.randn(output.shape, generator=generator(1, "layer"), dtype=torch.float64)
    expected = [
        sum(float(g.square().sum()) for g in torch.autograd.grad((layer(given[i : i + 1]) * gradient[i : i + 1]).sum(), list(layer.parameters()))) for i in range(3)
    ]
    torch.testing.assert_close(_squares(layer, given, gradient), torch.tensor(expected, dtype=torch.float64))


def test_a_step_is_the_per_sample_one_with_its_noise_and_an_empty_batch_is_noise_alone():
    images, labels = batch(6)
    images = images.float()
    found = {}
    for form in ("per_sample", "ghost"):
        model = model_of("small").float()
        client = Client(1, torch.zeros(20, 3, SIDE, SIDE, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64))
        player = PrivatePlayer(model, clip=0.5, noise_multiplier=0.7, form=form)
        player.begin(client, seed=0, round=0, progress=0.0, first=True)
        player.draw_batches(client, batch_size=8, epochs=1, seed=0, round=0)
        told = []
        for count in (6, 0, 3):
            loss = player.fill_gradients(images[:count], labels[:count], rows=torch.arange(count), epoch=0)
            told.append([loss, *(p.grad.clone() for p in model.parameters())])
        found[form] = told
    for mine, theirs in zip(found["ghost"], found["per_sample"], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_layers_that_it_does_not_know_and_those_used_twice_or_with_shared_weights_are_refused():
    with pytest.raises(InputError, match="ghost clipping does not know .*set form=per_sample"):  # a layer scale is a parameter of no layer
        Ghost(model_of("convnext_atto", 32))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    with pytest.raises(InputError, match="layer was used 2 times"):
        Ghost(Twice()).clipped_sum(torch.rand(2, 4), torch.tensor([0, 1]), lambda squares: squares)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match="several layers share"):
        Ghost(tied)
    with pytest.raises(InputError, match="0 .Conv2d."):
        Ghost(nn.Sequential(nn.Conv2d(3, 3, 3, padding_mode="reflect", padding=1)))
    assert Recipe(data=Data(), defences={"d": DPSGD(form="ghost")}).defences["d"].form == "ghost"
