"""Convolutions of many attacks, against PyTorch's own under vmap and without it."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from gidef.attack import convolutions
from gidef.attack.convolutions import FastConvolutions, folded_by_shifts
from gidef.attack.program import COMPILED
from gidef.rng import generator

# kernel, stride, padding, dilation, side
SHAPES = [(3, 1, 1, 1, 8), (3, 2, 1, 1, 9), (5, 2, 2, 1, 8), (3, (2, 1), (0, 1), 2, 9), (1, 2, 0, 1, 8), (3, (2,), 1, 1, 7), (4, (3, 2), (1, 0), 1, 11), (2, 3, 0, 1, 9)]


def draws(*shapes):
    g = generator(0, "convolutions")
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


@pytest.fixture(params=["one by one", "few channels", "few channels in groups", "products"])
def every_way(request, monkeypatch):
    """Those of a CPU, and that of a GPU."""
    monkeypatch.setattr(convolutions, "LARGE", float("inf") if request.param == "few channels in groups" else 0)
    monkeypatch.setattr(convolutions, "FEW_CHANNELS", 4 if "few" in request.param else 0)
    monkeypatch.setattr(convolutions, "_in_products", lambda tensor: request.param == "products")


def network(weight, bias, x, stride, padding, dilation):
    """A loss with curvature in everything."""
    first = F.conv2d(x, weight, bias, stride, padding, dilation)
    return first.tanh().square().sum() + F.conv2d(x, weight, None, stride, padding, dilation).sin().sum()


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "side"), SHAPES)
def test_second_derivatives_equal_those_of_one_attack_after_another(every_way, kernel, stride, padding, dilation, side):
    x, weight, bias, target = draws((3, 2, 3, side, side), (4, 3, kernel, kernel), (4,), (3, 4, 3, kernel, kernel))

    def step(x, target):
        update, pull = vjp(lambda x: grad(network, (0, 1))(weight, bias, x, stride, padding, dilation), x)
        return update[0], update[1], pull((update[0] - target, update[1]))[0]

    expected = [torch.stack(parts) for parts in zip(*(step(*one) for one in zip(x, target, strict=True)), strict=True)]
    with FastConvolutions():
        found = vmap(step)(x, target)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_attacks_with_weights_of_their_own(every_way):
    """As in a simulator of local training: every attack's weights have moved differently."""
    x, weight = draws((3, 2, 3, 8, 8), (3, 4, 3, 3, 3))

    def slope(x, weight):
        return grad(lambda x, w: F.conv2d(x, w - 0.1 * grad(lambda w: F.conv2d(x, w).square().sum())(w)).tanh().sum())(x, weight)

    with FastConvolutions():
        found = vmap(slope)(x, weight)
    torch.testing.assert_close(found, torch.stack([slope(*one) for one in zip(x, weight, strict=True)]), rtol=1e-10, atol=1e-10)


def test_third_derivatives(every_way):
    """Adam's simulator differentiates once more."""
    x, weight = draws((1, 2, 6, 6), (3, 2, 3, 3))
    with FastConvolutions():
        assert torch.autograd.gradgradcheck(lambda x, w: F.conv2d(x, w, None, 2, 1), (x.requires_grad_(), weight.requires_grad_()))

    def thrice(x):
        return grad(lambda x: grad(lambda x: grad(lambda x: F.conv2d(x, weight).tanh().sum())(x).square().sum())(x).sum())(x)

    expected = thrice(x.detach())
    with FastConvolutions():
        torch.testing.assert_close(thrice(x.detach()), expected, rtol=1e-10, atol=1e-10)


def test_small_grouped_and_named_paddings_are_left_to_pytorch(monkeypatch):
    def refuse(*_):
        raise AssertionError("not ours")

    monkeypatch.setattr(convolutions._Forward, "apply", refuse)
    x, weight, many, grouped = draws((1, 4, 8, 8), (4, 4, 3, 3), (4, 5, 3, 3), (4, 1, 3, 3))
    with FastConvolutions():
        F.conv2d(x, weight)
        F.conv2d(x[:, :1].expand(1, 5, 8, 8), many, stride=2)
        with pytest.raises(AssertionError, match="not ours"):
            F.conv2d(x, weight, stride=2)
        monkeypatch.setattr(convolutions, "LARGE", 0)
        F.conv2d(x, grouped, groups=4)
        F.conv2d(x, weight, padding="same")
        with pytest.raises(AssertionError, match="not ours"):
            F.conv2d(x, weight)


def test_draws_within_attacks(every_way):
    """An expectation over draws is a map within the map over attacks."""
    x, noise, weight = draws((3, 1, 2, 6, 6), (4, 3, 2, 3, 3), (3, 2, 3, 3))

    def step(x, noise):
        def update(x):
            return vmap(lambda one: grad(lambda w: F.conv2d(x, w + one, None, 1, 1).tanh().square().sum())(weight))(noise).mean(0)

        found, pull = vjp(update, x)
        return pull(found.cos())[0]

    expected = torch.stack([step(one, noise) for one in x])
    with FastConvolutions():
        torch.testing.assert_close(vmap(step, in_dims=(0, None))(x, noise), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 2), (4, 5)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1), (2, 5)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 2)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (2, 3)])
def test_a_sum_of_shifted_images_is_pytorchs_fold(kernel, stride, padding, dilation):
    size = (14, 17)
    places = [(length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, d, p, s in zip(size, kernel, dilation, padding, stride, strict=True)]
    (parts,) = draws((2, 3 * kernel[0] * kernel[1], places[0] * places[1]))
    expected = F.fold(parts, size, kernel, dilation, padding, stride)
    torch.testing.assert_close(folded_by_shifts(parts, size, kernel, dilation, padding, stride), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_program_for_a_compiler_holds_no_fold(monkeypatch, stride):
    monkeypatch.setattr(convolutions, "LARGE", 0)
    monkeypatch.setattr(convolutions, "_in_products", lambda tensor: True)
    x, weight = draws((3, 2, 3, 8, 8), (3, 4, 3, 3, 3))

    def slope(x, weight):
        with FastConvolutions():
            return vmap(grad(lambda x, w: F.conv2d(x, w, stride=stride, padding=1).tanh().square().sum()))(x, weight)

    plain, given = make_fx(slope)(x, weight), make_fx(slope, decomposition_table=COMPILED)(x, weight)
    assert "col2im" in plain.code and "col2im" not in given.code
    torch.testing.assert_close(given(x, weight), plain(x, weight), rtol=1e-12, atol=1e-12)
