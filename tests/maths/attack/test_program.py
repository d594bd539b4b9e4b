"""The executions of the inner step agree, and so do the forms of its derivative. Tiny nets, float64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from gidef.attack import Matching, drain, joint, naive, run, run_chunk
from gidef.attack.matching import distance, distance_and_slope
from gidef.attack.program import Programs
from gidef.errors import InputError

DOUBLE = {"seed": 3, "dtype": torch.float64}


def with_loss(model):
    """A simulator of one gradient that carries its loss."""

    def loss(params, known, images, labels, noise):
        return F.cross_entropy(functional_call(model, params, (images, known.get("noise", noise))), labels)

    def simulate(params, *rest):
        return grad(loss)(params, *rest)

    simulate.loss = loss
    return simulate


@pytest.fixture
def case(tiny):
    """Three defended observations, a simulator with a loss, and the joint attack."""
    model = tiny.Net(sigma=0.5)
    simulate, params = with_loss(model), tiny.weights(model)
    observations = [tiny.observe(simulate, params, size=2, seed=seed, noise=tiny.draw_noise(seed, 2))[0] for seed in range(3)]
    return observations, simulate, joint(noise_shape=(2, *tiny.latent), iterations=8, restarts=2, **tiny.settings)


def images_of(found):
    return torch.stack([one.restart_images for one in found])


def same(left, right, **tolerance):
    for name in ("restart_images", "losses", "restart_losses", "labels"):
        for one, other in zip(left, right, strict=True):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


@pytest.mark.parametrize("change", [{}, {"distance": "l2", "signed": True}, {"kink_width": None, "distance": "cosine_layers"}, {"noise_shape": None}])
def test_a_recorded_program_gives_the_numbers_of_a_plain_loop_and_is_recorded_once(case, change):
    observations, simulate, settings = case
    settings, programs = dataclasses.replace(settings, **change), Programs()
    plain = run(observations, lambda: simulate, settings, mode="loop", at_once=4, **DOUBLE)
    # six attacks in chunks of four: the last one is padded to the same shape
    recorded = run(observations, lambda: simulate, settings, mode="traced", at_once=4, programs=programs, **DOUBLE)
    same(plain, recorded)
    assert len(programs._made) == 1 and not programs.notices


def test_one_program_serves_all_starts_and_no_other_settings(case, monkeypatch):
    observations, simulate, settings = case
    settings, made, programs, losses = dataclasses.replace(settings, iterations=2, restarts=1), [], Programs(), set()
    monkeypatch.setattr(Programs, "_make", lambda self, program, *given: made.append(1) or program)
    grey = torch.full((2, *settings.image_shape), 0.5)
    tried = [settings, *(dataclasses.replace(settings, start=lambda observation, restart, value=value: (value * grey, None)) for value in (0.5, 1.0))]
    tried += [dataclasses.replace(settings, tv=0.3), dataclasses.replace(settings, distance="l2"), dataclasses.replace(settings, priors=((1.0, lambda point: point.images.mean()),))]
    for one, expected in zip(tried, (1, 1, 1, 2, 3, 4), strict=True):
        plain = run(observations[:1], lambda: simulate, one, mode="vmap", **DOUBLE)
        same(plain, run(observations[:1], lambda: simulate, one, mode="traced", programs=programs, **DOUBLE))
        losses.add(plain[0].loss)
        assert len(made) == expected
    assert len(losses) == len(tried)


def test_a_compiled_program_gives_the_numbers_of_a_plain_loop(case):
    observations, simulate, settings = case
    programs = Programs()
    compiled = run(observations, lambda: simulate, settings, mode="compiled", at_once=6, programs=programs, **DOUBLE)
    assert not programs.notices, programs.notices
    same(run(observations, lambda: simulate, settings, mode="loop", **DOUBLE), compiled)


def test_what_cannot_be_recorded_runs_vectorised_and_says_so(case):
    observations, simulate, settings = case

    def stubborn(params, known, images, labels, noise):
        if get_proxy_mode() is not None:
            raise RuntimeError("this model reads its values")
        return simulate(params, known, images, labels, noise)

    programs = Programs()
    found = run(observations, lambda: stubborn, settings, mode="traced", programs=programs, **DOUBLE)
    same(run(observations, lambda: simulate, settings, **DOUBLE), found)
    assert "this model reads its values" in programs.notices[0]


@pytest.mark.parametrize("form", ["forward_over_reverse", "central_difference"])
@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_the_first_order_forms_have_the_gradient_of_double_backward(tiny, form, distance):
    """A smooth net: at a kink the central difference sees the gates that double backward overlooks."""
    model = tiny.Net(sigma=0.5, activation=torch.nn.Tanh)
    simulate, params = with_loss(model), tiny.weights(model)
    observations = [tiny.observe(simulate, params, size=2, seed=seed, noise=tiny.draw_noise(seed, 2))[0] for seed in range(3)]
    settings = joint(noise_shape=(2, *tiny.latent), iterations=6, distance=distance, difference_step=1e-6, **tiny.settings)
    reference = run(observations, lambda: simulate, settings, **DOUBLE)
    for mode in ("loop", "vmap", "traced"):
        found = run(observations, lambda: simulate, dataclasses.replace(settings, form=form), mode=mode, **DOUBLE)
        same(reference, found, rtol=1e-4, atol=1e-4)


def test_forward_over_reverse_equals_double_backward_with_curved_kinks(case):
    observations, simulate, settings = case
    found = run(observations, lambda: simulate, dataclasses.replace(settings, form="forward_over_reverse"), **DOUBLE)
    same(run(observations, lambda: simulate, settings, **DOUBLE), found)


def trusting(observation, simulate, trust):
    """What trust stands for, by hand: the update and its simulation times it."""

    def weighed(update):
        return {name: tensor * trust.get(name, 1.0) for name, tensor in update.items()}

    return dataclasses.replace(observation, update=weighed(observation.update)), lambda *given: weighed(simulate(*given))


def absolute(update, target, scale):
    return sum((update[name] * scale - tensor).abs().sum() for name, tensor in target.items())


@pytest.mark.parametrize("mode", ["loop", "vmap", "traced"])
@pytest.mark.parametrize("distance", ["cosine", "l2", "own"])
def test_what_is_trusted_less_counts_less_in_every_execution_and_for_every_observation_by_itself(case, mode, distance):
    """Beside one that says nothing, and one that trusts but one tensor otherwise; the second has two starts that share its target."""
    observations, simulate, settings = case
    settings = dataclasses.replace(settings, distance=absolute if distance == "own" else distance)
    each = [{}, {name: torch.tensor(0.5**place) for place, name in enumerate(observations[0].update)}, {"predictor.3.weight": torch.tensor(0.1)}]
    found = run([dataclasses.replace(one, trust=trust) for one, trust in zip(observations, each, strict=True)], lambda: simulate, settings, mode=mode, at_once=4, **DOUBLE)
    for place, (one, trust) in enumerate(zip(observations, each, strict=True)):
        weighed, by_hand = trusting(one, simulate, trust)
        expected = run([weighed] * 3, lambda by_hand=by_hand: by_hand, settings, mode="loop", **DOUBLE)[place]
        same([found[place]], [expected])
    assert (found[1].losses[-1] - run(observations, lambda: simulate, settings, **DOUBLE)[1].losses[-1]).abs() > 1e-4


@pytest.mark.parametrize("mode", ["loop", "vmap", "traced"])
def test_single_entries_are_trusted_beside_whole_tensors(case, mode):
    """Of three observations one trusts entries, one the same tensor as a whole, one nothing."""
    observations, simulate, settings = case
    entries = torch.linspace(0.1, 1.0, observations[0].update["predictor.3.weight"].numel()).view_as(observations[0].update["predictor.3.weight"])
    each = [{"predictor.3.weight": entries}, {"predictor.3.weight": torch.tensor(0.1)}, {}]
    found = run([dataclasses.replace(one, trust=trust) for one, trust in zip(observations, each, strict=True)], lambda: simulate, settings, mode=mode, at_once=4, **DOUBLE)
    for place, (one, trust) in enumerate(zip(observations, each, strict=True)):
        weighed, by_hand = trusting(one, simulate, trust)
        same([found[place]], [run([weighed] * 3, lambda by_hand=by_hand: by_hand, settings, mode="loop", **DOUBLE)[place]])
    whole = dataclasses.replace(observations[0], trust={"predictor.3.weight": entries.mean()})
    assert (found[0].losses[-1] - run([whole], lambda: simulate, settings, **DOUBLE)[0].losses[-1]).abs() > 1e-5


@pytest.mark.parametrize("form", ["forward_over_reverse", "central_difference"])
def test_the_first_order_forms_trust_as_double_backward_does(tiny, form):
    model = tiny.Net(sigma=0.5, activation=torch.nn.Tanh)
    simulate, params = with_loss(model), tiny.weights(model)
    one = tiny.observe(simulate, params, size=2, noise=tiny.draw_noise(0, 2))[0]
    one = dataclasses.replace(one, trust={name: torch.tensor(0.5**place) for place, name in enumerate(one.update)})
    settings = joint(noise_shape=(2, *tiny.latent), iterations=6, difference_step=1e-6, **tiny.settings)
    found = run([one], lambda: simulate, dataclasses.replace(settings, form=form), **DOUBLE)
    same(run([one], lambda: simulate, settings, **DOUBLE), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trust", [{"nothing": torch.tensor(1.0)}, {"predictor.1.bias": torch.ones(7)}, {"predictor.1.bias": torch.tensor(0.0)}, {"predictor.1.bias": torch.tensor(float("nan"))}, {"predictor.1.bias": torch.arange(8.0)}])
def test_trust_that_means_nothing_is_refused(case, trust):
    observations, simulate, settings = case
    with pytest.raises(InputError, match="expected finite numbers above 0"):
        run([dataclasses.replace(observations[0], trust=trust)], lambda: simulate, settings, **DOUBLE)


def test_a_first_order_form_without_a_loss_is_refused(case, tiny):
    observations, simulate, settings = case
    with pytest.raises(InputError, match="carries its loss"):
        run(observations, lambda: lambda *a: simulate(*a), dataclasses.replace(settings, form="central_difference"), **DOUBLE)


def test_an_unknown_mode_and_precision_are_refused(case):
    observations, simulate, settings = case
    with pytest.raises(InputError, match="mode='fast' is unknown"):
        run(observations, lambda: simulate, settings, mode="fast", **DOUBLE)
    with pytest.raises(InputError, match="precision='half'"):
        run(observations, lambda: simulate, settings, precision="half", **DOUBLE)


def test_bfloat16_keeps_the_matching_loss_in_float32(case):
    observations, simulate, settings = case
    observations = [dataclasses.replace(o, params={n: t.float() for n, t in o.params.items()}) for o in observations]
    plain, low = (run(observations, lambda: simulate, settings, seed=3, precision=precision) for precision in ("float32", "bfloat16"))
    assert all(one.loss != other.loss for one, other in zip(plain, low, strict=True))
    for one, other in zip(plain, low, strict=True):
        assert other.losses.dtype == torch.float32 and abs(one.losses[0] - other.losses[0]) < 0.02 * one.losses[0]


def test_tf32_is_switched_on_for_the_inner_step_alone(case):
    observations, simulate, settings = case
    seen, flags = [], lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    before = flags()

    def looking(*given):
        seen.append(flags())
        return simulate(*given)

    found = run(observations, lambda: looking, settings, precision="tf32", **DOUBLE)
    assert seen.count((True, True)) >= settings.iterations and flags() == before  # beside the looks that check the observations
    same(found, run(observations, lambda: simulate, settings, **DOUBLE), rtol=0, atol=0)  # a CPU has none


# --- parts that a user can replace ------------------------------------------------------------------------------------


def test_priors_distances_and_optimisers_of_one_s_own_are_used(case, tiny):
    observations, simulate, settings = case

    def darkness(point):
        return point.images.mean()

    def l1(update, target, scale):
        return sum((tensor * scale - target[name]).abs().sum() for name, tensor in update.items())

    @dataclasses.dataclass(frozen=True)
    class Descent:
        def begin(self, variables):
            return {}

        def step(self, variables, gradients, loss, state, *, rates, iteration, evaluate):
            return {n: v - rates[n].view(-1, *[1] * (v.ndim - 1)) * gradients[n] for n, v in variables.items()}, state

    settings = dataclasses.replace(settings, priors=((50.0, darkness),), distance=l1, optimiser=Descent(), iterations=30)
    found = run(observations, lambda: simulate, settings, mode="traced", **DOUBLE)
    same(run(observations, lambda: simulate, settings, mode="loop", **DOUBLE), found)
    assert images_of(found).mean() < 0.25 < images_of(run(observations, lambda: simulate, dataclasses.replace(settings, priors=()), **DOUBLE)).mean()
    one, images = found[0], found[0].images.double()
    assert one.loss == pytest.approx(one.fit + 50 * float(images.mean()), rel=0.05)


def test_further_unknowns_reach_the_simulator_and_stay_between_their_bounds(tiny):
    """The client's lr is not known: α scales the update, and is found with the images."""
    from gidef.attack.matching import Searched

    model = tiny.Net(activation=torch.nn.Tanh)
    gradient, params = tiny.simulator(model), tiny.weights(model)

    def simulate(params, known, images, labels, noise):
        rest = {name: tensor for name, tensor in known.items() if name != "alpha"}
        return {name: known["alpha"] * tensor for name, tensor in gradient(params, rest, images, labels, noise).items()}

    observation, _, _ = tiny.observe(gradient, params)
    observation = dataclasses.replace(observation, update={name: 0.5 * tensor for name, tensor in observation.update.items()})
    settings = Matching(distance="l2", tv=0.0, iterations=400, searched={"alpha": Searched(start=1.0, lr=0.05, low=0.2, high=1.5)}, **tiny.settings)
    rows = drain(run_chunk(((0, 0),), [observation], simulate, settings, **DOUBLE))
    assert rows["fit"] < 0.01 * rows["first_fit"] and 0.4 < float(rows["alpha"]) < 0.6
    bounded = dataclasses.replace(settings, searched={"alpha": Searched(start=1.0, lr=0.5, low=0.9, high=1.5)}, iterations=10)
    assert 0.8999 < float(drain(run_chunk(((0, 0),), [observation], simulate, bounded, **DOUBLE))["alpha"]) <= 1.5


def test_a_code_is_searched_instead_of_pixels(tiny):
    """Known answer: the image is in the range of the renderer."""
    draw = torch.Generator().manual_seed(5)
    basis = torch.randn(4, *tiny.shape, generator=draw, dtype=torch.float64)

    def render(code):
        return torch.sigmoid(torch.einsum("bd,dchw->bchw", code.double(), basis))

    model = tiny.Net(activation=torch.nn.Tanh)
    simulate, params = tiny.simulator(model), tiny.weights(model)
    truth = render(torch.randn(1, 4, generator=draw))
    update = simulate(params, {}, truth, F.one_hot(torch.tensor([1]), 3).double(), None)
    observation = dataclasses.replace(tiny.observe(simulate, params)[0], update=update, labels=torch.tensor([1]))
    settings = naive(render=render, code_shape=(4,), code_weight=0.0, tv=0.0, iterations=400, restarts=3, snapshots=2, **tiny.settings)
    (found,) = run([observation], lambda: simulate, settings, **DOUBLE)
    torch.testing.assert_close(found.images.double(), truth, rtol=0, atol=5e-3)
    assert found.snapshots.shape == (2, 1, *tiny.shape)


def test_labels_are_searched_with_the_images(tiny):
    model = tiny.Net(activation=torch.nn.Tanh)
    simulate, params = tiny.simulator(model), tiny.weights(model)
    made = [tiny.observe(simulate, params, seed=seed) for seed in range(4)]
    hidden = [dataclasses.replace(one[0], labels=None) for one in made]
    settings = naive(search_labels=True, tv=0.0, iterations=200, restarts=2, **tiny.settings)
    found = run(hidden, lambda: simulate, settings, **DOUBLE)
    assert [one.labels.tolist() for one in found] == [one[2].tolist() for one in made]


@pytest.mark.parametrize("name", ["cosine", "l2", "cosine_layers"])
@pytest.mark.parametrize("size", [1.0, 1e-7, 0.0])
def test_a_distance_s_slope_by_hand_is_the_one_of_autograd(name, size):
    draw = torch.Generator().manual_seed(0)
    update = {key: size * torch.randn(shape, generator=draw, dtype=torch.float64) for key, shape in (("a", (4, 3)), ("b", (5,)))}
    target = {key: torch.randn(tensor.shape, generator=draw, dtype=torch.float64) for key, tensor in update.items()}
    norm = sum(tensor.square().sum() for tensor in target.values()).sqrt()
    target, scale = {key: tensor / norm for key, tensor in target.items()}, 1 / norm
    fit, slope = distance_and_slope(name, update, target, scale)
    expected = grad(lambda u: distance(name, u, target, scale))(update)
    torch.testing.assert_close(fit, distance(name, update, target, scale))
    for key in update:
        torch.testing.assert_close(slope[key], expected[key], rtol=1e-9, atol=1e-12)
