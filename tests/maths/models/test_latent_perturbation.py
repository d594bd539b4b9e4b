"""The latent norm and the perturbation layer, on random latents."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from gidef.errors import InputError
from gidef.models import Perturbation, latent_norm
from gidef.rng import generator

torch.set_num_threads(1)

LAYOUTS = [((6, 5, 4), 1), ((5, 4, 6), -1), ((17, 6), -1), ((6,), -1)]


def latents(shape: tuple[int, ...], batch: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((batch, *shape), generator=generator(0, "latents"), dtype=dtype)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e6])
@pytest.mark.parametrize(("shape", "channel_dim"), LAYOUTS)
def test_normalised_latents_have_mean_0_and_rms_1_whatever_the_scale(shape, channel_dim, scale):
    normed = latent_norm(scale * (latents(shape) + 3)).flatten(1)
    torch.testing.assert_close(normed.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.square().mean(1), torch.ones(3), atol=3e-4, rtol=0)


def test_a_constant_latent_is_normalised_to_zero_with_finite_gradients():
    latent = torch.full((2, 4, 3, 3), 7.0, requires_grad=True)
    normed = latent_norm(latent)
    normed[:, 0, 0, 0].sum().backward()
    assert (normed == 0).all() and latent.grad.isfinite().all()


@pytest.mark.parametrize(("shape", "channel_dim"), LAYOUTS)
@pytest.mark.parametrize("mode", ["global", "conditional"])
@pytest.mark.parametrize("std_init", [0.3, 1.0, 50.0])
def test_perturbation_starts_at_its_initial_level_and_without_a_shift(shape, channel_dim, mode, std_init):
    layer = Perturbation(shape, channel_dim, mode=mode, mean=True, std_init=std_init)
    latent = latents(shape)
    m, std = layer(latent)
    torch.testing.assert_close(std.expand_as(m), torch.full_like(m, std_init))
    torch.testing.assert_close(m, latent_norm(latent))


@pytest.mark.parametrize("mode", ["global", "conditional"])
@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("level", [-100.0, -math.inf])
def test_level_never_falls_below_the_floor_whatever_the_server_sends(mode, strength, level):
    layer = Perturbation((6, 5, 4), 1, mode=mode, std_floor=0.1, strength=strength)
    with torch.no_grad():
        (layer.level if mode == "global" else layer.level.bias).fill_(level)
    assert layer(latents((6, 5, 4)))[1].min().item() == pytest.approx(0.1)
    layer.std_floor = 0.0  # the evaluator's right
    assert layer(latents((6, 5, 4)))[1].max().item() < 1e-20


def test_floor_and_strength_are_not_among_the_tensors_that_a_server_sets():
    layer = Perturbation((6, 5, 4), 1, mean=True)
    assert set(layer.state_dict()) == {"level", "shift.weight", "shift.bias"}


def test_rms_stays_1_when_the_shift_is_huge():
    layer = Perturbation((6, 5, 4), 1, mean=True)
    with torch.no_grad():
        layer.shift.weight.copy_(1e3 * torch.randn((6, 6), generator=generator(1)))
    assert layer(latents((6, 5, 4)))[0].square().mean().item() == pytest.approx(1, abs=1e-4)


def test_strength_multiplies_the_level():
    layer = Perturbation((6,), -1, std_floor=0.0)
    before = layer(latents((6,)))[1]
    layer.strength = 2.5
    torch.testing.assert_close(layer(latents((6,)))[1], 2.5 * before)


@pytest.mark.parametrize(("shape", "channel_dim"), LAYOUTS)
def test_conditional_level_depends_on_the_latent_and_global_level_does_not(shape, channel_dim):
    one, other = latents(shape), 2 * latents(shape) - 1
    conditional = Perturbation(shape, channel_dim, mode="conditional")
    with torch.no_grad():
        conditional.level.weight.copy_(torch.randn((6, 6), generator=generator(1)))
    assert not torch.allclose(conditional(one)[1], conditional(other)[1])
    assert conditional(one)[1].shape == one.shape
    fixed = Perturbation(shape, channel_dim, mode="global")
    assert torch.equal(fixed(one)[1], fixed(other)[1])
    assert fixed.level.shape == (6,)


def test_global_level_is_per_channel_in_either_layout():
    level = torch.arange(6.0)
    for shape, channel_dim in LAYOUTS[:3]:
        layer = Perturbation(shape, channel_dim)
        with torch.no_grad():
            layer.level.copy_(level)
        m, std = layer(latents(shape))
        per_channel = std.expand_as(m).movedim(channel_dim, -1).reshape(-1, 6)
        torch.testing.assert_close(per_channel, torch.nn.functional.softplus(level).expand_as(per_channel))


def test_conditional_map_is_a_1x1_convolution():
    layer = Perturbation((6, 5, 4), 1, mode="conditional", std_floor=0.0)
    weight, bias = torch.randn((6, 6), generator=generator(1)), torch.randn(6, generator=generator(2))
    with torch.no_grad():
        layer.level.weight.copy_(weight)
        layer.level.bias.copy_(bias)
    latent = latents((6, 5, 4))
    expected = torch.nn.functional.softplus(torch.nn.functional.conv2d(latent, weight[..., None, None], bias))
    torch.testing.assert_close(layer(latent)[1], expected)


@pytest.mark.parametrize(("law", "kurtosis"), [("gaussian", 3.0), ("laplace", 6.0)])
def test_noise_has_unit_variance_under_both_laws(law, kurtosis):
    noise = Perturbation((40, 10), -1, law=law).draw(1000, generator=generator(0, "noise"), dtype=torch.float64)
    assert noise.shape == (1000, 40, 10) and noise.dtype == torch.float64
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.var().item() == pytest.approx(1, abs=0.02)
    assert noise.pow(4).mean().item() == pytest.approx(kurtosis, rel=0.05)


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_noise_is_a_function_of_the_generators_seed_alone(law):
    layer = Perturbation((5, 3), -1, law=law)
    before = torch.get_rng_state()
    first = layer.draw(4, generator=generator(7, "noise"))
    assert torch.equal(first, layer.draw(4, generator=generator(7, "noise")))
    assert not torch.equal(first, layer.draw(4, generator=generator(8, "noise")))
    assert torch.equal(before, torch.get_rng_state())


def test_kl_equals_that_of_torch_distributions():
    layer = Perturbation((6, 5, 4), 1)
    m = latents((6, 5, 4), dtype=torch.float64)
    std = torch.linspace(0.1, 3, 6, dtype=torch.float64)[:, None, None]
    expected = kl_divergence(Normal(m, std.expand_as(m)), Normal(torch.zeros_like(m), torch.ones_like(m))).mean()
    torch.testing.assert_close(layer.kl(m, std), expected)
    assert layer.kl(torch.zeros(1, 6, 5, 4), torch.ones(6, 1, 1)).item() == 0


def test_kl_of_laplace_noise_is_refused():
    with pytest.raises(InputError, match="laplace"):
        Perturbation((6,), -1, law="laplace").kl(torch.zeros(1, 6), torch.ones(6))


@pytest.mark.parametrize(
    "wrong", [{"mode": "local"}, {"law": "cauchy"}, {"std_init": 0.0}, {"std_floor": -0.1}, {"strength": math.nan}, {"strength": -1.0}]
)
def test_arguments_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Perturbation((6,), -1, **wrong)
