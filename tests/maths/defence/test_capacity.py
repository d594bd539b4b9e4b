"""Bits through a noisy latent: the water-filling capacity against a brute-force search, the bound against a case with a known answer."""

import math

import numpy as np
import pytest
import torch

from gidef import build
from gidef.clients.local import LocalSettings, train_locally
from gidef.config import CapacityNoise, Data, LocalTraining, Model, Recipe, problems
from gidef.defence.capacity import capacity_bits, certify, fano_bound, lifetime_releases, measured_bits, water_filling
from gidef.errors import InputError
from gidef.models import latent_norm
from gidef.rng import generator
from gidef.types import Client


def bits(power, variance):
    return 0.5 * np.log2(1 + power / variance).sum(-1)


@pytest.mark.parametrize("std", [[1.0], [0.5, 2.0], [0.1, 1.0, 3.0], [1.0, 1.0, 1.0, 4.0]])
def test_no_division_of_the_power_carries_more(std):
    """All divisions on a fine grid of the simplex, and many random ones."""
    variance = np.array(std) ** 2
    d = len(std)
    draws = np.random.default_rng(0).dirichlet(np.full(d, 0.5), 200_000) * d
    best = bits(draws, variance).max()
    found = float(capacity_bits(torch.tensor(std, dtype=torch.float64)))
    assert best <= found + 1e-9
    assert found - best < (1e-9 if d == 1 else 0.02)
    filled = water_filling(torch.tensor(variance), float(d)).numpy()
    assert filled.sum() == pytest.approx(d) and (filled >= 0).all()
    levels = (filled + variance)[filled > 0]
    np.testing.assert_allclose(levels, levels[0])
    assert (variance[filled == 0] >= levels[0] - 1e-12).all()


def test_a_level_that_is_no_number_has_no_capacity_and_no_index_of_its_own():
    std = torch.tensor([math.nan, math.nan, math.nan], requires_grad=True)
    assert capacity_bits(std).isnan() and capacity_bits(torch.tensor([math.inf, math.inf])).isnan()


def test_equal_noise_is_the_textbook_channel():
    assert float(capacity_bits(torch.full((64,), 2.0, dtype=torch.float64))) == pytest.approx(32 * math.log2(1.25))


def test_its_slope_is_that_of_finite_differences():
    std = torch.tensor([0.3, 0.9, 1.5, 6.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(capacity_bits, (std,))
    slope = torch.autograd.grad(capacity_bits(std), std)[0]
    assert (slope[:3] < 0).all() and slope[3] == 0  # the noisiest entry is not in use


def test_measured_power_never_exceeds_the_capacity():
    g = generator(0, "capacity")
    for scale in (0.1, 1.0, 10.0):
        latents = latent_norm(torch.randn(50, 16, generator=g, dtype=torch.float64) * torch.rand(16, generator=g, dtype=torch.float64))
        std = scale * (0.1 + torch.rand(16, generator=g, dtype=torch.float64))
        assert float(measured_bits(latents, std)) <= float(capacity_bits(std)) + 1e-9


@pytest.mark.parametrize("std", [0.4, 1.0, 2.5])
def test_the_information_of_a_known_case_stays_below_the_bound(std):
    """m = ±(1, −1), equally likely: the mutual information by Monte Carlo, and by integrating the density of what distinguishes them."""
    g = np.random.default_rng(0)
    m = np.array([[1.0, -1.0], [-1.0, 1.0]])
    sent = g.integers(2, size=400_000)
    z = m[sent] + std * g.standard_normal((len(sent), 2))
    log_odds = -((z[:, None] - m) ** 2).sum(-1) / (2 * std**2)
    posterior = log_odds[np.arange(len(sent)), sent] - np.logaddexp.reduce(log_odds, axis=1)
    information = 1 + posterior.mean() / math.log(2)
    along = np.linspace(-30, 30, 200_001)  # (z₁ − z₂) / √2 is ±√2 with noise σ; the other direction tells nothing
    density = lambda centre: np.exp(-((along - centre) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))  # noqa: E731
    mixed = 0.5 * (density(math.sqrt(2)) + density(-math.sqrt(2)))
    step = along[1] - along[0]
    entropy = -(mixed * np.log2(np.maximum(mixed, 1e-300))).sum() * step
    exact = entropy - 0.5 * math.log2(2 * math.pi * math.e * std**2)
    assert information == pytest.approx(exact, abs=0.01)
    latents = torch.from_numpy(m)
    measured = float(measured_bits(latents, torch.full((2,), std, dtype=torch.float64)))
    assert exact < measured <= float(capacity_bits(torch.full((2,), std, dtype=torch.float64))) + 1e-9


def test_fano_against_a_guesser_who_is_told_everything_but_some_bits():
    """Of 2^k images, b bits narrow them to 2^(k − b): the best guess is right that often, and below the bound."""
    for k in range(1, 9):
        for b in range(k + 1):
            assert 2.0 ** (b - k) <= fano_bound(float(b), [2**k]) <= 1
    for wrong in ([], [0, 0], [3, -1]):
        with pytest.raises(InputError, match="candidates="):
            fano_bound(1.0, wrong)


def test_fano_counts_the_label_that_every_gradient_tells():
    """Who knows the class and b bits more of 2^k images in each of 2^c classes is right that often; classes of other sizes count by their images."""
    for c in range(4):
        for k in range(6):
            for b in range(k + 1):
                assert 2.0 ** (b - k) <= fano_bound(float(b), [2**k] * 2**c) <= 1
    assert fano_bound(0.0, [2] * 8) == 1 and fano_bound(0.018, [16]) < 0.26, "eight classes of two: the label alone names half of them"
    assert fano_bound(1.0, [1, 0, 16, 64]) == pytest.approx((1 + 16 * 2 / 4 + 64 * 2 / 6) / 81)


SOUND = {"level": "global", "law": "gaussian", "policy": "head", "frozen_noise": False, "front_frozen": False, "draws": 10, "candidates": [2**20]}


def test_a_certificate_counts_releases_and_takes_the_least_noisy_client():
    stds = [torch.full((64,), 4.0), torch.full((64,), 2.0)]
    found = certify(stds, **SOUND)
    assert found.bits == pytest.approx(32 * math.log2(1.25)) and found.releases == 10
    assert found.lifetime_bits == pytest.approx(10 * found.bits) and found.fano == 1.0
    once = certify(stds, **SOUND | {"frozen_noise": True, "front_frozen": True, "draws": None})
    assert once.releases == 1 and once.lifetime_bits == once.bits and once.fano == pytest.approx((once.bits + 1) / 20)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"level": "conditional"}, "depends on the image"),
        ({"law": "laplace"}, "Gaussian"),
        ({"policy": "full"}, "no such bound"),
        ({"policy": "all"}, "no such bound"),
        ({"frozen_noise": True}, "Freeze the front"),
        ({"draws": None}, "not counted"),
    ],
)
def test_where_an_assumption_fails_nothing_is_certified(change, said):
    with pytest.raises(InputError, match=said):
        certify([torch.ones(4)], **SOUND | change)


WHOLE = {"policy": "head", "frozen_noise": False, "front_frozen": True, "level_still": True, "encoded": False, "draws": 12}


def test_releases_of_a_lifetime_are_all_draws_or_one():
    assert lifetime_releases(**WHOLE) == 12
    assert lifetime_releases(**WHOLE | {"frozen_noise": True, "draws": None}) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy": "full"}, "no such bound"),
        ({"encoded": True}, "encoded"),
        ({"front_frozen": False}, "the front trains"),
        ({"level_still": False}, "the level learns"),
        ({"draws": None}, "not counted"),
    ],
)
def test_where_releases_are_not_all_counted_there_is_no_lifetime(change, said):
    with pytest.raises(InputError, match=said):
        lifetime_releases(**WHOLE | change)


def test_bits_of_fresh_releases_add_up_and_no_estimator_beats_them():
    """A Gaussian source of power P through σ = 1, T times: ½ log₂(1 + T P) ≤ T · ½ log₂(1 + P), and a Monte-Carlo estimate of the former agrees."""
    power, draws, count = 1.0, 3, 200_000
    g = generator(0, "lifetime")
    x = torch.randn(count, generator=g, dtype=torch.float64) * power**0.5
    seen = x[:, None] + torch.randn(count, draws, generator=g, dtype=torch.float64)
    inside = torch.eye(draws, dtype=torch.float64) + power * torch.ones(draws, draws, dtype=torch.float64)
    marginal = torch.distributions.MultivariateNormal(torch.zeros(draws, dtype=torch.float64), inside).log_prob(seen)
    given = torch.distributions.Normal(x[:, None], 1.0).log_prob(seen).sum(1)
    estimate = float((given - marginal).mean()) / math.log(2)
    one = float(capacity_bits(torch.ones(1, dtype=torch.float64), power))
    assert estimate == pytest.approx(0.5 * math.log2(1 + draws * power), abs=0.01)
    assert one < estimate < lifetime_releases(**WHOLE | {"draws": draws}) * one


# --- in training -----------------------------------------------------------------------------------------------------


class Shapes:
    num_classes, image_shape = 8, (3, 28, 28)


def defence(**fields):
    recipe = Recipe(data=Data(name="synthetic"), model=Model(cut="neck", neck=16), share_policy="head")
    return build.make_defence(CapacityNoise(**fields), recipe, Shapes, seed=0)


def trained(one, steps=6):
    g = generator(0, "capacity client")
    client = Client(0, torch.randint(256, (32, 3, 28, 28), generator=g, dtype=torch.uint8), torch.randint(8, (32,), generator=g))
    player = one.player()
    player.begin(client, seed=0, round=0, progress=0.0, first=True)
    start = one.initial_model()
    result = train_locally(player, start, client, LocalSettings(batch_size=8, lr=0.05, epochs=2, steps=steps), seed=0, round=0)
    return start, result.delta


def test_more_weight_on_bits_learns_more_noise():
    levels = [trained(defence(bits_weight=weight))[1]["perturbation.level"].mean() for weight in (0.0, 0.05, 5.0)]
    assert levels[0] < levels[2] and levels[1] < levels[2] and levels[2] > 0


def test_the_latent_is_the_neck_s_and_a_frozen_front_stands_still():
    one = defence(bits_weight=0.1, front="frozen")
    assert one.noise_shape == (16,) and set(one.model.parts["predictor"]) == {"backbone.head.weight", "backbone.head.bias"}
    _, delta = trained(one)
    for name, tensor in delta.items():
        assert bool(tensor.any()) == (name not in one.model.parts["encoder"]), name
    for fields in ({"frozen": True}, {"level": "fixed"}):
        _, delta = trained(defence(bits_weight=0.1, front="frozen", **fields))
        assert {name for name, tensor in delta.items() if tensor.any()} == set(one.model.parts["predictor"])


def test_recipes_that_break_its_promises_are_refused():
    assert any("std_floor=0" in text for text in problems(Recipe(defences={"c": CapacityNoise(std_floor=0.0)})))
    for fields in ({"front": "frozen"}, {"level": "fixed"}):
        decaying = Recipe(defences={"c": CapacityNoise(**fields)}, clients=LocalTraining(weight_decay=0.1))
        assert any("weight_decay=0.1 moves it" in text for text in problems(decaying))
    assert any("model.neck" in text for text in problems(Recipe(model=Model(name="resnet18", neck=8))))
