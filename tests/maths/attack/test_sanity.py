"""What an attack must do before its failure may be called a defence. Images are synthetic."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad

from gidef.attack import inverting_gradients, joint, naive, run
from gidef.types import Observation

DOUBLE = {"seed": 0, "dtype": torch.float64, "at_once": 16}


def error(found, images):
    return float((found.images.double() - images).square().mean())


def test_matching_recovers_the_image_of_a_linear_layer_with_bias_exactly():
    """Known answer: ∂L/∂W = (∂L/∂b) xᵀ, so x is a row of one over the entry of the other."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    params = {name: torch.randn(p.shape, generator=draw, dtype=torch.float64) for name, p in model.named_parameters()}
    image = torch.rand(1, 1, 2, 2, generator=draw, dtype=torch.float64)

    def simulate(params, known, images, labels, noise):
        return grad(lambda p: F.cross_entropy(functional_call(model, p, (images,)), labels))(params)

    update = simulate(params, {}, image, F.one_hot(torch.tensor([1]), 3).double(), None)
    torch.testing.assert_close(update["1.weight"][0] / update["1.bias"][0], image.flatten())
    settings = naive(image_shape=(1, 2, 2), num_classes=3, tv=0.0, lr=0.3, iterations=400)
    (found,) = run([Observation(params, update, 1)], lambda: simulate, settings, **DOUBLE)
    torch.testing.assert_close(found.images.double(), image, rtol=0, atol=1e-6)


def defended(tiny, sigma, seeds, **fields):
    model = tiny.Net(sigma=sigma, activation=nn.Sigmoid)  # smooth, so that few iterations say much
    simulate, params = tiny.simulator(model), tiny.weights(model)
    made = [tiny.observe(simulate, params, seed=seed, noise=tiny.draw_noise(seed) if sigma else None, **fields) for seed in seeds]
    return simulate, [one[0] for one in made], [one[1] for one in made]


def total_error(found, truth):
    return sum(error(one, images) for one, images in zip(found, truth, strict=True)) / len(truth)


def test_the_joint_attack_started_at_the_true_images_and_noise_stays_there(tiny):
    """Adam's steps are as large at the truth as anywhere, so small ones here: the path stays close, the result exact."""
    simulate, observations, truth = defended(tiny, 1.0, range(4))
    losses = {}
    for beside in (0.0, 0.2):
        settings = joint(
            noise_shape=(1, *tiny.latent), iterations=40, tv=0.0, noise_weight=0.0, lr=1e-4, noise_lr=1e-4,
            start=lambda observation, restart, beside=beside: (truth[observation], tiny.draw_noise(observation) + beside), **tiny.settings,
        )  # fmt: skip
        found = run(observations, lambda: simulate, settings, **DOUBLE)
        losses[beside] = max(float(one.losses.max()) for one in found)
        if not beside:
            assert total_error(found, truth) < 1e-12 and all(one.loss < 1e-12 for one in found)
    assert losses[0.0] < 1e-5 < 1e-3 < losses[0.2], losses


def test_noise_that_is_granted_leaves_the_attacker_where_there_was_none(tiny):
    seeds, settings, errors = range(6), naive(iterations=120, tv=0.0, **tiny.settings), []
    for sigma in (0.0, 1.0):
        model = tiny.Net(sigma=sigma, activation=nn.Sigmoid)
        simulate, params = tiny.simulator(model), tiny.weights(model)
        made = [tiny.observe(simulate, params, seed=seed, known={"noise": tiny.draw_noise(seed)}) for seed in seeds]
        found = run([one[0] for one in made], lambda simulate=simulate: simulate, settings, **DOUBLE)
        errors.append(total_error(found, [one[1] for one in made]))
    assert errors[0] < 0.03 and errors[1] < 1.5 * errors[0], errors  # random images on [0, 1] are 0.17 apart


def test_more_noise_never_helps_the_naive_attacker_and_the_joint_one_is_hurt_less(tiny):
    seeds, errors = range(8), {}
    settings = {"iterations": 90, **tiny.settings}
    for sigma in (0.0, 0.5, 1.0, 2.0):
        simulate, observations, truth = defended(tiny, sigma, seeds)

        def noise_free(params, known, images, labels, noise, simulate=simulate):
            return simulate(params, known, images, labels, None)

        errors[sigma] = total_error(run(observations, lambda s=noise_free: s, naive(**settings), **DOUBLE), truth)
        if sigma == 1.0:
            matching = joint(noise_shape=(1, *tiny.latent), **settings)
            searched = total_error(run(observations, lambda s=simulate: s, matching, **DOUBLE), truth)
    assert errors[0.0] < errors[0.5] + 0.003 < errors[1.0] + 0.006 < errors[2.0] + 0.009, errors
    assert errors[2.0] > 2 * errors[0.0] and searched < 0.8 * errors[1.0], (errors, searched)


class SmallNet(nn.Module):
    """The net of the quick runs: three strided convolutions with GroupNorm and LeakyReLU."""

    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.LeakyReLU()) for a, b in ((3, 32), (32, 64), (64, 128))]
        self.body, self.head = nn.Sequential(*blocks), nn.Linear(128, 8)

    def forward(self, images):
        return self.head(self.body(images).mean((-2, -1)))


def test_the_tuned_attack_sees_through_an_untrained_small_net_where_the_published_one_does_not():
    """Smooth synthetic images of 16 px, float32, 150 iterations."""
    draw, model = torch.Generator().manual_seed(0), SmallNet()
    params, fan_in = {}, 1
    for name, p in model.named_parameters():  # as PyTorch starts a layer, with a generator of our own
        fan_in = p[0].numel() if p.ndim > 1 else fan_in
        params[name] = (2 * torch.rand(p.shape, generator=draw) - 1) * fan_in**-0.5
        if name.endswith((".1.weight", ".1.bias")):  # the norms
            params[name] = torch.full_like(p, float(name.endswith("weight")))

    def simulate(params, known, images, labels, noise):
        return grad(lambda p: F.cross_entropy(functional_call(model, p, (images,)), labels))(params)

    truth = 0.5 + 0.3 * F.interpolate(torch.randn(2, 3, 6, 6, generator=draw), size=16, mode="bicubic")
    truth, labels = truth.clamp(0, 1)[:, None], torch.tensor([[1], [4]])
    updates = [simulate(params, {}, x, F.one_hot(y, 8).float(), None) for x, y in zip(truth, labels, strict=True)]
    observations = [Observation(params, update, 1, labels=y) for update, y in zip(updates, labels, strict=True)]
    psnr_db = {}
    for make in (naive, inverting_gradients):
        settings = make(image_shape=(3, 16, 16), num_classes=8, iterations=150)
        found = run(observations, lambda: simulate, settings, seed=0)
        psnr_db[make.__name__] = -10 * torch.tensor([error(f, x) for f, x in zip(found, truth, strict=True)]).log10().mean()
    assert psnr_db["naive"] > 22 and psnr_db["naive"] > psnr_db["inverting_gradients"] + 5, psnr_db  # plain grey: 12 dB


def test_the_naive_attack_searches_no_noise(tiny):
    with pytest.raises(TypeError, match="noise_shape"):
        naive(noise_shape=(1, *tiny.latent), **tiny.settings)


@pytest.mark.parametrize("make", [naive, inverting_gradients])
def test_presets_give_way_to_the_caller_s_settings(make):
    settings = make(image_shape=(1, 4, 4), num_classes=2, lr=0.5, iterations=7)
    assert (settings.lr, settings.iterations, settings.noise_shape) == (0.5, 7, None)
    assert dataclasses.replace(settings, restarts=2).restarts == 2
