"""Server steps against numbers worked by hand: one weight, w₀ = 1, updates Δ = 0.3, −0.1, 0.2."""

import math

import pytest
import torch

from gidef.rounds.server import CONTROL, fed_adagrad, fed_adam, fed_avg, fed_yogi, scaffold
from gidef.types import ServerState

DELTAS = (0.3, -0.1, 0.2)


def run(step, deltas=DELTAS, start=1.0):
    """w after each round."""
    state, path = ServerState({"w": torch.tensor([start], dtype=torch.float64)}), []
    for delta in deltas:
        state = step(state, {"w": torch.tensor([delta], dtype=torch.float64)})
        path.append(state.params["w"].item())
    return path


def test_fed_avg_with_a_server_lr():
    assert run(fed_avg(lr=0.5)) == pytest.approx([1.15, 1.10, 1.20])


def test_fed_avg_with_momentum():
    # m: 0.3 → 0.9·0.3 − 0.1 = 0.17 → 0.9·0.17 + 0.2 = 0.353
    assert run(fed_avg(lr=1.0, momentum=0.9)) == pytest.approx([1.3, 1.47, 1.823])
    sgd = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimiser, path = torch.optim.SGD([sgd], lr=1.0, momentum=0.9), []
    for delta in DELTAS:
        sgd.grad = torch.tensor([-delta], dtype=torch.float64)
        optimiser.step()
        path.append(sgd.item())
    assert run(fed_avg(momentum=0.9)) == pytest.approx(path)


def test_fed_adagrad():
    # τ = 0.1, v₀ = 0.01: v: 0.10 → 0.11 → 0.15; η = 1, β₁ = 0
    steps = (0.3 / (math.sqrt(0.10) + 0.1), -0.1 / (math.sqrt(0.11) + 0.1), 0.2 / (math.sqrt(0.15) + 0.1))
    assert steps == pytest.approx((0.7207592, -0.2316625, 0.4104262), abs=1e-7)
    assert run(fed_adagrad(lr=1.0, tau=0.1)) == pytest.approx([1 + steps[0], 1 + sum(steps[:2]), 1 + sum(steps)])


def test_fed_adam():
    # τ = 0.1, β₁ = 0.5, β₂ = 0.9, η = 0.1
    # m: 0.15 → 0.025 → 0.1125;  v: 0.9·0.01 + 0.1·0.09 = 0.018 → 0.0172 → 0.01948
    steps = (0.15 / (math.sqrt(0.018) + 0.1), 0.025 / (math.sqrt(0.0172) + 0.1), 0.1125 / (math.sqrt(0.01948) + 0.1))
    path = run(fed_adam(lr=0.1, beta1=0.5, beta2=0.9, tau=0.1))
    assert path == pytest.approx([1 + 0.1 * steps[0], 1 + 0.1 * sum(steps[:2]), 1 + 0.1 * sum(steps)], abs=1e-12)


def test_fed_yogi():
    # τ = 0.1, β₁ = 0.5, β₂ = 0.9, η = 0.1
    # v: 0.01 < 0.09, so 0.01 + 0.1·0.09 = 0.019 → 0.019 > 0.01, so 0.019 − 0.001 = 0.018 → 0.018 < 0.04, so 0.022
    steps = (0.15 / (math.sqrt(0.019) + 0.1), 0.025 / (math.sqrt(0.018) + 0.1), 0.1125 / (math.sqrt(0.022) + 0.1))
    path = run(fed_yogi(lr=0.1, beta1=0.5, beta2=0.9, tau=0.1))
    assert path == pytest.approx([1 + 0.1 * steps[0], 1 + 0.1 * sum(steps[:2]), 1 + 0.1 * sum(steps)], abs=1e-12)


def test_the_second_moment_squares_the_update_and_not_its_mean():
    # m = (1 − β₁) Δ would give v = 0.9·0.01 + 0.1·0.15² = 0.01125 instead of 0.018
    state = fed_adam(lr=0.1, beta1=0.5, beta2=0.9, tau=0.1)(
        ServerState({"w": torch.ones(1, dtype=torch.float64)}), {"w": torch.tensor([0.3], dtype=torch.float64)}
    )
    assert state.slots["v"]["w"].item() == pytest.approx(0.018)
    assert state.slots["m"]["w"].item() == pytest.approx(0.15)


def test_the_first_fed_adam_step_has_no_bias_correction():
    # defaults: (1 − 0.9)·1 / (√(0.99·10⁻⁶ + 0.01) + 10⁻³) = 0.1 / 0.10100495…; Adam with correction would step by 1
    expected = 0.1 / (math.sqrt(0.99e-6 + 0.01) + 1e-3)
    assert run(fed_adam(lr=1.0), deltas=(1.0,), start=0.0) == pytest.approx([expected])


def test_scaffold():
    # η = 0.5, |S|/N = 0.2: w = 1 + 0.5·0.3, then + 0.5·(−0.1); c = 0.2·0.4, then + 0.2·(−0.1)
    state, step = ServerState({"w": torch.ones(1, dtype=torch.float64)}), scaffold(lr=0.5, participation=0.2)
    path = []
    for change, control in ((0.3, 0.4), (-0.1, -0.1)):
        state = step(state, {"w": torch.tensor([change]), CONTROL + "w": torch.tensor([control])})
        path.append((state.params["w"].item(), state.slots["control"]["w"].item()))
    assert path == [pytest.approx((1.15, 0.08)), pytest.approx((1.10, 0.06))]
