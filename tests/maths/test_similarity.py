import functools

import pytest
import torch
from torch.func import grad, vmap

from gidef.errors import InputError
from gidef.similarity import DEPENDENCE, cka, dependence, distance_correlation, pearson2, ssim, total_variation

torch.set_num_threads(1)
FLAT_SCORES_ZERO = [name for name in DEPENDENCE if name != "neg_mse"]


def images(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_photographic_negative_counts_as_full_dependence():
    x = images(4, 3, 12, 12)
    torch.testing.assert_close(pearson2(x, 1 - x), torch.ones(4))
    assert float(dependence("pearson2", x, 1 - x)) == pytest.approx(1, abs=1e-5)


def test_pearson2_ignores_brightness_per_channel_and_a_common_contrast():
    x, y = images(3, 3, 9, 9), images(3, 3, 9, 9, seed=1)
    tinted = 0.3 * y + torch.tensor([0.1, 0.4, 0.7])[:, None, None]
    torch.testing.assert_close(pearson2(x, tinted), pearson2(x, y), atol=1e-5, rtol=1e-4)
    assert (pearson2(x, y) < 0.2).all()


def test_equal_images_score_one_and_ssim_falls_with_noise():
    x = images(2, 3, 28, 28)
    noise = images(2, 3, 28, 28, seed=1) - 0.5
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    values = torch.stack([ssim(x, x + level * noise) for level in (0.1, 0.3, 1.0)])
    assert (values.diff(dim=0) < 0).all()


def test_ssim_of_small_images_is_that_of_the_largest_odd_window_that_fits():
    x, y = images(2, 1, 8, 28), images(2, 1, 8, 28, seed=1)
    torch.testing.assert_close(ssim(x, y), ssim(x, y, window=7))
    assert not torch.allclose(ssim(x, y), ssim(x, y, window=5))
    assert ssim(images(2, 1, 1, 1), images(2, 1, 1, 1)).tolist() == pytest.approx([1, 1])


def test_total_variation_adds_both_directions_and_a_single_pixel_has_none():
    ramp = torch.arange(4.0).expand(1, 2, 3, 4) / 4  # 0.25 a step along the width only
    torch.testing.assert_close(total_variation(ramp), torch.tensor([0.25]))
    torch.testing.assert_close(total_variation(ramp.mT), torch.tensor([0.25]))
    both = ramp + torch.arange(3.0)[:, None] / 2
    torch.testing.assert_close(total_variation(both), torch.tensor([0.75]))
    assert total_variation(images(2, 3, 1, 1)).tolist() == [0, 0]


@pytest.mark.parametrize("measure", [distance_correlation, cka])
def test_batch_measures_reach_one_for_scaled_copies_and_take_unlike_shapes(measure):
    x = images(16, 3, 6, 6)
    assert float(measure(x, 0.2 + 0.5 * x)) == pytest.approx(1, abs=1e-4)
    assert 0 <= float(measure(x, images(16, 7, seed=3))) < 0.9


def test_unbiased_cka_of_independent_batches_is_near_zero_where_distance_correlation_is_not():
    x, y = images(64, 3, 8, 8), images(64, 3, 8, 8, seed=1)
    assert float(cka(x, y)) < 0.1
    assert float(distance_correlation(x, y)) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", FLAT_SCORES_ZERO)
def test_images_without_variance_score_zero_with_zero_gradient(name, level, dtype):
    x, flat = images(5, 3, 12, 12, dtype=dtype), torch.full((5, 3, 12, 12), level, dtype=dtype)
    for left, right in ((x, flat), (flat, x), (flat, flat)):
        left, right = left.clone().requires_grad_(), right.clone().requires_grad_()
        value = dependence(name, left, right, ssim_threshold=-1.0)
        assert value.item() == 0
        for gradient in torch.autograd.grad(value, (left, right)):
            assert (gradient == 0).all()


def test_one_flat_image_in_a_batch_leaves_the_others_their_gradient():
    x, y = images(4, 3, 12, 12), images(4, 3, 12, 12, seed=1)
    y[2] = 0.5
    for name in ("pearson2", "ssim"):
        gradient = grad(lambda y, name=name: dependence(name, x, y, ssim_threshold=-1.0))(y)
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).abs().amax(1) > 0).tolist() == [True, True, False, True]


def test_one_grey_level_in_one_pixel_is_variance():
    x = torch.full((1, 3, 224, 224), 0.5)
    x[0, 0, 100, 100] += 1 / 255
    assert pearson2(x, x).item() == pytest.approx(1, abs=1e-3)


def test_batch_measures_survive_repeated_samples_and_equal_distances():
    x = images(6, 1, 4, 4, dtype=torch.float64)
    x[1] = x[0]
    gradient = grad(lambda y: distance_correlation(y, images(6, 5, seed=2, dtype=torch.float64)))(x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    corners = torch.linalg.qr(images(6, 6)).Q  # every two at √2: the unbiased kernel vanishes but for rounding
    for other in (corners, images(6, 5)):
        assert cka(corners, other).item() == 0
        assert (grad(cka)(corners, other) == 0).all()


@pytest.mark.parametrize("name", DEPENDENCE)
def test_vmap_and_grad_of_grad_agree_with_plain_loops(name):
    x = images(2, 4, 1, 8, 8, dtype=torch.float64)
    y = 0.6 * x + 0.4 * images(2, 4, 1, 8, 8, seed=1, dtype=torch.float64)
    score = functools.partial(dependence, name)

    def slope(x, y):  # the length of a gradient, so that its own gradient needs second derivatives
        return grad(score, argnums=1)(x, y).square().sum()

    torch.testing.assert_close(vmap(score)(x, y), torch.stack([score(a, b) for a, b in zip(x, y, strict=True)]))
    second = vmap(grad(slope, argnums=1))(x, y)
    torch.testing.assert_close(second, torch.stack([grad(slope, argnums=1)(a, b) for a, b in zip(x, y, strict=True)]))
    assert second.isfinite().all() and second.abs().max() > 0


@pytest.mark.parametrize("name", DEPENDENCE)
def test_gradients_and_second_derivatives_match_finite_differences(name):
    x = images(4, 1, 4, 4, dtype=torch.float64)
    y = (0.6 * x + 0.4 * images(4, 1, 4, 4, seed=1, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(functools.partial(dependence, name, x), (y,))
    assert torch.autograd.gradgradcheck(functools.partial(dependence, name, x), (y,))


@pytest.mark.parametrize("name", DEPENDENCE)
def test_second_derivatives_stay_finite_where_an_image_is_flat(name):
    x, y = images(4, 1, 12, 12), images(4, 1, 12, 12, seed=1)
    y[0] = 0.5
    second = grad(lambda y: grad(lambda y: dependence(name, x, y))(y).square().sum())(y)
    assert second.isfinite().all()


@pytest.mark.parametrize("name", DEPENDENCE)
def test_float32_agrees_with_float64_and_autocast_changes_nothing(name):
    x = images(16, 3, 28, 28)
    y = 0.7 * x + 0.3 * images(16, 3, 28, 28, seed=1)
    value = dependence(name, x, y)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(dependence(name, x.double(), y.double()).item(), abs=2e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dependence(name, x, y), value)
    assert dependence(name, x, y.bfloat16()).dtype == torch.float32


def test_dependence_compiles_without_graph_breaks():
    x, y = images(4, 1, 12, 12), images(4, 1, 12, 12, seed=1)
    for name in ("pearson2", "ssim"):
        compiled = torch.compile(functools.partial(dependence, name), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, y), dependence(name, x, y))


def test_dependence_means_thresholds_and_caps_per_image():
    x = torch.zeros(2, 1, 12, 12, dtype=torch.float64)
    y = torch.stack([torch.full((1, 12, 12), 0.2), torch.full((1, 12, 12), 9.0)]).double()  # MSE 0.04 and 81
    assert dependence("neg_mse", x, y).item() == pytest.approx(-(0.04 + 0.1) / 2)
    x, y = images(2, 1, 12, 12), images(2, 1, 12, 12, seed=1)
    y[0] = x[0]
    low = max(0.0, ssim(x, y)[1].item() - 0.3)
    assert dependence("ssim", x, y, ssim_threshold=0.3).item() == pytest.approx((0.7 + low) / 2, abs=1e-6)


def test_inputs_stay_as_they_are():
    x, y = images(4, 3, 12, 12), images(4, 3, 12, 12, seed=1)
    before = x.clone(), y.clone()
    for name in DEPENDENCE:
        dependence(name, x, y)
    total_variation(x)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_wrong_arguments_are_refused_with_what_to_change():
    x = images(3, 1, 12, 12)
    with pytest.raises(InputError, match="at least 4 samples"):
        cka(x, x)
    with pytest.raises(InputError, match="choose one of pearson2, ssim"):
        dependence("hsic", x, x)
    with pytest.raises(ValueError, match="equal shape"):
        pearson2(x, x[:1])
    with pytest.raises(ValueError, match="equal B"):
        distance_correlation(x, x[:2])
    with pytest.raises(ValueError, match="torch.uint8"):
        ssim(x, (x * 255).byte())
    with pytest.raises(ValueError, match="odd window"):
        ssim(x, x, window=10)
