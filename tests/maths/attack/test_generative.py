"""Generative priors: fitted for a few steps on synthetic cells, and searched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, grad_and_value, vmap

from gidef.attack.generative import code_prior, encoded, fit_autoencoder, fit_gan, normal_codes, project, renderer, start_from
from gidef.attack.learned import image_loss
from gidef.data import synthetic_blood_cells
from gidef.errors import InputError
from gidef.models.prior import autoencoder_for, gan_for
from gidef.types import Reconstruction

SHAPE, CODE = (3, 12, 12), 16


@pytest.fixture(scope="module")
def cells():
    return synthetic_blood_cells(train=40, val=200, test=8, size=12, seed=7)


@pytest.fixture(scope="module")
def fitted(cells):
    autoencoder = autoencoder_for(SHAPE, code_dim=CODE, width_factor=0.5)
    assert list(fit_autoencoder(autoencoder, cells.val.images, steps=150, seed=0, batch_size=32, lr=3e-3)) == [*range(20, 150, 20), 150]
    return autoencoder


@torch.no_grad()
def heldout(autoencoder, cells):
    images = cells.train.images.float() / 255
    return float(image_loss(autoencoder(images), images).mean())


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_few_steps_reduce_the_auto_encoder_s_loss_on_images_that_it_has_not_seen(cells, fitted):
    images = cells.train.images.float() / 255
    mean = (cells.val.images.float().mean(0) / 255).expand_as(images)
    assert heldout(fitted, cells) < 0.6 * heldout(autoencoder_for(SHAPE, code_dim=CODE, width_factor=0.5), cells)
    assert heldout(fitted, cells) < 0.8 * float(image_loss(mean, images).mean())


def test_the_kl_term_makes_codes_of_images_look_like_normal_draws(cells):
    spread = []
    for weight in (0.0, 0.3):
        autoencoder = autoencoder_for(SHAPE, code_dim=CODE, width_factor=0.25)
        list(fit_autoencoder(autoencoder, cells.val.images, steps=80, seed=0, batch_size=32, lr=3e-3, kl_weight=weight))
        with torch.no_grad():
            mean, log_variance = autoencoder.encode(cells.val.images.float() / 255)
        spread.append(float(abs((mean.square() + log_variance.exp()).mean().log())))  # 0 for the prior's own second moment
    assert spread[1] < 0.15 < spread[0]


def test_a_fit_depends_on_its_seed_alone_and_not_on_the_type_of_the_images(cells):
    state, made = torch.get_rng_state(), []
    for images, seed in ((cells.val.images, 0), (cells.val.images.float() / 255, 0), (cells.val.images, 1)):
        autoencoder, pair = autoencoder_for(SHAPE, code_dim=4, width_factor=0.25), gan_for(SHAPE, code_dim=4, width_factor=0.25)
        list(fit_autoencoder(autoencoder, images, steps=2, seed=seed, batch_size=8))
        list(fit_gan(*pair, images, steps=2, seed=seed, batch_size=8))
        made.append((autoencoder, *pair))
    assert torch.equal(state, torch.get_rng_state())
    assert all(same(one, other) for one, other in zip(made[0], made[1], strict=True))
    assert not any(same(one, other) for one, other in zip(made[0], made[2], strict=True))
    assert not any(module.training for module in made[0])


def test_a_generator_learns_the_colour_of_its_public_images():
    """Known answer: all images are one colour, and so are the generator's in the end."""
    colour = torch.tensor([0.8, 0.3, 0.6])[:, None, None]
    model, critic = gan_for(SHAPE, code_dim=4, width_factor=0.25)
    codes = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (0, 250):
        list(fit_gan(model, critic, colour.expand(32, *SHAPE), steps=steps, seed=0, batch_size=16, lr=1e-3))
        with torch.no_grad():
            errors.append(float((model(codes).mean((0, 2, 3)) - colour.flatten()).abs().max()))
    assert errors[0] > 0.2 and errors[1] < 0.1, errors


def test_a_generator_ends_as_the_mean_of_the_second_half_of_its_path(cells):
    kept = []
    for steps in (1, 2, 3, 4):
        model, critic = gan_for(SHAPE, code_dim=4, width_factor=0.25)
        with pytest.MonkeyPatch.context() as patch:  # the path itself: no averaging
            path = []
            original = torch.optim.Adam.step

            def step(self, *arguments, path=path, model=model, original=original):
                done = original(self, *arguments)
                if self.param_groups[0]["params"][0] is next(model.parameters()):
                    path.append(next(model.parameters()).detach().clone())
                return done

            patch.setattr(torch.optim.Adam, "step", step)
            list(fit_gan(model, critic, cells.val.images, steps=steps, seed=0, batch_size=8, lr=1e-2))
        kept.append((path, next(model.parameters()).detach()))
    for path, final in kept:
        torch.testing.assert_close(final, torch.stack(path[len(path) // 2 :]).mean(0))


def test_a_renderer_is_a_frozen_copy_that_vmap_and_derivatives_go_through(fitted):
    render = renderer(fitted.generator, dtype=torch.float64)
    codes = torch.randn(5, 2, CODE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = vmap(render)(codes)
    assert images.shape == (5, 2, *SHAPE) and not images.requires_grad
    torch.testing.assert_close(images[3].float(), fitted.generator(codes[3].float()).detach(), rtol=1e-4, atol=1e-5)

    def brightness(code):
        return render(code).square().mean()

    slopes = vmap(grad(brightness))(codes)
    step = torch.zeros_like(codes[0])
    step[1, 3] = 1e-6
    assert float(slopes[0, 1, 3]) == pytest.approx(float(brightness(codes[0] + step) - brightness(codes[0] - step)) / 2e-6, rel=1e-4, abs=1e-9)
    before = render(codes[0])
    other = copy.deepcopy(fitted.generator)
    separate = renderer(other, dtype=torch.float64)
    with torch.no_grad():
        other.upsampler.last.bias.add_(3.0)
    assert torch.equal(separate(codes[0]), before)


def test_the_prior_of_a_code_is_its_weighted_mean_square_and_starts_are_normal():
    assert float(code_prior(torch.tensor([[1.0, -2.0], [0.0, 3.0]]), 0.1)) == pytest.approx(0.35)
    draws = normal_codes((500, 8), torch.Generator().manual_seed(0))
    assert draws.shape == (500, 8) and draws.mean() == pytest.approx(0, abs=0.05) and draws.std() == pytest.approx(1, abs=0.05)
    assert torch.equal(draws, normal_codes((500, 8), torch.Generator().manual_seed(0)))


def test_the_code_of_an_image_is_where_a_search_can_begin(cells, fitted):
    images = cells.train.images[:4].double() / 255
    codes = encoded(fitted, images)
    assert codes.shape == (4, CODE) and not codes.requires_grad
    torch.testing.assert_close(fitted.generator(codes).detach(), fitted(images.float()).detach())


def psnr_db(found, truth):
    return -10 * (found - truth).square().flatten(1).mean(1).log10()


def test_an_image_within_the_generator_s_range_is_found_again(fitted):
    render = renderer(fitted.generator)
    true = torch.randn(3, CODE, generator=torch.Generator().manual_seed(1))
    images = render(true)
    found = project(render, images, CODE, seed=0, iterations=200, weight=0.0)
    reached = psnr_db(render(found), images)
    start = psnr_db(render(torch.randn(3, CODE, generator=torch.Generator().manual_seed(2))), images)
    assert reached.min() > 35 and reached.min() > start.max() + 10, (reached, start)
    heavy = project(render, images, CODE, seed=0, iterations=200, weight=10.0)
    assert heavy.square().mean() < 0.05 * found.square().mean()


def test_searching_the_code_of_a_matching_attack_recovers_an_image_within_the_range(fitted):
    """The engine's loop in a few lines: K attacks, each a code, matched by the gradient of what it renders."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.Tanh(), nn.Flatten(), nn.Linear(16 * 36, 8)).requires_grad_(False)
    params, render = dict(net.named_parameters()), renderer(fitted.generator)

    def simulate(images, labels):
        return grad(lambda p: F.cross_entropy(functional_call(net, p, (images,)), labels))(params)

    draw = torch.Generator().manual_seed(3)
    truth, labels = render(torch.randn(1, CODE, generator=draw)), torch.tensor([2])
    observed = simulate(truth, labels)
    norm = sum(t.square().sum() for t in observed.values()).sqrt()

    def objective(code):
        update = simulate(render(code), labels)
        size = sum(t.square().sum() for t in update.values()).sqrt()
        return 1 - sum((update[name] * t).sum() for name, t in observed.items()) / (size * norm) + code_prior(code, 1e-5)

    codes = torch.stack([normal_codes((1, CODE), draw) for _ in range(3)])
    first, evaluate = vmap(render)(codes), vmap(grad_and_value(objective))
    m, v = torch.zeros_like(codes), torch.zeros_like(codes)
    for iteration in range(200):
        gradient, loss = evaluate(codes)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
        step = 0.1 * (1 - iteration / 200) * (m / (1 - 0.9 ** (iteration + 1))) / ((v / (1 - 0.999 ** (iteration + 1))).sqrt() + 1e-12)
        codes = codes - step
    found = vmap(render)(codes)[loss.argmin()]
    assert psnr_db(found, truth) > 30 and psnr_db(found, truth) > psnr_db(first.flatten(0, 1), truth).max() + 10


def test_a_second_phase_starts_at_what_the_first_one_found():
    images, restarts = torch.rand(2, *SHAPE), torch.rand(3, 2, *SHAPE)
    start = start_from([Reconstruction(images, torch.zeros(2), 0.0, torch.zeros(1), restart_images=one) for one in (restarts, None)])
    assert torch.equal(start(0, 1)[0], restarts[1]) and torch.equal(start(0, 3)[0], images) and torch.equal(start(1, 0)[0], images)
    assert start(0, 0)[1] is None


def test_public_images_of_another_shape_are_refused():
    images = torch.rand(5, 1, 12, 12)
    for running in (
        fit_autoencoder(autoencoder_for(SHAPE, code_dim=4, width_factor=0.25), images, steps=1, seed=0),
        fit_gan(*gan_for(SHAPE, code_dim=4, width_factor=0.25), images, steps=1, seed=0),
        fit_gan(*gan_for(SHAPE, code_dim=4, width_factor=0.25), torch.rand(0, *SHAPE), steps=1, seed=0),
    ):
        with pytest.raises(InputError, match="public images"):
            next(running)
