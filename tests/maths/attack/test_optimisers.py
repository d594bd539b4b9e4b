import contextlib
import copy
import math

import pytest
import torch
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode

from gidef.attack.optimisers import DECAYS, Adam, Momentum, decay_factor, rate_table
from gidef.errors import InputError

DOUBLE = torch.float64
SHAPES = {"images": (2, 1, 3, 4), "noise": (5,), "alpha": ()}
READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")

every_optimiser = pytest.mark.parametrize(
    "optimiser",
    [
        Adam(),
        Adam(sign="hard", bias_correction=False),
        Adam(sign="soft", clip=0.1, langevin=0.2),
        Adam(sign="soft", soft_over=40),
        Momentum(clip=0.1),
        Momentum(nesterov=True, sign="soft", langevin=0.1, langevin_on=("noise", "images")),
    ],
    ids=["adam", "hard", "soft", "soft as published", "momentum", "nesterov"],
)


def drawn(attacks, seed=0, dtype=DOUBLE, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(attacks, *shape, generator=draw, dtype=DOUBLE).to(dtype) for name, shape in SHAPES.items()}


def pull(variables, seed):
    """A gradient of each attack's own: towards a third, and something that varies with the iteration."""
    noise = drawn(9, 1000 + seed, scale=0.1)
    return {name: 0.05 * (x - 1 / 3) + 0.1 * noise[name][: len(x)].to(x.dtype) for name, x in variables.items()}


def run(optimiser, variables, iterations, *, state=None, first=0, rate=0.1, decay=0.9, gradients=pull):
    state = optimiser.begin(variables) if state is None else state
    for i in range(first, first + iterations):
        rates = {name: torch.full((len(x),), rate * decay**i, dtype=x.dtype) for name, x in variables.items()}
        index = torch.tensor(i)
        variables, state = optimiser.step(variables, gradients(variables, i), None, state, rates=rates, iteration=index, evaluate=None)
    return variables, state


def taken(tensors, kept):
    return {name: tensor[kept] for name, tensor in tensors.items()}


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **(tolerance or {"rtol": 0, "atol": 0}), equal_nan=True)


# The steps themselves


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("sign", ["none", "hard"])
def test_adam_is_the_formula_with_the_sign_of_the_images_gradient_only(dtype, sign):
    variables = drawn(3, dtype=dtype)
    expected, moments = dict(variables), {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, x in variables.items()}
    for i in range(30):
        for name, gradient in pull(expected, i).items():
            if name == "images" and sign == "hard":
                gradient = torch.where(gradient > 0, 1.0, torch.where(gradient < 0, -1.0, 0.0)).to(dtype)
            m, v = 0.9 * moments[name][0] + 0.1 * gradient, 0.999 * moments[name][1] + 0.001 * gradient * gradient
            moments[name] = m, v
            move = 0.1 * 0.9**i * (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-12)
            expected[name] = expected[name] - move
    tolerance = 1e-13 if dtype == DOUBLE else 2e-6
    assert_same(run(Adam(sign=sign), variables, 30)[0], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (Adam(betas=(0.5, 0.99), eps=1e-4), lambda x: torch.optim.Adam(x, lr=0.1, betas=(0.5, 0.99), eps=1e-4)),
        (Momentum(momentum=0.8), lambda x: torch.optim.SGD(x, lr=0.1, momentum=0.8)),
        (Momentum(momentum=0.8, nesterov=True), lambda x: torch.optim.SGD(x, lr=0.1, momentum=0.8, nesterov=True)),
        (Momentum(momentum=0.0), lambda x: torch.optim.SGD(x, lr=0.1)),
    ],
    ids=["adam", "heavy ball", "nesterov", "plain"],
)
def test_each_attack_goes_as_torch_s_own_optimiser_takes_it_alone(ours, theirs):
    variables = drawn(3)
    found, _ = run(ours, variables, 25)
    for attack in range(3):
        alone = {name: x[attack : attack + 1].clone().requires_grad_() for name, x in variables.items()}
        optimiser = theirs(list(alone.values()))
        for i in range(25):
            optimiser.param_groups[0]["lr"] = 0.1 * 0.9**i
            full = {name: torch.cat([torch.zeros(attack, *x.shape[1:], dtype=DOUBLE), x.detach()]) for name, x in alone.items()}
            for name, gradient in pull(full, i).items():
                alone[name].grad = gradient[attack:].clone()
            optimiser.step()
        assert_same(taken(found, [attack]), {name: x.detach() for name, x in alone.items()}, rtol=1e-11, atol=1e-12)


def test_without_bias_correction_the_first_step_is_that_of_the_raw_moments():
    variables, gradients = drawn(2), drawn(2, 1)
    found, _ = run(Adam(bias_correction=False), variables, 1, gradients=lambda v, i: gradients)
    expected = {name: x - 0.1 * 0.1 * gradients[name] / (math.sqrt(0.001) * gradients[name].abs()) for name, x in variables.items()}
    assert_same(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("optimiser", [Adam(), Adam(sign="hard"), Momentum(momentum=0.5, sign="soft")], ids=["adam", "hard", "soft"])
def test_a_quadratic_is_descended_to_its_minimum(optimiser):
    variables = drawn(4)
    found, _ = run(optimiser, variables, 200, rate=0.3, decay=0.97, gradients=lambda v, i: {name: x - 0.25 for name, x in v.items()})
    for name, x in found.items():
        assert (x - 0.25).abs().max() < 0.05 * (variables[name] - 0.25).abs().max()


def test_rates_are_each_attack_s_and_variable_s_own():
    variables, gradients = drawn(3), drawn(3, 1)
    rates = {name: torch.tensor([0.0, 1.0, 2.0], dtype=DOUBLE) for name in variables} | {"noise": torch.tensor([3.0, 0.0, 1.0], dtype=DOUBLE)}
    optimiser = Momentum()
    state = optimiser.begin(variables)
    found, _ = optimiser.step(variables, gradients, None, state, rates=rates, iteration=torch.tensor(0), evaluate=None)
    for name, x in variables.items():
        for attack in range(3):
            torch.testing.assert_close(found[name][attack], x[attack] - rates[name][attack] * gradients[name][attack])


# What is done to the gradient


def shaped(optimiser, gradients, iteration=0):
    """The gradient that reaches the step, read off a step of plain descent at rate 1."""
    zero = {name: torch.zeros_like(g) for name, g in gradients.items()}
    rates = {name: torch.ones(g.shape[:1], dtype=g.dtype) for name, g in gradients.items()}
    index = torch.tensor(iteration)
    found, _ = optimiser.step(zero, gradients, None, optimiser.begin(zero), rates=rates, iteration=index, evaluate=None)
    return {name: -x for name, x in found.items()}


def test_soft_sign_is_tanh_in_units_of_each_attack_s_own_root_mean_square():
    gradients = drawn(3)
    found = shaped(Momentum(sign="soft"), gradients)
    for attack in range(3):
        g = gradients["images"][attack]
        torch.testing.assert_close(found["images"][attack], torch.tanh(g / (g * g).mean().sqrt()))
    assert_same({name: found[name] for name in ("noise", "alpha")}, {name: gradients[name] for name in ("noise", "alpha")})


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_soft_sign_knows_no_scale_and_leaves_zero_at_zero(scale):
    gradients = drawn(2, dtype=torch.float32)
    gradients["images"][1] = 0
    scaled = {name: scale * g for name, g in gradients.items()}
    found = shaped(Momentum(sign="soft"), scaled)["images"]
    torch.testing.assert_close(found[0], shaped(Momentum(sign="soft"), gradients)["images"][0], rtol=1e-5, atol=1e-6)
    assert (found[1] == 0).all() and found[0].abs().max() > 0.5


def test_published_soft_sign_is_nearly_the_gradient_where_that_is_small_and_sharpness_falls():
    """tanh(s g) / s with s = 1 − iteration / 40: at iteration 0 and g = 1, tanh 1; at 30, 4 tanh ¼; after the end s stays at 1/40."""
    one = {"images": torch.ones(1, 1, dtype=DOUBLE)}
    for iteration, expected in ((0, 0.7615941559557649), (30, 0.9796746496148222), (39, 40 * math.tanh(1 / 40)), (50, 40 * math.tanh(1 / 40))):
        assert float(shaped(Momentum(sign="soft", soft_over=40), one, iteration)["images"]) == pytest.approx(expected, rel=1e-12)
    small = {"images": torch.full((1, 1), 1e-4, dtype=DOUBLE)}
    assert float(shaped(Momentum(sign="soft", soft_over=40), small)["images"]) == pytest.approx(1e-4, rel=1e-7)


def test_clipping_is_by_each_attack_s_norm_over_all_its_variables():
    gradients = drawn(4)
    for name, g in gradients.items():
        gradients[name] = g * torch.tensor([1e-3, 1.0, 100.0, 0.0], dtype=DOUBLE).view(-1, *[1] * (g.ndim - 1))
    found = shaped(Momentum(clip=0.5), gradients)
    for attack in range(4):
        alone = [torch.zeros_like(g[attack]).requires_grad_() for g in gradients.values()]
        for parameter, g in zip(alone, gradients.values(), strict=True):
            parameter.grad = g[attack].clone()
        torch.nn.utils.clip_grad_norm_(alone, 0.5)
        for name, parameter in zip(gradients, alone, strict=True):
            torch.testing.assert_close(found[name][attack], parameter.grad, rtol=1e-5, atol=1e-9)
    assert_same(taken(found, [0, 3]), taken(gradients, [0, 3]))


def test_clipping_a_gradient_whose_square_overflows_gives_its_direction():
    gradients = {"images": torch.tensor([[3e30, -4e30], [3e-30, 4e-30]])}
    found = shaped(Momentum(clip=1.0), gradients)["images"]
    torch.testing.assert_close(found, torch.tensor([[0.6, -0.8], [3e-30, 4e-30]]), rtol=1e-6, atol=0)


def test_clipping_comes_before_the_sign():
    one = {"images": torch.full((1, 1), 8.0, dtype=DOUBLE)}
    found = shaped(Momentum(clip=1.0, sign="soft", soft_over=10), one)
    assert float(found["images"]) == pytest.approx(math.tanh(1.0))


# Langevin noise


def noise_of(attacks=3, iteration=0, size=4000, dtype=torch.float32, seeds=None, scale=1.0, name="images", start=0):
    optimiser = Momentum(langevin=scale, langevin_on=("images", "noise"))
    x = torch.rand(attacks, size, generator=torch.Generator().manual_seed(start)).to(dtype)
    state = optimiser.begin({name: x}, **({} if seeds is None else {"seeds": seeds}))
    rates, index = {name: torch.ones(attacks, dtype=dtype)}, torch.tensor(iteration)
    found, _ = optimiser.step({name: x}, {name: torch.zeros_like(x)}, None, state, rates=rates, iteration=index, evaluate=None)
    return (found[name] - x).double()


def test_noise_is_standard_normal_and_uncorrelated_between_attacks_iterations_variables_and_neighbours():
    noise = noise_of(dtype=DOUBLE, size=20_000)
    for one in noise:
        assert stats.kstest(one.numpy(), "norm").pvalue > 1e-3
    others = [noise_of(dtype=DOUBLE, size=20_000, iteration=1), noise_of(dtype=DOUBLE, size=20_000, name="noise")]
    table = torch.cat([noise, *others, noise.roll(1, 1), noise.square(), others[0].square()])
    apart = torch.corrcoef(table) - torch.eye(len(table))
    assert apart.abs().max() < 5 / math.sqrt(20_000)


def test_noise_depends_on_the_attack_and_not_on_the_company_it_keeps():
    together = noise_of(5)
    x = torch.rand(5, 4000, generator=torch.Generator().manual_seed(0))
    optimiser = Momentum(langevin=1.0)
    for order in ([3], [4, 0, 2]):
        part = {"images": x[order]}
        rates = {"images": torch.ones(len(order))}
        still = {"images": torch.zeros_like(x[order])}
        found, _ = optimiser.step(part, still, None, optimiser.begin(part), rates=rates, iteration=torch.tensor(0), evaluate=None)
        assert torch.equal((found["images"] - x[order]).double(), together[order])


def test_noise_repeats_with_its_seed_and_changes_with_any_bit_of_it():
    seeds = torch.tensor([7, 7, 7 + 2**40, 6])
    noise = noise_of(4, seeds=seeds)
    first = noise_of(4, seeds=seeds, start=1)
    torch.testing.assert_close(noise, first, rtol=0, atol=1e-6)  # wherever the attack is
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-6)
    assert (torch.corrcoef(noise[[0, 2, 3]]) - torch.eye(3)).abs().max() < 0.1


def test_noise_is_scaled_by_the_rate_and_only_on_the_named_variables():
    variables = drawn(2)
    optimiser = Momentum(langevin=0.5, langevin_on=("noise",))
    still = {name: torch.zeros_like(x) for name, x in variables.items()}
    state, moved = optimiser.begin(variables), []
    for rate in (1.0, 0.1):
        rates = {name: torch.full((2,), rate, dtype=DOUBLE) for name in variables}
        found, _ = optimiser.step(variables, still, None, state, rates=rates, iteration=torch.tensor(3), evaluate=None)
        moved.append(found["noise"] - variables["noise"])
        assert torch.equal(found["images"], variables["images"])
    torch.testing.assert_close(0.1 * moved[0], moved[1], rtol=1e-9, atol=1e-15)
    assert moved[0].abs().max() > 0.05


def test_noise_without_a_signal_walks_as_far_as_independent_steps_do():
    variables = {"images": torch.rand(2, 2000, dtype=DOUBLE)}
    still = lambda v, i: {"images": torch.zeros_like(v["images"])}  # noqa: E731
    optimiser, state, x = Momentum(langevin=1.0), None, variables
    for i in range(25):
        x, state = run(optimiser, x, 1, state=state, first=i, rate=1.0, decay=1.0, gradients=still)
    spread = (x["images"] - variables["images"]).std(1)
    torch.testing.assert_close(spread, torch.full((2,), 5.0, dtype=DOUBLE), rtol=0.08, atol=0)


# Attacks apart, and dropped on the way


@every_optimiser
def test_an_attack_alone_goes_as_in_company(optimiser):
    variables = drawn(5)
    together, _ = run(optimiser, variables, 20)
    for attack in range(5):

        def gradients(v, i, attack=attack):
            full = {name: torch.cat([torch.zeros(attack, *x.shape[1:], dtype=DOUBLE), x]) for name, x in v.items()}
            return {name: g[attack:] for name, g in pull(full, i).items()}

        alone, _ = run(optimiser, taken(variables, [attack]), 20, gradients=gradients)
        assert_same(alone, taken(together, [attack]), rtol=1e-11, atol=1e-12)


@every_optimiser
def test_attacks_that_are_dropped_halfway_leave_the_others_where_they_would_be(optimiser):
    variables, kept = drawn(5), torch.tensor([4, 1, 2])

    def gradients(v, i):
        return {name: g[kept] for name, g in pull({n: x.new_zeros(5, *x.shape[1:]).index_copy(0, kept, x) for n, x in v.items()}, i).items()}

    whole, whole_state = run(optimiser, variables, 20)
    halfway, state = run(optimiser, variables, 9)
    rest, rest_state = run(optimiser, taken(halfway, kept), 11, state=taken(state, kept), first=9, gradients=gradients)
    assert_same(rest, taken(whole, kept), rtol=1e-11, atol=1e-12)
    assert_same(rest_state, taken(whole_state, kept), rtol=1e-11, atol=1e-12)
    assert all(tensor.shape[0] == 5 for tensor in whole_state.values())


@every_optimiser
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_disturbs_its_own_attack_only(optimiser, broken):
    def gradients(v, i):
        found = pull(v, i)
        if i == 3:
            found["images"][1, 0, 0, 0, 0] = broken
        return found

    variables = drawn(3)
    healthy, hurt = run(optimiser, variables, 8)[0], run(optimiser, variables, 8, gradients=gradients)[0]
    assert_same(taken(hurt, [0, 2]), taken(healthy, [0, 2]))
    assert not torch.equal(hurt["images"][1], healthy["images"][1])


@every_optimiser
def test_no_input_is_modified(optimiser):
    variables = drawn(3)
    _, state = run(optimiser, variables, 2)
    gradients, rates = pull(variables, 0), {name: torch.ones(3, dtype=DOUBLE) for name in variables}
    given = (variables, gradients, state, rates)
    before = copy.deepcopy(given)
    _, after = optimiser.step(variables, gradients, None, state, rates=rates, iteration=torch.tensor(2), evaluate=None)
    for one, other in zip(given, before, strict=True):
        assert_same(one, other)
    assert any(not torch.equal(after[name], state[name]) for name in state)


# The device is never waited for


@contextlib.contextmanager
def nothing_read(monkeypatch):
    """Within, whatever reads a tensor's values on the host raises."""

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was read on the host")

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, refuse)
        for name in ("nonzero", "equal", "allclose"):
            patch.setattr(torch, name, refuse)
        yield


@every_optimiser
def test_a_step_reads_no_tensor_on_the_host(optimiser, monkeypatch):
    variables = drawn(3)
    state, gradients, iteration = optimiser.begin(variables), pull(variables, 0), torch.tensor(0)
    rates = {name: torch.ones(3, dtype=DOUBLE) for name in variables}
    with nothing_read(monkeypatch):
        stepped, _ = optimiser.step(variables, gradients, None, state, rates=rates, iteration=iteration, evaluate=None)
    assert not torch.equal(stepped["images"], variables["images"])


def test_the_guard_against_reading_does_catch_a_reading(monkeypatch):
    one = torch.ones(())
    for read in (lambda: float(one), lambda: bool(one), lambda: one.item(), lambda: int(one)):
        with nothing_read(monkeypatch), pytest.raises(AssertionError, match="read on the host"):
            read()


@every_optimiser
def test_a_step_on_a_device_has_shapes_that_depend_on_no_value(optimiser):
    """Fake tensors carry no values: what needs one, or mixes devices, raises."""
    with FakeTensorMode():
        variables = {name: torch.empty(3, *shape, device="meta") for name, shape in SHAPES.items()}
        state = optimiser.begin(variables)
        rates, iteration = {name: torch.empty(3, device="meta") for name in variables}, torch.empty((), dtype=torch.int64, device="meta")
        stepped, carried = optimiser.step(variables, variables, None, state, rates=rates, iteration=iteration, evaluate=None)
    for before, after in ((variables, stepped), (state, carried)):
        assert before.keys() == after.keys()
        assert all(after[k].shape == t.shape and after[k].dtype == t.dtype and after[k].device == t.device for k, t in before.items())


@every_optimiser
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
def test_dtypes_are_kept(optimiser, dtype):
    variables = drawn(2, dtype=dtype)
    stepped, _ = run(optimiser, variables, 3)
    assert all(x.dtype == dtype and x.isfinite().all() for x in stepped.values())


# Schedules


def test_decays_have_their_known_values():
    expected = {
        "constant": [1, 1, 1, 1, 1],
        "step": [1, 1, 0.1, 0.01, 0.001],
        "linear": [1, 0.75, 0.5, 0.25, 0],
        "quadratic": [1, 0.5625, 0.25, 0.0625, 0],
        "cosine": [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0],
    }
    assert set(expected) == set(DECAYS)
    for decay, values in expected.items():
        assert [decay_factor(decay, done) for done in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(values, abs=1e-12)
    assert [decay_factor("step", done) for done in (0.3749, 0.375, 0.6249, 0.625, 0.8749, 0.875)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01, 0.001])


@pytest.mark.parametrize("iterations", [1, 8, 300])
def test_tables_hold_the_factor_of_every_iteration(iterations):
    for decay, formula in (
        ("step", lambda done: 0.1 ** sum(done >= mark / 8 for mark in (3, 5, 7))),
        ("linear", lambda done: 1 - done),
        ("quadratic", lambda done: (1 - done) ** 2),
    ):
        assert rate_table(decay, iterations, dtype=DOUBLE).tolist() == [formula(i / iterations) for i in range(iterations)]


def test_cosine_is_torch_s_annealing():
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 40), []
    for _ in range(40):
        expected.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    assert rate_table("cosine", 40, dtype=DOUBLE).tolist() == pytest.approx(expected, abs=1e-12)


def test_warm_up_rises_linearly_to_the_decay_and_never_starts_at_zero():
    plain, warm = (rate_table("cosine", 200, warmup, dtype=DOUBLE) for warmup in (0, 50))
    assert warm[0] == pytest.approx(float(plain[0]) / 50) and torch.equal(warm[49:], plain[49:])
    torch.testing.assert_close(warm[:50], plain[:50] * torch.arange(1, 51) / 50)
    assert rate_table("constant", 5, 10).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_tables_have_the_asked_dtype_and_may_be_empty():
    assert rate_table("linear", 4, dtype=torch.float16).dtype == torch.float16
    assert rate_table("step", 0).shape == (0,)


# Refusals


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Adam(sign="rough"), "sign='rough' is unknown: choose one of none, hard, soft"),
        (lambda: Adam(sign_on="images"), "expected a tuple"),
        (lambda: Momentum(langevin_on="images"), "expected a tuple"),
        (lambda: Adam(betas=(0.9, 1.0)), r"two numbers in \[0, 1\)"),
        (lambda: Adam(betas=(0.9,)), r"two numbers in \[0, 1\)"),
        (lambda: Adam(eps=-1.0), "eps=-1.0"),
        (lambda: Adam(clip=0.0), "clip=0.0"),
        (lambda: Adam(clip=math.nan), "clip=nan"),
        (lambda: Momentum(momentum=1.0), "momentum=1.0"),
        (lambda: Momentum(langevin=-0.1), "langevin=-0.1"),
        (lambda: Momentum(soft_over=0), "soft_over=0"),
        (lambda: Adam(sign="hard").begin({"code": torch.zeros(1, 2)}), r"sign_on=\('images',\) names none of the searched variables \['code'\]"),
        (lambda: Adam(langevin=1.0).begin({"code": torch.zeros(1, 2)}), "langevin_on"),
        (lambda: decay_factor("exponential", 0.0), "decay='exponential' is unknown"),
        (lambda: rate_table("exponential", 0), "decay='exponential' is unknown"),
        (lambda: rate_table("step", -1), "iterations=-1"),
        (lambda: rate_table("step", 5, warmup=-1), "warmup=-1"),
    ],
)
def test_settings_out_of_range_are_refused_in_plain_words(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_names_that_are_not_shaped_need_not_be_searched():
    assert set(Adam().begin({"code": torch.zeros(1, 2)})) == {"m.code", "v.code"}
    optimiser, code = Momentum(sign="hard", sign_on=("images", "code")), {"code": torch.tensor([[3.0, -2.0]])}
    assert shaped(optimiser, code)["code"].tolist() == [[1.0, -1.0]]
