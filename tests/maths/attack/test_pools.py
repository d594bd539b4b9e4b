"""Max-pooling by look-up, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vjp, vmap

from gidef.attack.pools import GatheredPools
from gidef.rng import generator

POOLS = [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, 1, 2), nn.MaxPool2d(3, 2, ceil_mode=True), lambda x: torch.max_pool2d(x, 3, 2, 1)]


@pytest.mark.parametrize("pool", POOLS)
def test_values_and_two_derivatives_are_pytorchs_to_the_bit(pool):
    x = torch.randn((3, 2, 3, 9, 8), generator=generator(0, "pools"))
    x = x.relu()  # ties among zeros

    def step(x):
        value = pool(x)
        update, pull = vjp(lambda x: grad(lambda x: pool(x).sin().sum())(x), x)
        return value, update, pull(update.cos())[0]

    expected = [torch.stack(parts) for parts in zip(*map(step, x), strict=True)]
    with GatheredPools():
        found = vmap(step)(x)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_indices_are_left_to_pytorch():
    x = torch.rand(1, 1, 4, 4)
    with GatheredPools():
        found, index = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(found.flatten(), x.flatten()[index.flatten()])
