"""Similarities against other libraries and against the formulas written out in NumPy."""

import numpy as np
import pytest
import torch

from gidef.similarity import cka, distance_correlation, pearson2, ssim

torch.set_num_threads(1)


def natural(seed, *shape):
    """Smooth images with some texture, so that SSIM is neither 0 nor 1."""
    rng = np.random.default_rng(seed)
    waves = np.cumsum(np.cumsum(rng.standard_normal(shape), -1), -2)
    waves = (waves - waves.min((-2, -1), keepdims=True)) / np.ptp(waves, axis=(-2, -1), keepdims=True)
    return 0.8 * waves + 0.2 * rng.random(shape)


BLOTS, GREY = natural(0, 3, 3, 28, 28), natural(2, 2, 1, 33, 40)
PAIRS = [(BLOTS, 0.3 * BLOTS + 0.7 * natural(1, 3, 3, 28, 28)), (GREY, 0.7 * GREY + 0.3 * natural(3, 2, 1, 33, 40))]


def naive_ssim(x, y):
    """Wang et al. 2004, window by window, of one channel."""
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = np.outer(taps, taps) / taps.sum() ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            values.append(luminance * (2 * cov + 9e-4) / (var_a + var_b + 9e-4))
    return np.mean(values)


@pytest.mark.parametrize("x, y", PAIRS)
def test_ssim_is_the_formula_window_by_window(x, y):
    expected = [np.mean([naive_ssim(a, b) for a, b in zip(p, q, strict=True)]) for p, q in zip(x, y, strict=True)]
    assert 0.05 < np.mean(expected) < 0.99
    np.testing.assert_allclose(ssim(torch.tensor(x), torch.tensor(y)), expected, atol=1e-12)
    single = ssim(torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32))
    np.testing.assert_allclose(single, expected, atol=1e-5)


@pytest.mark.parametrize("x, y", PAIRS)
def test_ssim_is_scikit_images(x, y):
    metrics = pytest.importorskip("skimage.metrics")
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1, "channel_axis": 0}
    expected = [metrics.structural_similarity(a, b, **options) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ssim(torch.tensor(x), torch.tensor(y)), expected, atol=1e-9)


@pytest.mark.parametrize("x, y", PAIRS)
def test_ssim_is_the_interior_of_torchmetrics_map(x, y):
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = torch.tensor(x), torch.tensor(y)
    _, full = structural_similarity_index_measure(x, y, data_range=1.0, return_full_image=True)
    full = full.reshape(x.shape)
    torch.testing.assert_close(ssim(x, y), full[..., 5:-5, 5:-5].mean((1, 2, 3)), atol=1e-9, rtol=0)


def test_ssim_of_constant_images_by_hand():
    # no variance, so only the luminance term is left: (2·0.2·0.6 + 10⁻⁴) / (0.2² + 0.6² + 10⁻⁴) = 0.2401 / 0.4001
    x, y = torch.full((1, 3, 16, 16), 0.2, dtype=torch.float64), torch.full((1, 3, 16, 16), 0.6, dtype=torch.float64)
    assert ssim(x, y).item() == pytest.approx(0.2401 / 0.4001, abs=1e-12)


def test_pearson2_is_numpy_corrcoef_after_centring_channels():
    x, y = PAIRS[0]
    centred = [(a - a.mean((-2, -1), keepdims=True)).reshape(len(a), -1) for a in (x, y)]
    expected = [np.corrcoef(a, b)[0, 1] ** 2 for a, b in zip(*centred, strict=True)]
    np.testing.assert_allclose(pearson2(torch.tensor(x), torch.tensor(y)), expected, atol=1e-12)


def test_distance_correlation_is_a_naive_double_loop():
    rng = np.random.default_rng(0)
    x = rng.random((7, 2, 3, 3))
    y = x[:, :1] ** 2 + 0.3 * rng.random((7, 1, 3, 3))

    def centred(batch):
        flat = batch.reshape(len(batch), -1)
        a = np.array([[np.sqrt(((p - q) ** 2).sum()) for q in flat] for p in flat])
        return np.array([[a[i, j] - a[i].mean() - a[:, j].mean() + a.mean() for j in range(len(a))] for i in range(len(a))])

    a, b = centred(x), centred(y)
    expected = np.sqrt((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))
    assert 0.1 < expected < 0.99
    assert distance_correlation(torch.tensor(x), torch.tensor(y)).item() == pytest.approx(expected, abs=1e-10)


def test_distance_correlation_of_three_points_by_hand():
    # x = 0, 1, 2: A = [−10 2 8; 2 −4 2; 8 2 −10] / 9.   y = 0, 1, 0: B = [−2 4 −2; 4 −8 4; −2 4 −2] / 9.
    # ΣA² = 360/81, ΣB² = 144/81, ΣAB = 72/81, so dCor² = 72 / √(360 · 144) = 1/√10
    x, y = torch.tensor([[0.0], [1.0], [2.0]]).double(), torch.tensor([[0.0], [1.0], [0.0]]).double()
    assert distance_correlation(x, y).item() == pytest.approx(10**-0.25, abs=1e-12)


def test_cka_is_song_et_al_equation_5_in_numpy():
    rng = np.random.default_rng(1)
    x = rng.random((9, 3, 4, 4))
    y = x[:, :1] + 0.5 * rng.random((9, 1, 4, 4))

    def hsic(k, l):
        n, one = len(k), np.ones(len(k))
        k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
        middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return (np.trace(k @ l) + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))

    k, l = ((flat := batch.reshape(9, -1)) @ flat.T for batch in (x, y))
    expected = hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))
    assert 0.1 < expected < 0.99
    assert cka(torch.tensor(x), torch.tensor(y)).item() == pytest.approx(expected, abs=1e-10)
