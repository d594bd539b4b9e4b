import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from gidef.attack import averaged, drain, invert, joint, local_adam, local_sgd, naive, rounds_apart, surrogate_model, with_final_weights
from gidef.errors import InputError
from gidef.types import Observation


def trained(tiny, images, labels, noise, optimiser, *, steps, epochs):
    """The same local training with torch.optim."""
    model = tiny.Net(sigma=0.5)
    start = tiny.weights(model)
    params = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    optimiser = optimiser(params.values())
    size = len(images) * epochs // steps
    for t in range(steps):
        rows = slice(t * size % len(images), t * size % len(images) + size)
        optimiser.zero_grad()
        F.cross_entropy(functional_call(model, params, (images[rows], noise[t])), labels[rows]).backward()
        optimiser.step()
    return {name: (tensor - start[name]).detach() for name, tensor in params.items()}


CASES = {
    "sgd": (lambda s, **k: local_sgd(s, lr=0.1, **k), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (lambda s, **k: local_sgd(s, lr=0.1, momentum=0.9, **k), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "adam": (lambda s, **k: local_adam(s, lr=0.01, **k), lambda p: torch.optim.Adam(p, lr=0.01)),
}
TRUE = {"adam": {"width": None}}
"""What asks for the true derivative where another is followed."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("size", "steps", "epochs"), [(2, 1, 1), (6, 3, 1), (4, 6, 3), (2, 4, 4)])
def test_the_delta_is_that_of_torch_optim_over_consecutive_slices_in_the_same_order_every_epoch(tiny, name, size, steps, epochs):
    ours, theirs = CASES[name]
    _, images, labels = tiny.observe(tiny.simulator(tiny.Net()), tiny.weights(tiny.Net()), size=size)
    noise = torch.stack([tiny.draw_noise(t, size * epochs // steps) for t in range(steps)])
    model = tiny.Net(sigma=0.5)
    simulate = ours(tiny.simulator(model), steps=steps, epochs=epochs)
    delta = simulate(tiny.weights(model), {}, images, F.one_hot(labels, tiny.classes).double(), noise)
    expected = trained(tiny, images, labels, noise, theirs, steps=steps, epochs=epochs)
    for key in expected:
        torch.testing.assert_close(delta[key], expected[key])


@pytest.mark.parametrize("name", CASES)
def test_it_is_vmappable_and_its_derivative_agrees_with_finite_differences(tiny, name):
    model = tiny.Net(activation=torch.nn.Tanh)
    params, simulate = tiny.weights(model), CASES[name][0](tiny.simulator(model), steps=2, **TRUE.get(name, {}))
    images = torch.stack([tiny.observe(tiny.simulator(model), params, size=2, seed=seed)[1] for seed in range(2)])
    labels = F.one_hot(torch.tensor([0, 2]), tiny.classes).double()

    def released(x):
        return sum(tensor.square().sum() for tensor in simulate(params, {}, x, labels, None).values())

    slopes = vmap(grad(released))(images)
    direction = torch.ones_like(images[0])
    for x, slope in zip(images, slopes, strict=True):
        measured = (released(x + 1e-5 * direction) - released(x - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close((slope * direction).sum(), measured, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("how", [{}, {"width": None}], ids=["stand-in", "true"])
def test_adam_s_derivative_is_finite_where_a_gradient_is_zero(how):
    simulate = local_adam(lambda params, known, x, y, noise: {"w": x.sum() * params["w"] * torch.tensor([1.0, 0.0])}, steps=2, lr=0.1, **how)
    for images in (torch.ones(2), torch.zeros(2)):  # of the second all is zero
        slope = grad(lambda x: simulate({"w": torch.ones(2)}, {}, x, torch.zeros(2), None)["w"].sum())(images)
        assert slope.isfinite().all() and slope.any()


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (3, 1), (4, 2)])
def test_the_slope_that_adam_s_steps_are_lent_leaves_their_values_as_they_are_bit_by_bit(tiny, steps, epochs):
    model = tiny.Net()
    params = tiny.weights(model)
    _, images, labels = tiny.observe(tiny.simulator(model), params, size=6)
    found = [
        local_adam(tiny.simulator(model), steps=steps, epochs=epochs, lr=0.01, **how)(params, {}, images, F.one_hot(labels, tiny.classes).double(), None)
        for how in ({}, {"width": 0.2}, {"width": None})
    ]
    assert all(torch.equal(one[name], tensor) for one in found[:2] for name, tensor in found[2].items())


def test_the_slope_of_two_steps_of_adam_is_that_of_soft_signs_in_the_steps_place(tiny):
    """By finite differences of a plain loop whose steps are constants, those of Adam, and change as tanh does."""
    model, lr, width = tiny.Net(activation=torch.nn.Tanh), 0.01, 0.7
    params, gradient = tiny.weights(model), tiny.simulator(model)
    _, images, labels = tiny.observe(gradient, params, size=2)
    labels, draw = F.one_hot(labels, tiny.classes).double(), torch.Generator().manual_seed(0)
    looked_at = {name: torch.randn(tensor.shape, generator=draw, dtype=torch.float64) for name, tensor in params.items()}

    def walked(x, base=None):
        """What is looked at of the delta, and (step, first moment) of each step; base: those of the point whose steps are kept."""
        weights, m, v, seen = dict(params), dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0), []
        for t in range(2):
            g = gradient(weights, {}, x[t : t + 1], labels[t : t + 1], None)
            m, v = {n: 0.9 * m[n] + 0.1 * g[n] for n in g}, {n: 0.999 * v[n] + 0.001 * g[n] ** 2 for n in g}
            moment = {n: m[n] / (1 - 0.9 ** (t + 1)) for n in g}
            step = {n: moment[n] / ((v[n] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8) for n in g}
            seen.append((step, moment))
            if base is not None:
                kept, there = base[t]
                scale = {n: width * there[n].abs().mean() + 1e-8 for n in g}
                step = {n: kept[n] + torch.tanh(moment[n] / scale[n]) - torch.tanh(there[n] / scale[n]) for n in g}
            weights = {n: weights[n] - lr * step[n] for n in g}
        return sum((looked_at[n] * (weights[n] - params[n])).sum() for n in params), seen

    def simulated(x):
        delta = local_adam(gradient, steps=2, lr=lr, width=width)(params, {}, x, labels, None)
        return sum((looked_at[n] * delta[n]).sum() for n in params)

    value, base = walked(images)
    direction = torch.randn(images.shape, generator=draw, dtype=torch.float64)
    measured = (walked(images + 1e-5 * direction, base)[0] - walked(images - 1e-5 * direction, base)[0]) / 2e-5
    torch.testing.assert_close(simulated(images), value)
    torch.testing.assert_close((grad(simulated)(images) * direction).sum(), measured, rtol=1e-6, atol=1e-9)


def test_an_attack_on_a_step_of_adam_gets_far_along_the_lent_slope_and_not_along_the_true_one(tiny):
    model, fits, errors = tiny.Net(), {}, {}
    params, gradient = tiny.weights(model), tiny.simulator(model)
    image = torch.linspace(0, 1, 6, dtype=torch.float64).expand(1, 2, 6, 6)
    label, settings = torch.tensor([1]), naive(**tiny.settings, iterations=100, tv=1e-2)
    for name, how in (("lent", {}), ("true", {"width": None})):
        simulate = local_adam(gradient, steps=1, lr=0.01, **how)
        update = simulate(params, {}, image, F.one_hot(label, tiny.classes).double(), None)
        found = drain(invert([Observation(params, update, 1, kind="delta", labels=label)] * 2, lambda simulate=simulate: simulate, settings, seed=0))
        fits[name], errors[name] = sum(row.fit for row in found) / 2, sum(float((row.images - image).square().mean()) for row in found) / 2
    assert fits["lent"] < 0.5 * fits["true"], fits
    assert errors["lent"] < 0.5 * errors["true"], errors


def test_tensors_without_a_gradient_stay_and_are_not_released():
    simulate = local_sgd(lambda params, known, x, y, noise: {"w": params["v"] * x.sum()}, steps=2, lr=0.5)
    delta = simulate({"w": torch.zeros(1), "v": torch.ones(1)}, {}, torch.ones(2), torch.zeros(2), None)
    assert delta.keys() == {"w"} and delta["w"].item() == -1.0


def test_arguments_out_of_range_are_refused(tiny):
    simulate = tiny.simulator(tiny.Net())
    for wrong in ({"steps": 0, "lr": 1}, {"steps": 3, "lr": 1, "epochs": 2}, {"steps": 1, "lr": 0}, {"steps": 1, "lr": 1, "momentum": 1.0}):
        with pytest.raises(InputError):
            local_sgd(simulate, **wrong)
    with pytest.raises(InputError, match="betas"):
        local_adam(simulate, steps=1, lr=1, betas=(1.0, 0.9))
    with pytest.raises(InputError, match="width=0.0: expected a number above 0"):
        local_adam(simulate, steps=1, lr=1, width=0.0)
    with pytest.raises(InputError, match="do not divide"):
        local_sgd(simulate, steps=2, lr=1)({}, {}, torch.zeros(3, 2), torch.zeros(3), None)


@pytest.mark.parametrize("name", CASES)
def test_noise_of_one_epoch_recurs_in_every_epoch(tiny, name):
    model = tiny.Net(sigma=0.5)
    params, simulate = tiny.weights(model), CASES[name][0](tiny.simulator(model), steps=6, epochs=3)
    _, images, labels = tiny.observe(tiny.simulator(tiny.Net()), tiny.weights(tiny.Net()), size=4)
    noise, labels = torch.stack([tiny.draw_noise(t, 2) for t in range(2)]), F.one_hot(labels, tiny.classes).double()
    once, spelt_out = (simulate(params, {}, images, labels, drawn) for drawn in (noise, noise.repeat(3, *[1] * (noise.ndim - 1))))
    assert all(torch.equal(tensor, spelt_out[key]) for key, tensor in once.items())
    with pytest.raises(InputError, match="noise of 3 steps"):
        simulate(params, {}, images, labels, torch.cat([noise, noise[:1]]))


def test_the_average_over_draws_is_that_of_a_plain_loop(tiny):
    model = tiny.Net(sigma=0.5)
    params, simulate = tiny.weights(model), tiny.simulator(model)
    _, images, labels = tiny.observe(simulate, params, size=2)
    targets, draws = F.one_hot(labels, tiny.classes).double(), torch.stack([tiny.draw_noise(seed, 2) for seed in range(5)])
    each = [simulate(params, {}, images, targets, draw) for draw in draws]
    found = averaged(simulate)(params, {"draws": draws}, images, targets, None)
    assert found.keys() == params.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, sum(one[name] for one in each) / 5)
        assert not torch.allclose(tensor, each[0][name]), name

    def slope(simulate, known, noise=None):
        return grad(lambda x: sum(tensor.square().sum() for tensor in simulate(params, known, x, targets, noise).values()))(images)

    def looped(params, known, x, targets, noise):
        each = [simulate(params, {}, x, targets, draw) for draw in draws]
        return {name: sum(one[name] for one in each) / 5 for name in each[0]}

    torch.testing.assert_close(slope(averaged(simulate), {"draws": draws}), slope(looped, {}))


def test_the_average_over_draws_hands_on_what_else_is_known(tiny):
    def simulate(params, known, images, labels, noise):
        assert known.keys() == {"factor"}
        return {"w": known["factor"] * noise * images.sum()}

    found = averaged(simulate)({}, {"draws": torch.tensor([1.0, 2.0, 6.0]), "factor": torch.tensor(10.0)}, torch.ones(2), None, None)
    assert found["w"].item() == 60.0


@pytest.mark.parametrize("noisy", [False, True])
def test_the_engine_inverts_the_delta_of_local_training(tiny, noisy):
    model = tiny.Net(sigma=0.3 if noisy else None)
    shape = (2, 1, *tiny.latent)
    noise = tiny.draw_noise(0, 2).view(shape) if noisy else None
    simulate = local_sgd(tiny.simulator(model), steps=2, lr=0.1)
    params = tiny.weights(model)
    _, images, _ = tiny.observe(tiny.simulator(model), params, size=2, seed=1)
    labels = torch.tensor([0, 2])
    update = simulate(params, {}, images, F.one_hot(labels, tiny.classes).double(), noise)
    observation = Observation(params, update, 2, kind="delta", labels=labels)
    settings = {**tiny.settings, "iterations": 80, "tv": 0.0}
    matching = joint(noise_shape=shape, **settings) if noisy else naive(**settings)
    (found,) = drain(invert([observation], lambda: simulate, matching, seed=0, dtype=torch.float64))
    assert found.loss < 0.15 * float(found.losses[0])


# --- models between a client's first and last weights, and several rounds ------------------------------------------------


def apart(one, other):
    """1 − cos, of all entries together."""
    flat = [torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())]) for tensors in (one, other)]
    return 1 - float(F.cosine_similarity(*flat, dim=0))


def test_a_surrogate_model_lies_between_the_first_weights_and_the_last_that_the_delta_tells(tiny):
    model = tiny.Net()
    gradient, params = tiny.simulator(model), tiny.weights(model)
    _, images, labels = tiny.observe(gradient, params, size=4)
    targets = F.one_hot(labels, tiny.classes).double()
    update = local_sgd(gradient, steps=4, lr=0.3)(params, {}, images, targets, None)
    last = {name: tensor + update[name] for name, tensor in params.items()}
    observation = with_final_weights(Observation(params, update, 4, kind="delta", labels=labels, known={"factor": torch.ones(())}))
    assert observation.known.keys() == {"factor", *(f"final/{name}" for name in params)}
    assert all(torch.equal(observation.known[f"final/{name}"], tensor) for name, tensor in last.items())

    def simulated(alpha):
        return surrogate_model(gradient)(params, {**observation.known, "alpha": torch.tensor(alpha, dtype=torch.float64)}, images, targets, None)

    for alpha, weights in ((0.0, params), (1.0, last), (0.25, {name: 0.75 * params[name] + 0.25 * last[name] for name in params})):
        expected = gradient(weights, {}, images, targets, None)
        for name, tensor in simulated(alpha).items():
            torch.testing.assert_close(tensor, -expected[name])
    distances = {alpha / 10: apart(simulated(alpha / 10), update) for alpha in range(11)}
    best = min(distances, key=distances.get)
    assert 0 < best < 1 and distances[best] < 0.8 * distances[0.0], distances


def test_no_round_drowns_another_however_large_its_gradients_are():
    draw = torch.Generator().manual_seed(0)
    target = {f"{number}/{name}": torch.randn(5, 3, generator=draw, dtype=torch.float64) for number in range(2) for name in "ab"}
    target = {name: 1e3 * tensor if name.startswith("0/") else tensor for name, tensor in target.items()}
    flipped = {name: tensor if name.startswith("0/") else -tensor for name, tensor in target.items()}
    one = torch.ones((), dtype=torch.float64)
    assert float(rounds_apart(flipped, target, one)) == pytest.approx(1.0)  # nought of the first, two of the second
    assert apart(flipped, target) < 1e-5  # what a common cosine makes of it
    assert float(rounds_apart(target, target, one)) == pytest.approx(0.0, abs=1e-9)
    halves = {name: tensor * (0.01 if name.startswith("0/") else 7.0) for name, tensor in target.items()}
    assert float(rounds_apart(halves, target, one)) == pytest.approx(0.0, abs=1e-6)  # of each round the direction alone
