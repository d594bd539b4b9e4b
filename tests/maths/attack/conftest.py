"""Tiny networks with a latent, and the simulators and observations that go with them."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad

from gidef.types import Observation

CLASSES, SHAPE, LATENT = 3, (2, 6, 6), (4, 3, 3)


class Net(nn.Module):
    """A convolution as encoder, two linear layers as predictor; with sigma given, m + σε with m normalised."""

    def __init__(self, sigma=None, activation=nn.LeakyReLU):
        super().__init__()
        self.sigma = sigma
        self.encoder = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.GroupNorm(2, 4), activation())
        self.predictor = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), activation(), nn.Linear(8, CLASSES))

    def forward(self, images, noise=None):
        latent = self.encoder(images)
        if self.sigma is not None:
            latent = F.layer_norm(latent, latent.shape[1:])
        return self.predictor(latent if noise is None else latent + self.sigma * noise)


def weights(model, seed=0):
    """Parameters of about unit gain, float64."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=draw, dtype=torch.float64) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1) + ("encoder.1.weight" in name)
        for name, p in model.named_parameters()
    }


def simulator(model):
    def simulate(params, known, images, labels, noise):
        return grad(lambda p: F.cross_entropy(functional_call(model, p, (images, known.get("noise", noise))), labels))(params)

    return simulate


def observe(simulate, params, size=1, seed=0, noise=None, known=None, **fields):
    """(observation, images, labels) of one private batch."""
    draw = torch.Generator().manual_seed(100 + seed)
    images = torch.rand(size, *SHAPE, generator=draw, dtype=torch.float64)
    labels = torch.randint(CLASSES, (size,), generator=draw)
    update = simulate(params, known or {}, images, F.one_hot(labels, CLASSES).double(), noise)
    return Observation(params, update, size, **{"labels": labels, "known": known or {}, **fields}), images, labels


def draw_noise(seed, size=1):
    return torch.randn(size, *LATENT, generator=torch.Generator().manual_seed(200 + seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny():
    return SimpleNamespace(
        Net=Net, weights=weights, simulator=simulator, observe=observe, draw_noise=draw_noise, classes=CLASSES, shape=SHAPE, latent=LATENT,
        settings={"image_shape": SHAPE, "num_classes": CLASSES},
    )  # fmt: skip
