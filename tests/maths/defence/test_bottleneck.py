"""PRECODE and CVB against plain NumPy, and what attackers simulate of them. Random images, the small net."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from gidef import build, config
from gidef.attack.imprint import zeroed_level
from gidef.clients.participate import shared_names
from gidef.errors import InputError
from gidef.models import ConvBottleneck, LinearBottleneck
from gidef.rng import generator
from gidef.types import Client

SHAPE = build.Shape(4, (3, 16, 16))
DEFENCES = {"precode": config.Precode(width=24, kl_weight=0.3), "cvb": config.CVB(kernel=3, kl_weight=0.2)}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(chosen, seed=0, name="small", **model):
    return build.make_defence(chosen, config.Recipe(model=config.Model(name=name, **model)), SHAPE, seed=seed)


def a_batch(size=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(size, 3, 16, 16, generator=draw), torch.arange(size) % 4


def one_hot(labels):
    return F.one_hot(labels, 4).to(torch.get_default_dtype())


def drawn(defence, size=3, seed=0):
    return defence.draw_noise(size, generator=generator(seed, "noise"))


# --- written down once more, in NumPy ---------------------------------------------------------------------------------


def np_softplus(s):
    return np.log1p(np.exp(-np.abs(s))) + np.maximum(s, 0)


def np_conv(z, layer):
    """A convolution of stride 1 that keeps the map's size, position by position."""
    weight, bias = (t.detach().double().numpy() for t in (layer.weight, layer.bias))
    side = weight.shape[2] // 2
    padded = np.pad(z, ((0, 0), (0, 0), (side, side), (side, side)))
    out = np.empty((len(z), len(weight), *z.shape[2:]))
    for i in range(z.shape[2]):
        for j in range(z.shape[3]):
            patch = padded[:, :, i : i + 2 * side + 1, j : j + 2 * side + 1]
            out[:, :, i, j] = np.tensordot(patch, weight, ([1, 2, 3], [1, 2, 3])) + bias
    return out


def np_linear(z, layer):
    return z @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()


def np_precode(layer, z, noise):
    """μ, σ, z̃, KL in bits."""
    flat = z.reshape(len(z), -1)
    mean, std = np_linear(flat, layer.mean), np_softplus(np_linear(flat, layer.level))
    kl = np.mean([sum(-0.5 * (1 + 2 * np.log(s) - m**2 - s**2) for m, s in zip(*pair, strict=True)) for pair in zip(mean, std, strict=True)])
    return mean, std, np_linear(mean + std * noise, layer.back).reshape(z.shape), kl / math.log(2)


def np_cvb(layer, z, noise):
    """μ, σ, z̃, KL in nats."""
    mean, std = np_conv(z, layer.mean), np_softplus(np.clip(np_conv(z, layer.level), -5, 5))
    kl = (0.5 * (std**2 + mean**2 - 1) - np.log(std)).sum(1).mean()
    return mean, std, np_conv(mean + std * noise, layer.back), kl


REFERENCES = {"precode": np_precode, "cvb": np_cvb}


def np_run(name, defence, images, noise):
    """What the reference makes of the latent, and the loss. noise (B, *noise_shape), or 0."""
    model, net = defence.model, defence.model.backbone
    with torch.no_grad():
        first = net.blocks[0]((images - 0.5) / 0.25)
        z = first if name == "cvb" else F.adaptive_avg_pool2d(net.blocks[2](net.blocks[1](first)), 2).flatten(1)
    return REFERENCES[name](model.perturbation, z.double().numpy(), noise)


@pytest.mark.parametrize("name", DEFENCES)
@pytest.mark.parametrize("noisy", [True, False])
def test_code_level_latent_and_loss_are_numpys(name, noisy):
    defence, (images, labels) = made(DEFENCES[name]), a_batch()
    noise = drawn(defence) if noisy else None
    mean, std, restored, kl = np_run(name, defence, images, noise.double().numpy() if noisy else 0.0)
    outputs = defence.model.run(images, noise)
    for found, expected in zip((outputs.latent, outputs.std, outputs.perturbed), (mean, std, restored), strict=True):
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert float(defence.model.perturbation.kl(outputs.latent, outputs.std).detach()) == pytest.approx(kl, rel=1e-5) and kl > 0.1
    logits = defence.model.predict(torch.from_numpy(restored).float())
    torch.testing.assert_close(outputs.logits, logits, rtol=1e-4, atol=1e-5)
    weight = defence.settings.kl_weight
    expected = float(F.cross_entropy(logits, labels).detach()) + weight * kl
    loss = defence.simulator()().loss(defence.initial(), {}, images, one_hot(labels), noise)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    utility = defence.simulator(terms="utility")().loss(defence.initial(), {}, images, one_hot(labels), noise)
    assert float(utility.detach()) == pytest.approx(expected - weight * kl, rel=1e-5)


@pytest.mark.parametrize("name", DEFENCES)
def test_a_client_plays_what_the_attacker_simulates_with_fresh_noise(name):
    defence, (images, labels) = made(DEFENCES[name]), a_batch()
    player = defence.player()
    player.begin(Client(5, images, labels), seed=1, round=2, progress=0.0, first=True)
    losses = [player.loss(images, labels, rows=torch.arange(3), epoch=0) for _ in range(2)]
    assert losses[0] != losses[1]
    losses[0].backward()
    noise = defence.draw_noise(3, generator=generator(1, "noise", 2, 5))
    found = defence.simulator()()(defence.initial(), {}, images, one_hot(labels), noise)
    assert {"perturbation.mean.weight", "perturbation.level.bias", "perturbation.back.weight"} <= set(found)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, player.model.get_parameter(key).grad, rtol=1e-4, atol=1e-7)
        assert gradient.count_nonzero()


@pytest.mark.parametrize("name", DEFENCES)
def test_the_simulator_runs_under_vmap_and_differentiates_twice_by_images_and_noise(name):
    defence = made(DEFENCES[name])
    defence.model.double()
    params, simulate = defence.initial(), defence.simulator()()

    def fit(images, noise):
        targets = F.one_hot(torch.arange(2), 4).double()
        return sum(gradient.square().sum() for gradient in simulate(params, {}, images, targets, noise).values())

    images, noise = torch.stack([a_batch(2, seed)[0] for seed in range(2)]).double(), torch.stack([drawn(defence, 2, seed) for seed in range(2)]).double()
    together = vmap(grad(fit, argnums=(0, 1)))(images, noise)
    for index in range(2):
        for alone, both in zip(grad(fit, argnums=(0, 1))(images[index], noise[index]), together, strict=True):
            torch.testing.assert_close(both[index], alone, rtol=1e-8, atol=1e-10)
            assert alone.count_nonzero()
    step, way = 1e-5, torch.randn(noise[0].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    slope = (fit(images[0], noise[0] + step * way) - fit(images[0], noise[0] - step * way)) / (2 * step)
    torch.testing.assert_close((together[1][0] * way).sum(), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("name", "place", "code", "latent"), [("precode", "before:head", (24,), (512,)), ("cvb", "blocks.0", (16, 8, 8), (32, 8, 8))])
def test_places_shapes_and_what_head_shares(name, place, code, latent):
    defence = made(DEFENCES[name])
    assert (defence.model.cut, defence.noise_shape, defence.model.latent_shape) == (place, code, latent)
    assert drawn(defence).shape == (3, *code) and defence.decoder is None
    shared = set(shared_names(defence.initial(), defence.model.parts["predictor"], "head"))
    assert shared and not any(part.startswith("perturbation.") for part in shared)
    assert (shared == {"backbone.head.weight", "backbone.head.bias"}) == (name == "precode")
    moved = made(type(DEFENCES[name])(cut="blocks.1"))
    assert moved.model.cut == "blocks.1" and moved.noise_shape == {"precode": (256,), "cvb": (32, 4, 4)}[name]
    assert torch.isfinite(moved.model(a_batch()[0], drawn(moved))).all()


def test_a_bottleneck_after_the_first_stage_of_other_nets():
    assert made(config.CVB(), name="resnet18").model.cut == "layer1"
    channels_last = ConvBottleneck((4, 4, 12), -1, kernel=3)
    z = torch.randn(2, 4, 4, 12, generator=torch.Generator().manual_seed(0))
    mean, std = channels_last(z)
    np.testing.assert_allclose(mean.detach().numpy(), np_conv(z.movedim(-1, 1).double().numpy(), channels_last.mean), rtol=1e-4, atol=1e-5)
    assert mean.shape == std.shape == (2, 6, 4, 4) and channels_last.restore(mean).shape == z.shape
    assert ConvBottleneck((4, 3, 3), 1).noise_shape == (8, 3, 3)
    with pytest.raises(InputError, match="needs a map"):
        made(config.CVB(), name="vit_tiny_patch16_224")
    with pytest.raises(InputError, match="odd"):
        ConvBottleneck((8, 4, 4), 1, kernel=2)
    with pytest.raises(InputError, match="at least 1"):
        LinearBottleneck((8,), -1, width=0)


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_backbones_as_they_are():
    for chosen in DEFENCES.values():
        torch.manual_seed(1)
        first = made(chosen).initial()
        torch.manual_seed(2)
        again, other = made(chosen).initial(), made(chosen, seed=1).initial()
        plain = made(config.Undefended()).initial()
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert all(torch.equal(first[key], plain[key]) for key in plain)
        assert not torch.equal(first["perturbation.mean.weight"], other["perturbation.mean.weight"])
        assert not torch.equal(first["perturbation.mean.weight"], first["perturbation.level.weight"])


@pytest.mark.parametrize(("name", "left"), [("precode", 0.0), ("cvb", math.log1p(math.exp(-5)))])
def test_a_server_that_sends_a_level_of_nought_takes_the_noise_away_and_gets_finite_gradients(name, left):
    defence, (images, labels) = made(DEFENCES[name]), a_batch()
    params = zeroed_level(defence.initial())
    changed = {key for key, tensor in params.items() if not torch.equal(tensor, defence.initial()[key])}
    assert changed == {"perturbation.level.weight", "perturbation.level.bias"}
    found = defence.simulator()()(params, {}, images, one_hot(labels), drawn(defence))
    assert all(gradient.isfinite().all() for gradient in found.values())
    build.load_parameters(defence.model, params)
    assert float(defence.model.run(images).std.detach().max()) == pytest.approx(left, rel=1e-5, abs=1e-12)
