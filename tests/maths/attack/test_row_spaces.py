"""What the gradients of weights tell of a layer's inputs: known answers on a small net, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from gidef.attack import row_spaces as row_spaces_module
from gidef.attack.matching import Point
from gidef.attack.row_spaces import ROWS, row_spaces, within_rows

SHAPE, CLASSES = (2, 12, 12), 30


class Net(nn.Module):
    """Of the layers' inputs, an image has 16 patches of 18 at `first`, 4 of 72 at `second`, 1 of 24 at `third` and of 40 at `last`; `twice` runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 8, 3, 3), nn.Conv2d(8, 24, 3, 2, 1)
        self.third, self.twice, self.last = nn.Linear(24, 40), nn.Linear(40, 40), nn.Linear(40, CLASSES)

    def forward(self, images):
        z = F.silu(self.second(torch.tanh(self.first(images)))).mean((2, 3))
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(torch.tanh(self.third(z)))))))


def released(size, *, seed=0, loss=F.cross_entropy):
    torch.manual_seed(0)
    net = Net().double().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    images, labels = torch.rand(size, *SHAPE, generator=draw, dtype=torch.float64), torch.arange(size) % CLASSES
    params = dict(net.named_parameters())
    return net, images, grad(lambda p: loss(functional_call(net, p, (images,)), labels))(params)


def residual(net, spaces, images):
    point = Point(images, None, None, dict(net.named_parameters()), {f"{ROWS}{name}": space.double() for name, space in spaces.items()})
    return within_rows(lambda: net, sorted(spaces), lambda point: [(point.params, point.images)])(point)


@pytest.mark.parametrize(("size", "told"), [(1, {"second", "third", "last"}), (4, {"second", "third", "last"}), (5, {"second", "third", "last"}), (12, {"third", "last"}), (29, set())])
def test_layers_with_no_more_inputs_than_rows_tell_their_span_and_the_batch_lies_in_it(size, told):
    net, images, update = released(size)
    spaces = row_spaces(net, update, SHAPE, size, CLASSES)
    assert set(spaces) == told
    if not told:
        return
    assert {name: len(space) for name, space in spaces.items()} == {name: size * (4 if name == "second" else 1) for name in told}
    for space in spaces.values():
        torch.testing.assert_close(space @ space.T, torch.eye(len(space)), atol=1e-5, rtol=0)
    assert residual(net, spaces, images) < 1e-8 and residual(net, spaces, images.flip(-1)) > 1e-3
    # by hand, an image's patches of one layer
    if "second" in told:
        given = torch.tanh(net.first(images))
        patches = F.unfold(given, 3, stride=2, padding=1).mT.reshape(-1, 72)
        assert torch.linalg.lstsq(spaces["second"].double().T, patches.T).solution.shape == (4 * size, 4 * size)
        only = {"second": spaces["second"]}
        moved = images.flip(-1)
        other = F.unfold(torch.tanh(net.first(moved)), 3, stride=2, padding=1).mT.reshape(-1, 72)
        best = only["second"].double().T @ torch.linalg.lstsq(only["second"].double().T, other.T).solution
        assert residual(net, only, moved) == pytest.approx(float((other.T - best).square().sum() / other.square().sum()), rel=1e-4)


def test_of_many_layers_the_first_are_taken_and_large_ones_are_sketched_to_the_same_space(monkeypatch):
    net, images, update = released(4)
    whole = row_spaces(net, update, SHAPE, 4, CLASSES)
    monkeypatch.setattr(row_spaces_module, "LARGE", 8)
    for name, space in row_spaces(net, update, SHAPE, 4, CLASSES).items():
        torch.testing.assert_close(space.T @ space, whole[name].T @ whole[name], atol=1e-4, rtol=0)
    assert residual(net, whole, torch.zeros_like(images)).isfinite()  # of inputs that are nought
    monkeypatch.setattr(row_spaces_module, "MOST", 2)
    assert list(row_spaces(net, update, SHAPE, 4, CLASSES)) == ["second", "third"]


def test_whatever_the_loss_and_whose_images_they_are():
    def coupled(logits, labels):
        return F.cross_entropy(logits, labels) + 0.3 * (logits @ logits.T).square().mean()

    net, images, update = released(4, loss=coupled)
    assert residual(net, row_spaces(net, update, SHAPE, 4, CLASSES), images) < 1e-8
    (_, mine, one), (_, theirs, other) = released(2, seed=1), released(2, seed=2)
    mean = {name: (tensor + other[name]) / 2 for name, tensor in one.items()}
    scaled = {name: tensor * (1 + place) for place, (name, tensor) in enumerate(mean.items())}  # as clipping tensor by tensor does
    assert residual(net, row_spaces(net, scaled, SHAPE, 4, CLASSES), torch.cat([mine, theirs])) < 1e-8


def test_noise_images_that_are_alike_and_what_is_not_finite_tell_nothing():
    net, images, update = released(4)
    noisy = {name: tensor + 0.1 * tensor.square().mean().sqrt() * torch.randn(tensor.shape, dtype=torch.float64) for name, tensor in update.items()}
    assert row_spaces(net, noisy, SHAPE, 4, CLASSES) == {}
    assert row_spaces(net, {name: torch.full_like(tensor, torch.nan) for name, tensor in update.items()}, SHAPE, 4, CLASSES) == {}
    assert row_spaces(net, {name: torch.zeros_like(tensor) for name, tensor in update.items()}, SHAPE, 4, CLASSES) == {}
    params = dict(net.named_parameters())
    twins = torch.cat([images[:1]] * 4)
    assert row_spaces(net, grad(lambda p: F.cross_entropy(functional_call(net, p, (twins,)), torch.tensor([1, 1, 1, 1])))(params), SHAPE, 4, CLASSES) == {}
    assert set(row_spaces(net, {name: tensor for name, tensor in update.items() if not name.startswith("second")}, SHAPE, 4, CLASSES)) == {"third", "last"}


def test_the_prior_is_one_without_a_space_differentiable_and_the_same_over_many_attacks():
    net, images, update = released(4)
    spaces = row_spaces(net, update, SHAPE, 4, CLASSES)
    assert residual(net, {name: torch.zeros_like(space) for name, space in spaces.items()}, images) == pytest.approx(1.0)
    others = torch.rand(3, *images.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    slopes = vmap(grad(lambda one: residual(net, spaces, one)))(others)
    for one, slope in zip(others, slopes, strict=True):
        torch.testing.assert_close(grad(lambda one: residual(net, spaces, one))(one), slope)
        step = 1e-6 * torch.randn(one.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        difference = float(residual(net, spaces, one + step) - residual(net, spaces, one - step)) / 2
        assert difference == pytest.approx(float((slope * step).sum()), rel=1e-4)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_of_local_steps_a_layer_s_inputs_are_those_at_the_weights_that_each_step_met():
    torch.manual_seed(0)
    net = Net().double().requires_grad_(False)
    start, images, labels = dict(net.named_parameters()), torch.rand(4, *SHAPE, dtype=torch.float64), torch.arange(4)
    weights, passes = start, []
    for rows in (slice(0, 2), slice(2, 4)):
        passes.append((weights, images[rows]))
        slope = grad(lambda p, rows=rows: F.cross_entropy(functional_call(net, p, (images[rows],)), labels[rows]))(weights)
        weights = {name: weights[name] - 0.5 * slope[name] for name in weights}
    spaces = row_spaces(net, {name: weights[name] - start[name] for name in start}, SHAPE, 4, CLASSES)
    assert set(spaces) == {"second", "third", "last"}
    point = Point(images, None, None, start, {f"{ROWS}{name}": space.double() for name, space in spaces.items()})
    stepped, at_once, swapped = (
        float(within_rows(lambda: net, sorted(spaces), lambda point, each=each: each)(point))
        for each in (passes, [(start, images)], [(weights, part) for (weights, _), (_, part) in zip(passes, passes[::-1], strict=True)])
    )
    assert stepped < 1e-8 < 1e-5 < min(at_once, swapped)
