from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

from gidef import similarity
from gidef.attack import priors
from gidef.attack.labels import recover_features
from gidef.errors import InputError


def images(seed=0, shape=(3, 2, 4, 5)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def point(x, *, labels=None, noise=None, params=None, known=None):
    labels = F.one_hot(torch.arange(len(x)) % 3, 3).to(x) if labels is None else labels
    return SimpleNamespace(images=x, labels=labels, noise=noise, params=params or {}, known=known or {})


def layer_statistics(params, known, x):
    """Of the input of two layers, without Bessel's correction."""
    deeper = F.conv2d(x, params["weight"]).tanh()
    return [(one.mean((0, 2, 3)), one.var((0, 2, 3), correction=0)) for one in (x, deeper)]


PARAMS = {"weight": images(9, (4, 2, 3, 3)) - 0.5}


def features_of(params, known, x, noise):
    return (x.flatten(1)[:, :6] @ known["mix"]).tanh()


KNOWN = {"mix": images(7, (6, 4)) - 0.5, "goal": images(8), "features": images(6, (3, 4))}

SMOOTH = {
    "l2": priors.l2(),
    "norm": priors.l2(squared=False),
    "isotropic": priors.total_variation("isotropic", softening=1e-2),
    "double opponents": priors.total_variation("double_opponents", softening=1e-2),
    "squared": priors.total_variation("squared"),
    "bn": priors.bn_statistics(layer_statistics, [(torch.full((n,), 0.3), torch.full((n,), 0.2)) for n in (2, 4)], source="proxy"),
    "bn squared": priors.bn_statistics(
        layer_statistics, lambda params, known: layer_statistics(params, known, known["goal"]), source="batch", squared=True
    ),
    "toward": priors.toward("goal"),
    "decoder": priors.decoder_aware(lambda params, known, x, noise: (x * x.mean()).sin()),
    "orthogonality": priors.orthogonality(),
    "features": priors.feature_match(features_of, "features"),
}
KINKED = {"anisotropic": priors.total_variation()}


def of(prior, **fields):
    return lambda x: prior(point(x, params=PARAMS, known=KNOWN, **fields))


@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_smooth_priors_are_scalars_with_right_first_and_second_derivatives(name):
    x = images(shape=(3, 2, 4, 5)).requires_grad_()
    assert SMOOTH[name](point(x, params=PARAMS, known=KNOWN)).shape == ()
    assert gradcheck(of(SMOOTH[name]), (x,), atol=1e-6)
    assert gradgradcheck(of(SMOOTH[name]), (x,), atol=1e-5)


@pytest.mark.parametrize("name", sorted(SMOOTH | KINKED))
def test_priors_run_vectorised_over_attacks_and_give_the_numbers_of_a_loop(name):
    prior, many = (SMOOTH | KINKED)[name], torch.stack([images(seed) for seed in range(4)])
    together = vmap(grad(of(prior)))(many)
    torch.testing.assert_close(together, torch.stack([grad(of(prior))(one) for one in many]))
    assert together.abs().max() > 0


@pytest.mark.parametrize("name", sorted(SMOOTH | KINKED))
def test_constant_images_have_finite_slopes(name):
    for level in (0.0, 0.5, 1.0):
        assert grad(of((SMOOTH | KINKED)[name]))(torch.full((3, 2, 4, 5), level, dtype=torch.float64)).isfinite().all()


def test_l2_is_the_mean_square_or_the_root_mean_square_distance_from_grey():
    x = images()
    torch.testing.assert_close(priors.l2()(point(x)), ((x - 0.5) ** 2).mean())
    expected = sum(torch.linalg.vector_norm(one - 0.2) / one.numel() ** 0.5 for one in x) / 3
    torch.testing.assert_close(priors.l2(0.2, squared=False)(point(x)), expected)
    grey = torch.full((3, 2, 4, 5), 0.5, dtype=torch.float64)
    assert grad(of(priors.l2(squared=False)))(grey).abs().max() == 0


def test_total_variations_are_those_of_a_plain_loop_over_pixels():
    x = images()
    torch.testing.assert_close(priors.total_variation()(point(x)), similarity.total_variation(x).mean())
    expected, soft = 0.0, 1e-4
    opponents = torch.cat([x, x[:, :1] - x[:, 1:]], 1)
    for image in opponents.flatten(0, 1):
        for i in range(4):
            for j in range(5):
                across = image[i, j + 1] - image[i, j] if j < 4 else 0.0
                down = image[i + 1, j] - image[i, j] if i < 3 else 0.0
                expected = expected + (across**2 + down**2 + soft) ** 0.5 - soft**0.5
    torch.testing.assert_close(priors.total_variation("double_opponents", softening=soft)(point(x)), expected / opponents.numel())
    squared = (x[..., 1:] - x[..., :-1]).square().mean() + (x[..., 1:, :] - x[..., :-1, :]).square().mean()
    torch.testing.assert_close(priors.total_variation("squared")(point(x)), squared)


def test_opponents_charge_edges_of_single_channels_more_than_edges_of_all():
    grey_edge, red_edge = torch.zeros(2, 1, 3, 6, 6, dtype=torch.float64).unbind(0)
    grey_edge[..., 3:] = 1.0
    red_edge[:, 0, :, 3:] = 3.0  # the same isotropic variation
    isotropic, opponents = priors.total_variation("isotropic"), priors.total_variation("double_opponents")
    torch.testing.assert_close(isotropic(point(grey_edge)), isotropic(point(red_edge)), rtol=1e-3, atol=0)
    assert opponents(point(red_edge)) > 1.5 * opponents(point(grey_edge))


def test_grey_images_of_one_channel_have_no_opponents():
    x = images(shape=(2, 1, 5, 5))
    assert torch.equal(priors.total_variation("double_opponents")(point(x)), priors.total_variation("isotropic")(point(x)))


def test_bn_statistics_are_zero_at_the_batch_they_come_from_and_norms_elsewhere():
    x, y = images(), images(1)
    target = layer_statistics(PARAMS, {}, x)
    prior = priors.bn_statistics(layer_statistics, target, source="batch", first_layer=10.0)
    assert prior.source == "batch" and prior(point(x, params=PARAMS)) == 0
    assert grad(of(prior))(x).abs().max() == 0
    expected = 0.0
    for factor, (mean, var), (goal, spread) in zip((10.0, 1.0), layer_statistics(PARAMS, {}, y), target, strict=True):
        expected = expected + factor * (torch.linalg.vector_norm(mean - goal) + torch.linalg.vector_norm(var - spread))
    torch.testing.assert_close(prior(point(y, params=PARAMS)), expected)


def test_descending_the_bn_prior_brings_the_statistics_to_their_target():
    target = layer_statistics(PARAMS, {}, images(3))
    prior = of(priors.bn_statistics(layer_statistics, target, source="proxy", squared=True))
    x = images(4)
    before = prior(x)
    for _ in range(200):
        x = x - 0.1 * grad(prior)(x)
    assert prior(x) < 0.05 * before
    torch.testing.assert_close(layer_statistics(PARAMS, {}, x)[0][0], target[0][0], atol=1e-2, rtol=0)


def test_proxy_statistics_are_means_over_whole_batches_of_public_images():
    public = images(2, (7, 2, 4, 5))
    found = priors.proxy_statistics(layer_statistics, PARAMS, {}, public, batch_size=3)
    pairs = [layer_statistics(PARAMS, {}, public[first : first + 3]) for first in (0, 3)]
    for place in range(2):
        for part in range(2):
            torch.testing.assert_close(found[place][part], (pairs[0][place][part] + pairs[1][place][part]) / 2)
    few = priors.proxy_statistics(layer_statistics, PARAMS, {}, public[:2], batch_size=3)
    torch.testing.assert_close(few[0][0], public[:2].mean((0, 2, 3)))
    for wrong in ({"images": public[:0]}, {"images": public, "batch_size": 0}):
        with pytest.raises(InputError, match="public|proxy"):
            priors.proxy_statistics(layer_statistics, PARAMS, {}, **wrong)


def test_a_decoder_pulls_to_its_image_and_may_be_held_constant():
    x, noise = images(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    decode = lambda params, known, x, noise: 0.5 * x + known["b"] + noise.mean()  # noqa: E731
    fields = {"noise": noise, "known": {"b": torch.tensor(0.1, dtype=torch.float64)}}
    apart = 0.5 * x - 0.1 - noise.mean()
    through, held = (priors.decoder_aware(decode, through=one) for one in (True, False))
    for prior, factor in ((through, 0.5), (held, 1.0)):
        torch.testing.assert_close(prior(point(x, **fields)), apart.square().mean())
        torch.testing.assert_close(grad(lambda x, prior=prior: prior(point(x, **fields)))(x), factor * 2 * apart / x.numel())


def test_toward_takes_a_tensor_a_name_or_a_function():
    x, goal = images(), images(1)
    for reference in (goal, goal.float().double(), "goal", lambda p: p.known["goal"]):
        torch.testing.assert_close(priors.toward(reference)(point(x, known={"goal": goal})), (x - goal).square().mean(), rtol=1e-6, atol=1e-7)
    with pytest.raises(InputError, match="no 'other'"):
        priors.toward("other")(point(x, known={"goal": goal}))
    with pytest.raises(InputError, match="shape"):
        priors.toward(goal[:1])(point(x))


def test_orthogonality_is_zero_for_one_image_and_for_orthogonal_ones_and_one_for_equal_or_inverted_ones():
    prior = priors.orthogonality()
    one = images(shape=(1, 2, 4, 4))
    assert prior(point(one)) == 0 and grad(of(prior))(one).abs().max() == 0
    torch.testing.assert_close(prior(point(torch.cat([one, one, 1 - one]))), torch.tensor(1.0, dtype=torch.float64))
    waves = torch.stack([torch.cos(2 * torch.pi * k * torch.arange(8, dtype=torch.float64) / 8) for k in (1, 2, 3)]).view(3, 1, 1, 8)
    torch.testing.assert_close(prior(point(0.5 + 0.5 * waves)), torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0)
    flat = torch.cat([one, torch.full_like(one, 0.7)])
    assert prior(point(flat)) == 0 and grad(of(prior))(flat).abs().max() == 0


def test_features_are_matched_in_their_class_whatever_the_order_within_it():
    x = images(shape=(4, 2, 4, 5))
    labels = F.one_hot(torch.tensor([0, 2, 0, 1]), 3).double()
    goal = features_of({}, KNOWN, x, None)
    fields = {"labels": labels, "known": KNOWN}
    swapped = goal[[2, 1, 0, 3]]
    per_class, per_image = (priors.feature_match(features_of, swapped, per_class=one) for one in (True, False))
    assert per_class(point(x, **fields)) < 1e-30
    torch.testing.assert_close(per_image(point(x, **fields)), (goal - swapped).square().mean() / goal.square().mean())
    foreign = priors.feature_match(features_of, goal[[1, 0, 2, 3]])
    assert foreign(point(x, **fields)) > 1e-3
    with pytest.raises(InputError, match="shape"):
        priors.feature_match(features_of, goal[:2])(point(x, **fields))


def test_features_recovered_from_a_gradient_are_those_of_the_private_image(tiny):
    model = tiny.Net(activation=nn.LeakyReLU)
    observation, private, _ = tiny.observe(tiny.simulator(model), tiny.weights(model), size=1)

    def last_input(params, known, x, noise):
        kept = []
        hook = model.predictor[-1].register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
        functional_call(model, params, (x,))
        hook.remove()
        return kept[0]

    prior = priors.feature_match(last_input, recover_features(observation, tiny.classes))
    labels = F.one_hot(observation.labels, tiny.classes).double()
    assert prior(point(private, labels=labels, params=observation.params)) < 1e-20
    assert prior(point(1 - private, labels=labels, params=observation.params)) > 1e-3


def test_settings_and_targets_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="kind='sideways'"):
        priors.total_variation("sideways")
    with pytest.raises(InputError, match="softening"):
        priors.total_variation(softening=0.0)
    with pytest.raises(InputError, match="source='truth'"):
        priors.bn_statistics(layer_statistics, [], source="truth")
    with pytest.raises(InputError, match="2 layers against a target of 1"):
        priors.bn_statistics(layer_statistics, [(torch.zeros(2), torch.ones(2))], source="running")(point(images(), params=PARAMS))
