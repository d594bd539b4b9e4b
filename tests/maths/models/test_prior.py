"""Generative priors, untrained, on random numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import grad, vmap

from gidef.errors import InputError
from gidef.models.prior import autoencoder_for, gan_for
from gidef.rng import generator

torch.set_num_threads(1)

SHAPES = [(3, 32, 32), (1, 28, 28), (3, 30, 45), (1, 5, 6)]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("image_shape", SHAPES)
def test_codes_give_images_between_0_and_1_and_images_give_codes(image_shape):
    autoencoder = autoencoder_for(image_shape, code_dim=7, width_factor=0.25)
    model, critic = gan_for(image_shape, code_dim=7, width_factor=0.25)
    codes = 20 * torch.randn(2, 7, generator=generator(0))
    for one in (autoencoder.generator, model):
        images = one(codes)
        assert images.shape == (2, *image_shape) and images.min() >= 0 and images.max() <= 1 and images.std() > 0
    mean, log_variance = autoencoder.encode(images)
    assert mean.shape == log_variance.shape == (2, 7) and autoencoder(images).shape == images.shape and critic(images).shape == (2,)


def test_they_have_half_a_million_to_one_million_parameters_at_32_pixels():
    assert 0.5e6 < count(autoencoder_for((3, 32, 32))) < 1e6 and 0.5e6 < count(gan_for((3, 32, 32))[0]) < 1e6


@pytest.mark.parametrize("kind", ["autoencoder", "gan"])
def test_second_derivatives_under_vmap_are_those_of_a_loop(kind):
    """As gradient matching differentiates: over codes, of something that is a derivative itself."""
    model = autoencoder_for((2, 12, 12), code_dim=3, width_factor=0.25).generator if kind == "autoencoder" else gan_for((2, 12, 12), code_dim=3)[0]
    model = model.double().requires_grad_(False)
    codes = torch.randn(4, 3, generator=generator(0), dtype=torch.float64)

    def curved(code):
        return grad(lambda c: model(c[None]).square().sum())(code).square().sum()

    together = vmap(grad(curved))(codes)
    torch.testing.assert_close(together, torch.stack([grad(curved)(code) for code in codes]))
    step = 1e-6 * torch.eye(3, dtype=torch.float64)[1]
    numeric = (curved(codes[0] + step) - curved(codes[0] - step)) / 2e-6
    torch.testing.assert_close(together[0, 1], numeric, rtol=1e-5, atol=1e-8)


def test_the_log_variance_of_a_code_stays_finite_for_any_image():
    autoencoder = autoencoder_for((1, 8, 8), code_dim=4, width_factor=0.25)
    with torch.no_grad():
        autoencoder.head.weight.mul_(1e4)
    _, log_variance = autoencoder.encode(torch.rand(2, 1, 8, 8, generator=generator(0)))
    assert log_variance.abs().max() <= 8 and log_variance.abs().max() > 7


def test_the_critic_s_layers_have_spectral_norm_1_and_eval_mode_keeps_their_state():
    _, critic = gan_for((1, 16, 16), code_dim=4, width_factor=0.25)
    images = torch.rand(2, 1, 16, 16, generator=generator(0))
    for _ in range(30):
        critic.train()(images)
    weights = [module.weight for module in critic.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.flatten(1).detach(), 2) == pytest.approx(1, abs=0.02)
    before = copy.deepcopy(critic.state_dict())
    critic.eval()(images)
    assert all(torch.equal(before[name], value) for name, value in critic.state_dict().items())


def test_weights_depend_on_the_seed_alone_and_leave_the_global_state():
    state = torch.get_rng_state()
    codes = torch.ones(1, 5)
    one, two, other = (autoencoder_for((1, 8, 8), code_dim=5, width_factor=0.25, seed=seed).generator(codes) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(one, two) and not torch.equal(one, other)
    first, again = (gan_for((1, 8, 8), code_dim=5, seed=3) for _ in range(2))
    assert torch.equal(first[0](codes), again[0](codes)) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("change", [{"image_shape": (8, 8)}, {"code_dim": 0}, {"width_factor": -1.0}])
def test_bad_arguments_are_refused(change):
    for make in (autoencoder_for, gan_for):
        with pytest.raises(InputError, match="prior"):
            make(**({"image_shape": (1, 8, 8), "code_dim": 4} | change))
