import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

from gidef.attack.kinks import CurvedKinks

KINKED = {
    "F.relu": (F.relu, [(0.0, 1.0)]),
    "torch.relu": (torch.relu, [(0.0, 1.0)]),
    "method": (lambda z: z.relu(), [(0.0, 1.0)]),
    "in place": (lambda z: nn.ReLU(inplace=True)(z * 1), [(0.0, 1.0)]),
    "leaky": (nn.LeakyReLU(0.2), [(0.0, 0.8)]),
    "leaky in place": (lambda z: F.leaky_relu_(z * 1, 0.2), [(0.0, 0.8)]),
    "relu6": (F.relu6, [(0.0, 1.0), (6.0, -1.0)]),
    "relu6 module": (nn.ReLU6(), [(0.0, 1.0), (6.0, -1.0)]),
    "hardtanh": (nn.Hardtanh(-2.0, 3.0), [(-2.0, 1.0), (3.0, -1.0)]),
}


def points():
    return torch.linspace(-3, 9, 24, dtype=torch.float64)


@pytest.mark.parametrize("name", KINKED)
def test_value_and_first_derivative_are_exactly_the_activation_s(name):
    function = KINKED[name][0]
    flat = function(points()), vmap(grad(function))(points())
    with CurvedKinks(0.5):
        curved = function(points()), vmap(grad(function))(points())
    assert torch.equal(flat[0], curved[0]) and torch.equal(flat[1], curved[1])


@pytest.mark.parametrize("name", KINKED)
def test_second_derivative_is_a_cauchy_density_at_each_kink_in_units_of_the_root_mean_square(name):
    function, kinks = KINKED[name]
    z = points()
    with CurvedKinks(0.5):
        second = grad(lambda z: grad(lambda z: function(z).sum())(z).sum())(z)
    width = 0.5 * z.square().mean().sqrt()
    expected = sum(jump * torch.distributions.Cauchy(torch.tensor(kink, dtype=z.dtype), width).log_prob(z).exp() for kink, jump in kinks)
    torch.testing.assert_close(second, expected)


def test_outside_the_context_and_in_other_threads_nothing_changes():
    seen = []
    second = grad(grad(F.relu))
    with CurvedKinks(1.0):
        thread = threading.Thread(target=lambda: seen.append(float(second(torch.tensor(0.1)))))
        thread.start()
        thread.join()
        inside = float(second(torch.tensor(0.1)))
    assert seen == [0.0] and inside > 0.1 and float(second(torch.tensor(0.1))) == 0.0


def test_of_an_all_zero_input_curvature_and_values_are_finite():
    with CurvedKinks(1.0):
        assert grad(lambda z: grad(lambda z: F.relu(z).sum())(z).sum())(torch.zeros(3)).isfinite().all()


def test_the_distance_s_slope_away_from_the_truth_is_seen_with_curvature_and_missed_without():
    """Along random directions from the truth, against the measured change of the distance over a step."""
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(256, 20, generator=draw).double() / 20**0.5, torch.randn(64, 256, generator=draw).double() / 16
    truth = torch.randn(20, generator=draw).double()

    def update(x):
        return grad(lambda w: F.relu(second @ F.relu(w @ x)).square().sum())(first)

    target = update(truth) / update(truth).norm()

    def distance(x):
        return 0.5 * (update(x) / update(x).norm() - target).square().sum()

    ratios = []
    for _ in range(10):
        direction = torch.randn(20, generator=draw).double()
        measured = (distance(truth + 0.06 * direction) - distance(truth + 0.02 * direction)) / 0.04
        at = truth + 0.04 * direction
        flat = grad(distance)(at) @ direction
        with CurvedKinks(0.1):
            curved = grad(distance)(at) @ direction
        ratios.append((float(flat / measured), float(curved / measured)))
    flat, curved = torch.tensor(ratios).mean(0).tolist()
    assert flat < 0.4 and 0.6 < curved < 1.6, (flat, curved)
