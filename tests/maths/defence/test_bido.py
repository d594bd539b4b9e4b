"""BiDO against plain NumPy: its measures, its loss, and that the loss is fit for attackers. All images are synthetic."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, hessian, vmap

from gidef import build, config
from gidef.defence import Defence
from gidef.defence.bido import BiDODefence, BiDOSettings, _largest_eigenvalue, compared, dependence_terms, gaussian_kernel, linear_kernel, prepared
from gidef.errors import InputError
from gidef.models import SplitModel, stages
from gidef.types import Client

CLASSES, SHAPE = 3, (2, 8, 8)
VARIANTS = [("hsic", "spectral"), ("coco", "spectral"), ("coco", "frobenius")]


class Backbone(nn.Module):
    """Two smooth stages and a linear layer."""

    cuts = ("first", "second")
    default_cut = "first"

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.Tanh())
        self.second = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.Tanh())
        self.head = nn.Linear(24, CLASSES)

    def forward(self, images):
        return self.head(self.second(self.first(images)).flatten(1))


def make_model(dtype=torch.float64):
    backbone, draw = Backbone(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in backbone.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
    return SplitModel(backbone, image_shape=SHAPE, num_classes=CLASSES).to(dtype)


def a_batch(size=6, seed=0, dtype=torch.float64):
    """images, and labels that are not all alike."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % CLASSES
    return torch.rand(size, *SHAPE, generator=draw, dtype=torch.float64).to(dtype), labels[torch.randperm(size, generator=draw)]


def one_hot(labels, dtype=torch.float64):
    return F.one_hot(labels, CLASSES).to(dtype)


# --- written down once more, in NumPy ---------------------------------------------------------------------------------


def np_gaussian(a):
    a = a.reshape(len(a), -1)
    kernel = np.empty((len(a), len(a)))
    for i in range(len(a)):
        for j in range(len(a)):
            kernel[i, j] = np.exp(-np.sum((a[i] - a[j]) ** 2) / (2 * 5.0**2 * a.shape[1]))
    return kernel


def np_linear(a):
    return a.reshape(len(a), -1) @ a.reshape(len(a), -1).T


def np_measure(left, right, measure, norm):
    """d of two kernel matrices, as method.md has it."""
    m = len(left)
    centre = np.eye(m) - np.ones((m, m)) / m
    if measure == "hsic":
        smoothed = [kernel @ centre @ np.linalg.inv(kernel @ centre + m * 1e-5 * np.eye(m)) for kernel in (left, right)]
        return np.trace(smoothed[0] @ smoothed[1])
    product = centre @ left @ centre @ centre @ right @ centre
    return np.sqrt(np.linalg.norm(product, 2 if norm == "spectral" else "fro")) / m


def np_terms(images, hidden, targets, settings):
    x, y, total = np_gaussian(images), np_linear(targets), 0.0
    for features in hidden:
        z = np_gaussian(features)
        total += settings.x_weight * np_measure(x, z, settings.measure, settings.norm)
        total -= settings.y_weight * np_measure(z, y, settings.measure, settings.norm)
    return total


def np_loss(model, images, targets, settings):
    net = model.backbone
    with torch.no_grad():
        first = net.first(images)
        second = net.second(first)
        logits = net.head(second.flatten(1)).double().numpy()
    y = targets.double().numpy()
    ce = -np.mean(np.sum(y * (logits - np.log(np.exp(logits).sum(1, keepdims=True))), axis=1))
    return ce + np_terms(images.double().numpy(), [first.double().numpy(), second.double().numpy()], y, settings)


@pytest.mark.parametrize(("measure", "norm"), VARIANTS)
@pytest.mark.parametrize("size", [2, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_measures_are_numpys(measure, norm, size, dtype):
    draw = torch.Generator().manual_seed(1)
    a, b = torch.rand(size, 3, 4, 4, generator=draw).to(dtype), torch.randn(size, 10, generator=draw).to(dtype)
    y = F.one_hot(torch.arange(size) % 2, 2).to(dtype)
    for right, other, reference in ((b, gaussian_kernel, np_gaussian), (y, linear_kernel, np_linear)):
        found = compared(prepared(gaussian_kernel(a), measure), prepared(other(right), measure), measure, norm)
        expected = np_measure(np_gaussian(a.double().numpy()), reference(right.double().numpy()), measure, norm)
        assert expected > 1e-6
        assert found.dtype == torch.float64 and float(found) == pytest.approx(expected, rel=1e-8 if dtype == torch.float64 else 2e-5)


def test_the_two_norms_of_coco_differ():
    images, _ = a_batch(8)
    left, right = (prepared(gaussian_kernel(t), "coco") for t in (images, images.flip(0)))
    spectral, frobenius = (float(compared(left, right, "coco", norm)) for norm in ("spectral", "frobenius"))
    assert 0 < spectral < 0.999 * frobenius


@pytest.mark.parametrize(("measure", "norm"), VARIANTS)
def test_the_loss_is_cross_entropy_and_numpys_terms_over_all_stages(measure, norm):
    settings = BiDOSettings(measure, 0.7, 1.3, norm)
    defence, (images, labels) = BiDODefence(make_model(), settings), a_batch()
    assert defence.stages == ["first", "second"]
    player = defence.player()
    player.begin(Client(0, images, labels), seed=0, round=0, progress=0.0, first=True)
    loss = float(player.loss(images, labels, rows=torch.arange(6), epoch=0).detach())
    assert loss == pytest.approx(np_loss(defence.model, images, one_hot(labels), settings), rel=1e-9)
    assert abs(loss - float(F.cross_entropy(defence.model(images), labels).detach())) > 1e-3
    simulate = defence.simulator()()
    soft = torch.softmax(torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(3), dtype=torch.float64), 1)
    found = float(simulate.loss(defence.initial(), {}, images, soft, None).detach())
    assert found == pytest.approx(np_loss(defence.model, images, soft, settings), rel=1e-9)


@pytest.mark.parametrize(("measure", "norm"), VARIANTS)
def test_the_simulated_gradient_is_the_players_and_numpys_slope(measure, norm):
    settings = BiDOSettings(measure, 0.7, 1.3, norm)
    defence, (images, labels) = BiDODefence(make_model(), settings), a_batch()
    player = defence.player()
    player.loss(images, labels, rows=torch.arange(6), epoch=0).backward()
    params = defence.initial()
    found = defence.simulator()()(params, {}, images, one_hot(labels), None)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, player.model.get_parameter(name).grad, rtol=1e-9, atol=1e-12)
    name, step, model = "backbone.first.0.weight", 1e-5, copy.deepcopy(defence.model)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            model.get_parameter(name).copy_(params[name] + sign * step * params[name].sin())
        values.append(np_loss(model, images, one_hot(labels), settings))
    assert float((found[name] * params[name].sin()).sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)
    # of the cross-entropy alone
    plain = defence.simulator(terms="utility")()(params, {}, images, one_hot(labels), None)
    expected = Defence(make_model()).simulator()()(params, {}, images, one_hot(labels), None)
    assert all(torch.equal(plain[key], expected[key]) for key in plain)


@pytest.mark.parametrize(("measure", "norm"), VARIANTS)
def test_the_simulator_runs_under_vmap_and_differentiates_twice(measure, norm):
    defence = BiDODefence(make_model(), BiDOSettings(measure, 0.7, 1.3, norm))
    params, simulate = defence.initial(), defence.simulator()()

    def fit(images, targets):
        return sum(gradient.square().sum() for gradient in simulate(params, {}, images, targets, None).values())

    batches = [a_batch(seed=seed) for seed in range(2)]
    images, targets = torch.stack([x for x, _ in batches]), torch.stack([one_hot(y) for _, y in batches])
    together = vmap(grad(fit, argnums=(0, 1)))(images, targets)
    for index in range(2):
        for one, both in zip(grad(fit, argnums=(0, 1))(images[index], targets[index]), together, strict=True):
            torch.testing.assert_close(both[index], one, rtol=1e-6, atol=1e-9)
            assert one.isfinite().all() and one.count_nonzero()
    step, direction = 1e-5, torch.randn(images[0].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    slope = (fit(images[0] + step * direction, targets[0]) - fit(images[0] - step * direction, targets[0])) / (2 * step)
    torch.testing.assert_close((together[0][0] * direction).sum(), slope, rtol=1e-4, atol=1e-7)


def test_the_largest_eigenvalue_has_numpys_value_and_slopes_although_others_coincide():
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=draw, dtype=torch.float64)).Q
    values = torch.tensor([0.0, 0.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    matrix = basis @ torch.diag(values) @ basis.T
    way = torch.randn(5, 5, generator=draw, dtype=torch.float64)
    way = way + way.T

    def along(t):
        return _largest_eigenvalue(matrix + t * way)

    def numpys(t):
        return np.linalg.eigvalsh((matrix + t * way).numpy())[-1]

    zero, h = torch.zeros((), dtype=torch.float64), 1e-4
    assert float(along(zero)) == pytest.approx(3.0, rel=1e-12)
    assert float(grad(along)(zero)) == pytest.approx((numpys(h) - numpys(-h)) / (2 * h), rel=1e-6)
    second = hessian(along)(zero), grad(grad(along))(zero)
    for found in second:
        assert float(found) == pytest.approx((numpys(h) - 2 * numpys(0.0) + numpys(-h)) / h**2, rel=1e-5)


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("measure", "norm"), VARIANTS)
def test_one_image_is_cross_entropy_exactly(measure, norm):
    defence, plain = BiDODefence(make_model(torch.float32), BiDOSettings(measure, 1.0, 50.0, norm)), Defence(make_model(torch.float32))
    images, labels = a_batch(1, dtype=torch.float32)
    place = (defence.initial(), {}, images, one_hot(labels, torch.float32), None)
    found, expected = defence.simulator()()(*place), plain.simulator()()(*place)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    losses = [one.player().loss(images, labels, rows=torch.arange(1), epoch=0) for one in (defence, plain)]
    assert torch.equal(*losses)


def test_zero_weights_are_the_undefended_client_bit_for_bit():
    recipe, shape = config.Recipe(), build.Shape(4, (3, 16, 16))
    images, labels = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])
    results = []
    for chosen in (config.Undefended(), config.BiDO(x_weight=0.0, y_weight=0.0), config.BiDO()):
        defence = build.make_defence(chosen, recipe, shape, seed=3)
        assert defence.noise_shape is None and defence.own_terms == isinstance(chosen, config.BiDO)
        player = defence.player()
        player.loss(images, labels, rows=torch.arange(5), epoch=0).backward()
        gradient = {name: p.grad for name, p in player.model.named_parameters()}
        results.append((defence.simulator()()(defence.initial(), {}, images, F.one_hot(labels, 4).float(), None), gradient))
    undefended, idle, defended = results
    for ours, theirs in zip(idle, undefended, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(torch.equal(defended[0][name], undefended[0][name]) for name in undefended[0] if "blocks" in name)


@pytest.mark.parametrize(("measure", "norm"), VARIANTS)
def test_a_batch_without_variety_has_finite_gradients(measure, norm):
    defence = BiDODefence(make_model(torch.float32), BiDOSettings(measure, 0.7, 1.3, norm))
    images, _ = a_batch(4, dtype=torch.float32)
    for given, labels in ((images, torch.zeros(4, dtype=torch.int64)), (images[:1].expand(4, -1, -1, -1), torch.arange(4) % CLASSES)):
        found = defence.simulator()()(defence.initial(), {}, given, one_hot(labels, torch.float32), None)
        assert all(gradient.isfinite().all() for gradient in found.values())


def test_terms_under_autocast_are_in_full_precision():
    images, labels = a_batch(6, dtype=torch.float32)
    settings, hidden = BiDOSettings(), [images.mul(2).tanh()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dependence_terms(images, hidden, one_hot(labels), settings)
    assert torch.equal(found, dependence_terms(images, hidden, one_hot(labels), settings))


def test_stages_of_real_backbones_and_of_one_that_tells_none():
    recipe, shape = config.Recipe(model=config.Model(name="resnet18")), build.Shape(4, (3, 16, 16))
    defence = build.make_defence(config.BiDO(measure="coco"), recipe, shape, seed=0)
    assert defence.stages == ["layer1", "layer2", "layer3", "layer4"]
    images, labels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    loss = defence.player().loss(images, labels, rows=torch.arange(3), epoch=0)
    assert torch.isfinite(loss) and loss != F.cross_entropy(defence.model(images), labels)
    with pytest.raises(InputError, match="tells no stages"):
        stages(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


def test_a_ratio_gives_the_labels_their_weight_and_none_leaves_it():
    recipe, shape = config.Recipe(), build.Shape(4, (3, 16, 16))
    for chosen, weights in ((config.BiDO(), (0.05, 0.5)), (config.BiDO(x_weight=0.2, y_ratio=20.0), (0.2, 4.0)), (config.BiDO(x_weight=0.2, y_ratio=0.0), (0.2, 0.0))):
        settings = build.make_defence(chosen, recipe, shape, seed=0).settings
        assert (settings.x_weight, settings.y_weight) == pytest.approx(weights)


def test_losses_that_couple_a_batch_say_so():
    assert config.BiDO.couples_batch and config.BiDO().couples_batch
    assert [config.LearnedPerturbation(dependence=name).couples_batch for name in ("pearson2", "dcor", "cka")] == [False, True, True]
    assert not config.LearnedPerturbation(dependence="dcor", dependence_weight=0.0).couples_batch
    assert not getattr(config.IsotropicNoise(), "couples_batch", False)
