"""Noise, clipping, signs and quantisation of updates, against plain NumPy."""

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

from gidef.defence.clipping import Clip
from gidef.defence.noise import AddNoise, draw, percentile
from gidef.defence.pruning import Prune
from gidef.defence.quantisation import Quantise
from gidef.defence.sign import WIDTH, SignOnly
from gidef.errors import InputError
from gidef.rng import generator


def an_update(scale=1.0):
    g = generator(0, "transforms")
    shapes = {"weight": (4, 3, 2), "bias": (5,), "level": (1,)}
    return {name: scale * torch.randn(shape, generator=g) for name, shape in shapes.items()} | {"dead": torch.zeros(3)}


def vector(update):
    return np.concatenate([update[name].numpy().flatten() for name in sorted(update)]).astype(np.float64)


# --- noise -------------------------------------------------------------------------------------------------------------


def test_a_percentile_is_numpys():
    for count in (1, 2, 19, 20, 21, 1000):
        values = torch.randn(count, generator=generator(count))
        assert float(percentile(values)) == np.percentile(np.abs(values.numpy()), 95, method="inverted_cdf")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 0.99, 0.999])
def test_a_percentile_is_of_the_entries_that_are_not_0(share):
    """So that noise behind pruning is noise, also where 95 of 100 entries are 0."""
    values = Prune(share=share).apply({"a": torch.randn(30, 100, generator=generator(1))}, generator=generator(0))["a"]
    others = np.abs(values.numpy()[values.numpy() != 0])
    level = np.percentile(others, 95, method="inverted_cdf")
    assert len(others) == 3000 - int(share * 3000) and float(percentile(values)) == level > 0
    noise = AddNoise(std=0.1).apply({"a": values}, generator=generator(2))["a"] - values
    assert float(noise.std()) == pytest.approx(0.1 * level, rel=0.05)
    assert float(percentile(torch.zeros(20))) == 0


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
@pytest.mark.parametrize("relative", [True, False])
def test_noise_has_the_level_and_law_that_were_asked_for(law, relative):
    update = {"a": torch.randn(200_000, generator=generator(1)), "b": 10 * torch.randn(200_000, generator=generator(2))}
    noisy = AddNoise(std=0.3, law=law, relative=relative).apply(update, generator=generator(3))
    for name, tensor in update.items():
        noise = (noisy[name] - tensor).double().numpy()
        std = 0.3 * (np.percentile(np.abs(tensor.numpy()), 95, method="inverted_cdf") if relative else 1.0)
        assert abs(noise.mean()) < 0.01 * std and noise.std() == pytest.approx(std, rel=0.01)
        # E|n| / σ and the fourth moment tell the laws apart: √(2/π) and 3, 1/√2 and 6
        flat, kurtosis = {"gaussian": (np.sqrt(2 / np.pi), 3.0), "laplace": (np.sqrt(0.5), 6.0)}[law]
        assert np.abs(noise).mean() / std == pytest.approx(flat, rel=0.01)
        assert np.mean(noise**4) / std**4 == pytest.approx(kurtosis, rel=0.05)
        assert abs(np.corrcoef(noise, tensor.numpy())[0, 1]) < 0.01


def test_no_noise_changes_no_bit_and_noise_comes_from_the_generator_alone():
    update = an_update()
    assert all(torch.equal(tensor, update[name]) for name, tensor in AddNoise(std=0.0).apply(update, generator=generator(0)).items())
    one, same, other = (AddNoise(std=0.1).apply(update, generator=generator(seed)) for seed in (0, 0, 1))
    backwards = AddNoise(std=0.1).apply(dict(reversed(update.items())), generator=generator(0))
    assert list(one) == list(update) and all(torch.equal(one[name], same[name]) and torch.equal(one[name], backwards[name]) for name in update)
    assert not torch.equal(one["weight"], other["weight"]) and torch.equal(one["dead"], update["dead"])
    drawn = generator(0)
    for name in sorted(update):
        noise = draw(update[name], law="gaussian", generator=drawn).numpy()
        level = np.float32(0.1) * np.percentile(np.abs(update[name].numpy()), 95, method="inverted_cdf")
        np.testing.assert_allclose(one[name].numpy(), update[name].numpy() + level * noise, rtol=1e-6, atol=1e-7)


# --- clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.1, 1.0, 4.0, 100.0])
def test_clipping_bounds_the_norm_and_keeps_the_direction(bound):
    update = an_update()
    norm = np.linalg.norm(vector(update))
    found = Clip(bound=bound).apply(update, generator=generator(0))
    np.testing.assert_allclose(vector(found), vector(update) * min(1.0, bound / norm), rtol=1e-6)
    each = Clip(bound=bound, per_tensor=True).apply(update, generator=generator(0))
    for name, tensor in update.items():
        own = np.linalg.norm(tensor.numpy().astype(np.float64))
        np.testing.assert_allclose(each[name].numpy(), tensor.numpy() * (min(1.0, bound / own) if own else 1.0), rtol=1e-6)


@pytest.mark.parametrize("per_tensor", [True, False])
def test_a_short_update_keeps_every_bit(per_tensor):
    update = an_update()
    assert all(torch.equal(tensor, update[name]) for name, tensor in Clip(bound=50.0, per_tensor=per_tensor).apply(update, generator=generator(0)).items())


def numeric_slope(value, point, step=1e-6):
    """Central differences of a scalar function of a float64 vector."""
    slope = np.zeros(len(point))
    for k in range(len(point)):
        ahead, behind = point.copy(), point.copy()
        ahead[k] += step
        behind[k] -= step
        slope[k] = (value(ahead) - value(behind)) / (2 * step)
    return slope


@pytest.mark.parametrize("per_tensor", [True, False])
def test_an_imitated_clip_has_the_slope_of_the_clip(per_tensor):
    weights = torch.randn(7, generator=generator(4), dtype=torch.float64)
    point, clip = torch.randn(7, generator=generator(5), dtype=torch.float64), Clip(bound=0.5, per_tensor=per_tensor)

    def parts(flat):
        return {"a": flat[:3], "b": flat[3:]}

    def value(flat):
        pieces = [flat[:3], flat[3:]] if per_tensor else [flat]
        return sum(w @ (piece * min(1.0, 0.5 / np.linalg.norm(piece))) for w, piece in zip(np.split(weights.numpy(), [3]) if per_tensor else [weights.numpy()], pieces, strict=True))

    def ours(flat):
        found = clip.imitate(parts(flat), {})
        return (torch.cat([found["a"], found["b"]]) * weights).sum()

    np.testing.assert_allclose(grad(ours)(point).numpy(), numeric_slope(value, point.numpy()), rtol=1e-6, atol=1e-8)
    assert grad(ours)(torch.zeros(7, dtype=torch.float64)).equal(weights)  # finite at 0, where the norm has no slope


# --- signs -------------------------------------------------------------------------------------------------------------


def test_signs_keep_the_scale():
    update = an_update(3.0)
    found = SignOnly().apply(update, generator=generator(0))
    for name, tensor in update.items():
        values = tensor.numpy().astype(np.float64)
        np.testing.assert_allclose(found[name].numpy(), np.sign(values) * np.abs(values).mean(), rtol=1e-6)
        assert float(found[name].abs().sum()) == pytest.approx(float(tensor.abs().sum()), rel=1e-5)


def test_imitated_signs_have_the_value_of_the_sign_and_the_slope_of_the_tangent():
    point, weights = (torch.randn(6, generator=generator(seed), dtype=torch.float64) for seed in (6, 7))
    found = SignOnly().imitate({"a": point}, {})["a"]
    np.testing.assert_allclose(found.numpy(), np.sign(point.numpy()) * np.abs(point.numpy()).mean(), rtol=1e-12)
    size = np.abs(point.numpy()).mean()
    expected = numeric_slope(lambda x: weights.numpy() @ (size * np.tanh(x / (WIDTH * size)) + np.sign(point.numpy()) * np.abs(x).mean()), point.numpy())
    slope = grad(lambda x: (SignOnly().imitate({"a": x}, {})["a"] * weights).sum())(point)
    np.testing.assert_allclose(slope.numpy(), expected, rtol=1e-6)
    assert grad(lambda x: SignOnly().imitate({"a": x}, {})["a"].sum())(torch.zeros(3)).isfinite().all()


# --- quantisation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_quantised_entries_are_neighbouring_levels_and_right_on_average(bits, norm):
    update = an_update()
    levels, draws = 2 ** (bits - 1) - 1, 2000
    g = generator(0, "quantise")
    found = [Quantise(bits=bits, norm=norm).apply(update, generator=g) for _ in range(draws)]
    for name, tensor in update.items():
        values = tensor.numpy().astype(np.float64)
        size = np.abs(values).max() if norm == "max" else np.linalg.norm(values)
        samples = np.stack([one[name].numpy() for one in found]).astype(np.float64)
        if size == 0:
            assert not samples.any()
            continue
        steps = samples / size * levels
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
        assert (np.abs(samples - values) <= size / levels * (1 + 1e-4)).all() and (samples * values >= 0).all()
        place = np.abs(values) / size * levels
        spread = size / levels * np.sqrt((place - np.floor(place)) * (1 - place + np.floor(place)))  # a Bernoulli variable's
        assert (np.abs(samples.mean(0) - values) < 5 * spread / np.sqrt(draws) + 1e-6).all()
        np.testing.assert_allclose(samples.std(0), spread, atol=0.06 * size / levels)


def test_one_draw_of_quantisation_is_numpys():
    update, draws = an_update(), generator(9)
    found = Quantise(bits=4).apply(update, generator=generator(9))
    for name in sorted(update):
        values = update[name].numpy().astype(np.float64)
        size, uniform = max(np.abs(values).max(), 1e-30), torch.rand(values.shape, generator=draws).numpy()
        place = 7 * np.abs(values) / size
        expected = size * np.sign(values) * (np.floor(place) + (uniform < place - np.floor(place))) / 7
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-5, atol=1e-7)


# --- all of them ---------------------------------------------------------------------------------------------------------

ALL = [AddNoise(), AddNoise(law="laplace", relative=False), Clip(bound=0.3), Clip(bound=0.3, per_tensor=True), SignOnly(), Quantise()]


@pytest.mark.parametrize("transform", ALL, ids=str)
def test_a_gradient_and_the_step_against_it_are_treated_alike_and_nothing_is_modified(transform):
    update = an_update()
    before = {name: tensor.clone() for name, tensor in update.items()}
    found = transform.apply(update, generator=generator(0))
    negated = transform.apply({name: -tensor for name, tensor in update.items()}, generator=generator(0))
    for name, tensor in found.items():
        assert torch.equal(update[name], before[name]) and tensor.dtype == update[name].dtype and tensor.shape == update[name].shape
        if not isinstance(transform, AddNoise):  # equal draws are equal in law only where noise is added
            assert torch.equal(tensor, -negated[name])


@pytest.mark.parametrize("transform", ALL, ids=str)
def test_an_imitation_of_many_updates_at_once_is_that_of_each(transform):
    update = {name: tensor for name, tensor in an_update().items() if name != "dead"}
    many = {name: torch.stack([tensor, 2 * tensor, -tensor]) for name, tensor in update.items()}
    found = vmap(lambda one: transform.imitate(one, {}))(many)
    for row in range(3):
        alone = transform.imitate({name: tensor[row] for name, tensor in many.items()}, {})
        for name, tensor in alone.items():
            torch.testing.assert_close(found[name][row], tensor)


@pytest.mark.parametrize(("transform", "fields"), [(AddNoise, {"std": -1.0}), (AddNoise, {"law": "cauchy"}), (Clip, {"bound": 0.0}), (Quantise, {"bits": 1}), (Quantise, {"norm": "l1"})])
def test_what_is_out_of_range_is_refused(transform, fields):
    [(name, value)] = fields.items()
    with pytest.raises(InputError, match=f"{name}={value!r}"):
        transform(**fields)
