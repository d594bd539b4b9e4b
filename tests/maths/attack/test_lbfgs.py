import copy
import math

import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, grad_and_value, vmap

from gidef.attack.lbfgs import Lbfgs, _Search
from gidef.errors import InputError

DOUBLE = torch.float64


SMALL = Lbfgs(history=4)


def evaluator(function):
    """evaluate(variables) of function(variables) → (K,), in which attacks do not meet."""

    def evaluate(variables):
        given = {name: x.detach().requires_grad_() for name, x in variables.items()}
        with torch.enable_grad():
            loss = function(given)
            slopes = torch.autograd.grad(loss.sum(), list(given.values()))
        return loss.detach(), dict(zip(given, slopes, strict=True))

    return evaluate


def run(optimiser, evaluate, variables, steps, *, state=None, rate=1.0, watch=None):
    state = optimiser.begin(variables) if state is None else state
    rates = rate if isinstance(rate, dict) else {name: torch.full((len(x),), rate, dtype=x.dtype) for name, x in variables.items()}
    for i in range(steps):
        loss, gradients = evaluate(variables)
        variables, state = optimiser.step(variables, gradients, loss, state, rates=rates, iteration=torch.tensor(i), evaluate=evaluate)
        if watch is not None:
            watch(variables, state)
    return variables, state


def taken(tensors, kept):
    return {name: tensor[kept] for name, tensor in tensors.items()}


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **(tolerance or {"rtol": 0, "atol": 0}), equal_nan=True)


def rosenbrock(x):
    return (100 * (x[..., 1:] - x[..., :-1].square()).square() + (1 - x[..., :-1]).square()).sum(-1)


def starts(attacks, size, seed=0):
    return {"images": torch.randn(attacks, size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)}


def quadratic(size, condition, seed=0):
    """A, its minimiser, and ½ (x − x*) A (x − x*)."""
    draw = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=DOUBLE))
    matrix = turn @ torch.diag(torch.logspace(0, math.log10(condition), size, dtype=DOUBLE)) @ turn.T
    best = torch.randn(size, generator=draw, dtype=DOUBLE)
    return matrix, best, lambda x: 0.5 * ((x - best) @ matrix * (x - best)).sum(-1)


def evaluations_until(function, start, bound, steps, **settings):
    """(K,) evaluations until the loss is below the bound, with the one before each step; and where the attacks then are."""
    evaluate, needed = evaluator(lambda v: function(v["images"])), torch.full((len(start["images"]),), -1)

    def watch(variables, state):
        watch.steps += 1
        done = evaluate(variables)[0] < bound
        needed.copy_(torch.where((needed < 0) & done, state["evaluations"] + watch.steps, needed))

    watch.steps = 0
    found, _ = run(Lbfgs(**settings), evaluate, start, steps, watch=watch)
    return needed, found["images"]


def torch_s_evaluations(function, start, bound, history):
    x, count = start.clone().requires_grad_(), 0
    optimiser = torch.optim.LBFGS([x], max_iter=1000, tolerance_grad=0, tolerance_change=0, history_size=history, line_search_fn="strong_wolfe")

    class Reached(Exception):
        pass

    def closure():
        nonlocal count
        count += 1
        optimiser.zero_grad()
        loss = function(x)
        loss.backward()
        if loss.detach() < bound:
            raise Reached
        return loss

    with pytest.raises(Reached):
        optimiser.step(closure)
    return count


# Against other implementations


@pytest.mark.parametrize("condition, history, steps", [(10, 5, 4), (1e3, 10, 16)])
def test_quadratics_are_solved_in_about_the_evaluations_that_torch_needs(condition, history, steps):
    _, best, function = quadratic(30, condition)
    start = starts(4, 30)
    ours, found = evaluations_until(function, start, 1e-10, steps, history=history)
    theirs = [torch_s_evaluations(function, one, 1e-10, history) for one in start["images"]]
    assert (ours > 0).all() and ours.double().mean() < 1.3 * sum(theirs) / 4 + 21
    torch.testing.assert_close(found, best.expand(4, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size, steps", [(2, 4), (20, 10)])
def test_rosenbrock_s_valley_is_followed_to_scipy_s_minimum_in_about_its_evaluations(size, steps):
    start = {"images": 1 + 0.3 * starts(4, size)["images"]}
    ours, found = evaluations_until(rosenbrock, start, 1e-12, steps)
    evaluate, theirs = evaluator(lambda v: rosenbrock(v["images"])), []
    for one in start["images"]:

        def both(x):
            loss, gradients = evaluate({"images": torch.from_numpy(x)[None]})
            return loss.item(), gradients["images"][0].numpy()

        result = scipy.optimize.minimize(both, one.numpy(), jac=True, method="L-BFGS-B", options={"maxcor": 10, "ftol": 0, "gtol": 1e-6})
        assert result.fun < 1e-12
        theirs.append(result.nfev)
    assert (ours > 0).all() and ours.double().mean() < 1.3 * sum(theirs) / 4 + 21
    torch.testing.assert_close(found, torch.ones(4, size, dtype=DOUBLE), rtol=0, atol=1e-6)


def test_where_no_bracket_is_needed_iterates_are_torch_s():
    """Mild curvature: every search ends at its first trial or by extrapolation, which both do alike."""
    _, _, function = quadratic(12, 3.0)
    evaluate = evaluator(lambda v: function(v["images"]) + 0.05 * v["images"].pow(4).sum(-1))
    start = starts(3, 12)
    points = [[] for _ in range(3)]
    for attack in range(3):
        x = start["images"][attack].clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [x], max_iter=1, max_eval=100, tolerance_grad=0, tolerance_change=0, history_size=4, line_search_fn="strong_wolfe"
        )

        def closure(x=x):
            loss, gradients = evaluate({"images": x.detach()[None]})
            x.grad = gradients["images"][0]
            return loss[0]

        for _ in range(8):
            optimiser.step(closure)
            points[attack].append(x.detach().clone())
    seen = []

    def recorded(variables):
        seen.append(variables["images"])
        return evaluate(variables)

    run(Lbfgs(history=4, max_evaluations=30), recorded, start, 1)
    for attack in range(3):
        trials = torch.stack([one[attack] for one in seen])
        for point in points[attack]:
            assert (trials - point).abs().amax(1).min() < 1e-11


def test_the_direction_is_that_of_the_dense_bfgs_matrix_of_the_last_pairs():
    """H ← (1 − ρ s yᵀ) H (1 − ρ y sᵀ) + ρ s sᵀ from the oldest pair on, on H₀ = (s·y / y·Wy) W, with rates 1 and 1/4 in W."""
    function = lambda v: rosenbrock(v["images"]) + (v["noise"].square() * (1 + v["images"][:, :4].square())).sum(-1)  # noqa: E731
    evaluate = evaluator(function)
    start = {"images": starts(3, 5)["images"], "noise": starts(3, 4, 1)["images"]}
    rate = {"images": torch.full((3,), 0.5, dtype=DOUBLE), "noise": torch.full((3,), 0.125, dtype=DOUBLE)}
    optimiser = Lbfgs(history=3, max_evaluations=9)
    variables, state = run(optimiser, evaluate, start, 3, rate=rate)
    assert (state["rho"] > 0).all() and len(set(state["head"].tolist())) > 1  # rings are full, and turned unequally
    trials = []

    def recorded(v):
        trials.append(v)
        return evaluate(v)

    loss, gradients = evaluate(variables)
    optimiser.step(variables, gradients, loss, state, rates=rate, iteration=torch.tensor(3), evaluate=recorded)
    weight = torch.cat([torch.ones(5, dtype=DOUBLE), torch.full((4,), 0.25, dtype=DOUBLE)]).diag()
    for attack in range(3):
        order = [(int(state["head"][attack]) + place) % 3 for place in range(3)]
        pairs = [(state["steps"][attack, slot], state["changes"][attack, slot]) for slot in order]
        s, y = pairs[-1]
        inverse, one = (s @ y) / (y @ weight @ y) * weight, torch.eye(9, dtype=DOUBLE)
        for s, y in pairs:
            rho = 1 / (s @ y)
            inverse = (one - rho * torch.outer(s, y)) @ inverse @ (one - rho * torch.outer(y, s)) + rho * torch.outer(s, s)
        expected = -inverse @ torch.cat([gradients["images"][attack], gradients["noise"][attack]])
        first = min(0.5, float(state["start"][attack]))
        for name, part in (("images", expected[:5]), ("noise", expected[5:])):
            torch.testing.assert_close(trials[0][name][attack] - variables[name][attack], first * part, rtol=1e-9, atol=1e-11)


def test_the_first_step_of_all_is_down_the_gradient_by_at_most_the_rate_in_its_1_norm():
    _, _, function = quadratic(6, 10.0)
    evaluate, trials = evaluator(lambda v: function(v["images"])), []
    start = {"images": starts(2, 6)["images"] * torch.tensor([[1.0], [1e-3]], dtype=DOUBLE) + quadratic(6, 10.0)[1]}

    def recorded(v):
        trials.append(v["images"])
        return evaluate(v)

    run(Lbfgs(), recorded, start, 1, rate=0.25)
    gradients = evaluate(start)[1]["images"]
    size = gradients.abs().sum(1, keepdim=True)
    assert size[0] > 1 > size[1]
    torch.testing.assert_close(trials[1] - start["images"], -0.25 * gradients * (1 / size).clamp_max(1.0))


# Moré and Thuente 1994, "Line search algorithms with guaranteed sufficient decrease", section 5, functions 1, 2, 3 and 4


def _flat_far_out(t):
    return -t / (t.square() + 2)


def _steep_then_flat(t):
    return (t + 0.004).pow(5) - 2 * (t + 0.004).pow(4)


def _wavy(t, turn=0.01, waves=39):
    bend = torch.where(
        t <= 1 - turn, 1 - t, torch.where(t >= 1 + turn, t - 1, (t - 1).square() / (2 * turn) + turn / 2)
    )  # fmt: skip
    return bend + 2 * (1 - turn) / (waves * math.pi) * torch.sin(waves * math.pi / 2 * t)


def _narrow(t, one=0.001, two=0.001):
    scale = lambda b: math.sqrt(1 + b * b) - b  # noqa: E731
    return scale(one) * ((1 - t).square() + two * two).sqrt() + scale(two) * (t.square() + one * one).sqrt()


@pytest.mark.parametrize(
    "function, decrease, flatness, within",
    [
        (_flat_far_out, 1e-3, 0.1, 10),
        (_steep_then_flat, 0.1, 0.1 + 1e-9, 20),
        (_wavy, 0.1, 0.1 + 1e-9, 20),
        (_narrow, 1e-3, 1e-3 + 1e-9, 20),
    ],
)
def test_hard_line_searches_end_where_both_conditions_hold(function, decrease, flatness, within):
    """From first trials of 1e-3, 0.1, 10 and 1000, at once."""

    def phi(t):
        t = t.detach().requires_grad_()
        with torch.enable_grad():
            f = function(t)
            (slope,) = torch.autograd.grad(f.sum(), t)
        return f.detach(), slope[:, None]

    t = torch.tensor([1e-3, 0.1, 10.0, 1000.0], dtype=DOUBLE)
    f0, g0 = phi(torch.zeros_like(t))
    d = torch.ones(4, 1, dtype=DOUBLE)
    search, ended = _Search.begun(f0, g0[:, 0], t, torch.zeros(4, dtype=torch.int64), g0), torch.full((4,), math.nan, dtype=DOUBLE)
    for _ in range(within):
        settled = search.judge(*phi(search.t), d, decrease, flatness)
        ended = torch.where(ended.isnan() & settled, search.low_t, ended)
    f, g = phi(ended)
    assert (f <= f0 + decrease * ended * g0[:, 0]).all() and (g[:, 0].abs() <= -flatness * g0[:, 0]).all(), ended


# Attacks apart, and dropped on the way


def test_an_attack_alone_goes_as_in_company():
    start, evaluate = starts(5, 10), evaluator(lambda v: rosenbrock(v["images"]))
    together, state = run(SMALL, evaluate, start, 4)
    assert len(set(state["head"].tolist())) > 1  # they do not keep in step
    for attack in range(5):
        alone, alone_state = run(SMALL, evaluate, taken(start, [attack]), 4)
        assert_same(alone, taken(together, [attack]), rtol=0, atol=1e-10)
        assert torch.equal(alone_state["evaluations"], state["evaluations"][[attack]])


@pytest.mark.parametrize("budget", [1, 3, 20])
def test_attacks_that_are_dropped_halfway_leave_the_others_where_they_would_be(budget):
    start, evaluate, kept = starts(5, 10), evaluator(lambda v: rosenbrock(v["images"])), torch.tensor([4, 1, 2])
    optimiser = Lbfgs(max_evaluations=budget, history=4)
    whole, whole_state = run(optimiser, evaluate, start, 12)
    halfway, state = run(optimiser, evaluate, start, 5)
    rest, rest_state = run(optimiser, evaluate, taken(halfway, kept), 7, state=taken(state, kept))
    assert_same(rest, taken(whole, kept), rtol=0, atol=1e-10)
    assert all(tensor.shape[0] == 5 for tensor in whole_state.values())
    assert torch.equal(rest_state["evaluations"], whole_state["evaluations"][kept])


def test_the_order_of_names_carries_no_meaning():
    evaluate = evaluator(lambda v: rosenbrock(v["images"]) + (v["noise"] - v["images"][:, :2]).pow(4).sum(-1) + (v["alpha"] - 1).square())
    start = {"images": starts(3, 4)["images"], "noise": starts(3, 2, 1)["images"], "alpha": torch.zeros(3, dtype=DOUBLE)}
    turned = {name: start[name] for name in ("alpha", "noise", "images")}
    (one, _), (other, _) = run(SMALL, evaluate, start, 4), run(SMALL, evaluate, turned, 4)
    assert_same(one, {name: other[name] for name in one})
    assert list(other) == list(turned) and one["alpha"].shape == (3,)


def test_a_variable_of_rate_zero_is_held_and_an_attack_of_rates_zero_rests():
    evaluate = evaluator(lambda v: rosenbrock(v["images"]) + (v["noise"] - v["images"][:, :2]).square().sum(-1))
    start = {"images": starts(3, 4)["images"], "noise": starts(3, 2, 1)["images"]}
    rates = {"images": torch.tensor([1.0, 1.0, 0.0], dtype=DOUBLE), "noise": torch.tensor([1.0, 0.0, 0.0], dtype=DOUBLE)}
    found, state = run(SMALL, evaluate, start, 4, rate=rates)
    assert torch.equal(found["noise"][1:], start["noise"][1:]) and torch.equal(found["images"][2], start["images"][2])
    loss = evaluate(start)[0], evaluate(found)[0]
    assert (loss[1][:2] < 0.5 * loss[0][:2]).all() and state["evaluations"][2] == 0


# Losses that fail


def _walled(v):
    """A well whose loss is NaN beyond |x| = 1; the minimum is near the wall."""
    x = v["images"]
    return (x - 0.97).square().sum(-1) - 1e-3 * torch.log(1 - x.square()).sum(-1)


def test_points_of_nan_loss_are_rejected_and_the_minimum_beside_them_is_found():
    """The first step from 0 would be one of length 6 times the rate, far behind the wall."""
    start, seen, losses = {"images": 0.3 * starts(4, 3)["images"].tanh()}, [], []
    evaluate = evaluator(_walled)

    def recorded(v):
        seen.append(evaluate(v))
        return seen[-1]

    found, _ = run(SMALL, recorded, start, 6, rate=50.0, watch=lambda v, s: losses.append(evaluate(v)[0]))
    assert any(not loss.isfinite().all() for loss, _ in seen)
    x = torch.tensor(0.9, dtype=DOUBLE)
    for _ in range(60):  # Newton on the derivative, x by x
        slope = 2 * (x - 0.97) + 2e-3 * x / (1 - x * x)
        x = x - slope / (2 + 2e-3 * (1 + x * x) / (1 - x * x) ** 2)
    torch.testing.assert_close(found["images"], x.expand(4, 3), rtol=0, atol=1e-6)
    losses = torch.stack(losses)
    assert losses.isfinite().all() and (losses.diff(dim=0) <= 0).all()


def test_a_wall_a_millionth_of_the_first_step_away_does_not_end_the_search():
    start = {"images": torch.full((1, 2), 3.0, dtype=DOUBLE)}
    far = lambda v: (v["images"] - start["images"]).norm(dim=1) > 1e-6  # noqa: E731
    evaluate = evaluator(lambda v: torch.where(far(v), math.inf, 1.0) * v["images"].square().sum(-1))
    found, state = run(SMALL, evaluate, start, 1)
    assert 1e-8 < (found["images"] - start["images"]).norm() < 1e-6


def test_an_attack_without_a_finite_loss_stays_where_it_is_and_disturbs_nobody():
    evaluate, start = evaluator(lambda v: rosenbrock(v["images"])), starts(4, 6)

    def hurt(v):
        loss, gradients = evaluate(v)
        broken = torch.tensor([False, True, False, True])
        loss = torch.where(broken, torch.tensor([0, math.nan, 0, math.inf], dtype=DOUBLE), loss)
        return loss, {name: torch.where(broken[:, None], math.nan, g) for name, g in gradients.items()}

    healthy, healthy_state = run(SMALL, evaluate, start, 5)
    found, state = run(SMALL, hurt, start, 5)
    assert_same(taken(found, [0, 2]), taken(healthy, [0, 2]))
    assert_same(taken(state, [0, 2]), taken(healthy_state, [0, 2]))
    assert_same(taken(found, [1, 3]), taken(start, [1, 3]))
    assert state["evaluations"].tolist()[1::2] == [0, 0] and (state["rho"][1::2] == 0).all()


def test_an_attack_whose_loss_becomes_finite_again_goes_on():
    evaluate, start = evaluator(lambda v: rosenbrock(v["images"])), starts(2, 2)
    blind = lambda v: (torch.tensor([1.0, math.nan], dtype=DOUBLE) * evaluate(v)[0], evaluate(v)[1])  # noqa: E731
    halfway, state = run(SMALL, blind, start, 2)
    assert torch.equal(halfway["images"][1], start["images"][1]) and state["evaluations"][1] == 0
    found, _ = run(SMALL, evaluate, halfway, 8, state=state)
    torch.testing.assert_close(found["images"], torch.ones(2, 2, dtype=DOUBLE), rtol=0, atol=1e-6)


def test_an_attack_whose_gradient_points_uphill_rests_and_goes_on_once_it_is_right():
    evaluate, start = evaluator(lambda v: rosenbrock(v["images"])), starts(3, 3)

    def lying(v):
        loss, gradients = evaluate(v)
        return loss, {"images": gradients["images"] * torch.tensor([[1.0], [-1.0], [1.0]], dtype=DOUBLE)}

    healthy, _ = run(SMALL, evaluate, start, 3)
    found, state = run(SMALL, lying, start, 3)
    assert_same(taken(found, [0, 2]), taken(healthy, [0, 2]))
    assert torch.equal(found["images"][1], start["images"][1]) and state["evaluations"][1] == 3 * 10
    assert (evaluate(run(SMALL, evaluate, found, 10, state=state)[0])[0] < 1e-10).all()


def test_a_history_that_points_uphill_is_thrown_away_at_once():
    evaluate, start = evaluator(lambda v: rosenbrock(v["images"])), starts(3, 4)
    state = SMALL.begin(start)
    uphill = {**state, "rho": torch.ones_like(state["rho"]), "scale": -torch.ones_like(state["scale"])}  # d = +g
    assert_same(run(SMALL, evaluate, start, 3, state=uphill)[0], run(SMALL, evaluate, start, 3)[0])


def test_pairs_of_another_objective_cost_no_more_than_themselves():
    before, after = evaluator(lambda v: rosenbrock(v["images"])), evaluator(lambda v: (100 * v["images"] - 300).square().sum(-1).sqrt())
    halfway, state = run(SMALL, before, starts(3, 4), 3)
    wrong = {**state, "rho": torch.full_like(state["rho"], 1e6), "changes": -state["changes"]}
    found, _ = run(SMALL, after, halfway, 6, state=wrong)
    assert (after(found)[0] < 1e-2 * after(halfway)[0]).all()


def test_at_the_minimum_nothing_moves():
    ones = {"images": torch.ones(2, 4, dtype=DOUBLE)}
    found, state = run(SMALL, evaluator(lambda v: rosenbrock(v["images"])), ones, 3)
    assert_same(found, ones)
    assert state["evaluations"].tolist() == [0, 0]


def test_below_the_tolerance_an_attack_rests():
    evaluate, start = evaluator(lambda v: v["images"].square().sum(-1)), {"images": torch.tensor([[0.01], [3.0]], dtype=DOUBLE)}
    found, _ = run(Lbfgs(tolerance=0.1), evaluate, start, 1)
    assert found["images"][0] == 0.01 and found["images"][1].abs() < 0.05


def test_losses_never_rise_from_step_to_step():
    evaluate = evaluator(lambda v: rosenbrock(v["images"]))
    for budget in (1, 2, 7):
        losses = []
        run(Lbfgs(history=4, max_evaluations=budget), evaluate, starts(6, 8), 12, watch=lambda v, s, into=losses: into.append(evaluate(v)[0]))
        assert (torch.stack(losses).diff(dim=0) <= 0).all()


# Budgets


@pytest.mark.parametrize("budget, steps", [(1, 70), (2, 40), (5, 18)])
def test_small_budgets_reach_the_same_minimum(budget, steps):
    start = starts(4, 2)
    found, _ = run(Lbfgs(history=4, max_evaluations=budget), evaluator(lambda v: rosenbrock(v["images"])), start, steps)
    torch.testing.assert_close(found["images"], torch.ones(4, 2, dtype=DOUBLE), rtol=0, atol=1e-6)


def test_a_step_costs_its_evaluations_whatever_happens_and_counts_those_that_were_used():
    calls, evaluate = [], evaluator(lambda v: torch.where(torch.tensor([True, False]), rosenbrock(v["images"]), torch.nan))

    def counted(v):
        calls.append(1)
        return evaluate(v)

    _, state = run(Lbfgs(history=4, max_evaluations=7), counted, starts(2, 3), 4)
    assert len(calls) == 4 * (7 + 1) and state["evaluations"].tolist() == [28, 0]


def test_a_search_that_one_step_does_not_end_goes_on_in_the_next():
    """At a rate of 1e9 the first trials are far too long; with one evaluation per step, each step shortens the last one's."""
    evaluate, sizes, start = evaluator(lambda v: v["images"].square().sum(-1)), [], {"images": torch.full((1, 2), 0.1, dtype=DOUBLE)}

    def recorded(v):
        sizes.append(float((v["images"] - start["images"]).norm()))
        return evaluate(v)

    found, state = run(Lbfgs(max_evaluations=1, max_search=30), recorded, start, 12, rate=1e9)
    trials = sizes[1::2]
    assert trials[0] > 1e7 and trials[1] < 0.5 * trials[0] and (evaluate(found)[0] < 1e-3 * evaluate(start)[0]).all()


def test_a_search_that_fails_over_several_steps_ends_after_max_search_evaluations_and_starts_anew():
    evaluate, trials, start = evaluator(lambda v: v["images"].square().sum(-1)), [], {"images": torch.ones(1, 2, dtype=DOUBLE)}

    def lying(v):
        trials.append(float((v["images"] - start["images"]).norm()))
        loss, gradients = evaluate(v)
        return loss, {"images": -gradients["images"]}

    run(Lbfgs(max_evaluations=3, max_search=6), lying, start, 3)
    tried = [size for place, size in enumerate(trials) if place % 4]  # the first of four is the point itself
    assert all(later < earlier for earlier, later in zip(tried[:6], tried[1:6], strict=False)) and tried[6:] == tried[:3]


def test_pairs_of_negative_curvature_are_not_remembered():
    """On −cos x beyond x = π/2, steps of one evaluation each are accepted before the curvature turns."""
    evaluate, start = evaluator(lambda v: -torch.cos(v["images"]).sum(-1)), {"images": torch.tensor([[3.0], [1.0]], dtype=DOUBLE)}
    found, state = run(Lbfgs(max_evaluations=1), evaluate, start, 1, rate=0.1)
    assert (found["images"] < start["images"]).all() and state["head"].tolist() == [0, 1] and (state["rho"] >= 0).all()
    found, _ = run(Lbfgs(max_evaluations=1), evaluate, found, 30, state=state, rate=0.5)
    assert found["images"].abs().max() < 1e-6


def test_no_input_is_modified():
    evaluate = evaluator(lambda v: rosenbrock(v["images"]))
    variables, state = run(SMALL, evaluate, starts(3, 5), 2)
    loss, gradients = evaluate(variables)
    rates = {"images": torch.ones(3, dtype=DOUBLE)}
    given = ({**variables}, {**gradients}, {"loss": loss}, {**state}, rates)
    before = copy.deepcopy(given)
    _, after = SMALL.step(variables, gradients, loss, state, rates=rates, iteration=torch.tensor(2), evaluate=evaluate)
    for one, other in zip(given, before, strict=True):
        assert_same(one, other)
    assert not torch.equal(after["steps"], state["steps"])


# The device is never waited for


def test_a_step_reads_no_tensor_on_the_host(monkeypatch):
    def evaluate(v):
        x = v["images"]
        return x.pow(4).sum(-1), {"images": 4 * x.pow(3)}

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was read on the host")

    variables, optimiser = starts(3, 5), SMALL
    state, (loss, gradients), iteration = optimiser.begin(variables), evaluate(variables), torch.tensor(0)
    rates = {"images": torch.ones(3, dtype=DOUBLE)}
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        for name in ("nonzero", "equal", "allclose"):
            patch.setattr(torch, name, refuse)
        stepped, _ = optimiser.step(variables, gradients, loss, state, rates=rates, iteration=iteration, evaluate=evaluate)
    assert (evaluate(stepped)[0] < 1e-3 * loss).all()


def test_a_step_on_a_device_has_shapes_that_depend_on_no_value():
    """Fake tensors carry no values: what needs one, or mixes devices, raises."""
    with FakeTensorMode():
        variables = {"images": torch.empty(3, 2, 4, device="meta"), "alpha": torch.empty(3, device="meta")}
        evaluate = lambda v: (v["alpha"] + v["images"].sum((1, 2)), v)  # noqa: E731
        optimiser, iteration = Lbfgs(history=3, max_evaluations=2), torch.empty((), dtype=torch.int64, device="meta")
        rates, state = {name: torch.empty(3, device="meta") for name in variables}, optimiser.begin(variables)
        stepped, carried = optimiser.step(variables, variables, variables["alpha"], state, rates=rates, iteration=iteration, evaluate=evaluate)
    for before, after in ((variables, stepped), (state, carried)):
        assert before.keys() == after.keys()
        assert all(after[k].shape == t.shape and after[k].dtype == t.dtype and after[k].device == t.device for k, t in before.items())


# Gradient matching


def test_private_images_are_recovered_from_gradients_of_a_smooth_net_in_float32():
    """Deep leakage from gradients: the squared distance, labels known, sigmoids. A minimum away from the truth would show in the images."""
    net = nn.Sequential(nn.Conv2d(2, 6, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(6, 6, 3, 1, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(54, 3))
    draw = torch.Generator().manual_seed(0)
    params = {name: torch.rand(p.shape, generator=draw) - 0.5 for name, p in net.named_parameters()}
    truth, labels = torch.rand(3, 1, 2, 6, 6, generator=draw), torch.tensor([[0], [1], [2]])

    def update(images, label):
        return grad(lambda p: F.cross_entropy(functional_call(net, p, (images,)), label))(params)

    def distance(images, target, label):
        found = update(images, label)
        return sum((found[name] - t).square().sum() for name, t in target.items()) / sum(t.square().sum() for t in target.values())

    target = vmap(update)(truth, labels)

    def evaluate(variables):
        gradients, loss = vmap(grad_and_value(distance))(variables["images"], target, labels)
        return loss, {"images": gradients}

    start = {"images": 0.5 + 0.2 * torch.randn(truth.shape, generator=draw)}
    found, _ = run(SMALL, evaluate, start, 8)
    before, after = ((v["images"] - truth).square().mean((1, 2, 3, 4)) for v in (start, found))
    assert found["images"].dtype == torch.float32 and (before > 0.05).all() and (after < 1e-6).all()


# Refusals


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"history": 0}, "history=0: expected at least 1"),
        ({"max_evaluations": 0}, "max_evaluations=0"),
        ({"max_search": 0}, "max_search=0"),
        ({"decrease": 0.0}, "0 < decrease < flatness < 1"),
        ({"decrease": 0.5, "flatness": 0.4}, "0 < decrease < flatness < 1"),
        ({"flatness": 1.0}, "0 < decrease < flatness < 1"),
        ({"curvature": -1.0}, "curvature=-1.0"),
        ({"tolerance": math.nan}, "tolerance=nan"),
    ],
)
def test_settings_out_of_range_are_refused_in_plain_words(settings, message):
    with pytest.raises(InputError, match=message):
        Lbfgs(**settings)
