import math

import numpy as np
import pytest
import torch

from gidef import similarity
from gidef.metrics import feature_distance, mse, nmse, pairwise_mse, psnr_db, ssim, variance
from gidef.metrics.images import clamped


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_come_per_image_and_keep_the_dtype(dtype):
    x, y = images(3, 1, 12, 12).to(dtype), images(3, 1, 12, 12, seed=1).to(dtype)
    for metric in (mse, psnr_db, ssim):
        values = metric(x, y)
        assert values.shape == (3,) and values.dtype == dtype
        torch.testing.assert_close(values[1:2], metric(x[1:2], y[1:2]))


def test_values_outside_the_unit_range_are_clamped_and_inputs_are_not():
    x, y = images(2, 3, 12, 12) * 3 - 1, images(2, 3, 12, 12, seed=1)
    before = x.clone()
    for metric, plain in ((mse, lambda a, b: (a - b).square().mean((1, 2, 3))), (ssim, similarity.ssim)):
        torch.testing.assert_close(metric(x, y), plain(x.clamp(0, 1), y))
    assert torch.equal(x, before)


def test_equal_images_are_capped_and_infinite_on_request():
    x = images(2, 1, 4, 4)
    assert psnr_db(x, x).tolist() == [100, 100]
    assert psnr_db(x, x, cap=math.inf).tolist() == [math.inf, math.inf]
    assert psnr_db(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).item() == 0


def test_nan_is_not_hidden():
    x = images(2, 1, 12, 12)
    broken = x.clone()
    broken[0, 0, 0, 0] = math.nan
    for metric in (mse, psnr_db, ssim):
        assert metric(broken, x).isnan().tolist() == [True, False]


def test_shapes_that_would_broadcast_and_bytes_are_refused():
    x = images(2, 1, 4, 4)
    with pytest.raises(ValueError, match="equal shapes"):
        mse(x, x[:1])
    with pytest.raises(ValueError, match=r"torch.uint8 \(2, 1, 4, 4\)"):
        clamped((x * 255).byte())
    with pytest.raises(ValueError, match="one shape"):
        pairwise_mse(x, images(2, 1, 4, 5))


def test_metrics_carry_no_gradient():
    x = images(2, 1, 12, 12).requires_grad_()
    assert not mse(x, images(2, 1, 12, 12, seed=1)).requires_grad


def test_pairwise_mse_is_the_naive_double_loop():
    x, y = images(4, 3, 5, 5), images(6, 3, 5, 5, seed=1)
    naive = torch.tensor([[mse(a[None].double(), b[None].double()).item() for b in y] for a in x], dtype=torch.float64)
    torch.testing.assert_close(pairwise_mse(x, y), naive, atol=1e-12, rtol=0)
    assert (pairwise_mse(x, x).diagonal() < 1e-12).all() and (pairwise_mse(x, x) >= 0).all()


def test_feature_distance_is_one_minus_cosine_in_any_batching():
    def features(batch):  # (b, 2): brightness of the two halves
        return torch.stack([batch[..., :2].mean((1, 2, 3)), batch[..., 2:].mean((1, 2, 3))], 1)

    left, right = torch.zeros(3, 1, 2, 4), torch.zeros(3, 1, 2, 4)
    left[:, ..., :2] = 1  # feature (1, 0)
    right[0, ..., :2], right[1, ..., 2:], right[2] = 0.3, 1, 0.5  # (0.3, 0), (0, 1), (0.5, 0.5)
    expected = torch.tensor([0, 1, 1 - math.sqrt(0.5)])
    for batch_size in (1, 2, 256):
        torch.testing.assert_close(feature_distance(features, left, right, batch_size=batch_size), expected, atol=1e-6, rtol=0)
    black = torch.zeros(1, 1, 2, 4)
    assert feature_distance(features, black, black).item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_normalised_mse_is_numpys(dtype):
    known = images(20, 3, 6, 5).to(dtype) * torch.linspace(0.2, 1.4, 3, dtype=dtype).view(3, 1, 1)  # some above 1
    x, y = images(4, 3, 6, 5, seed=1).to(dtype), images(4, 3, 6, 5, seed=2).to(dtype) * 2 - 0.5
    reference = np.clip(known.double().numpy(), 0, 1)
    middle = reference.mean(0)
    spread = sum(((image - middle) ** 2).mean() for image in reference) / len(reference)
    assert variance(known) == pytest.approx(spread, rel=1e-5)
    expected = [((a - np.clip(b, 0, 1)) ** 2).mean() / spread for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True)]
    found = nmse(x, y, variance=variance(known))
    assert found.dtype == dtype
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_the_mean_image_scores_one_and_so_does_it_at_half_the_contrast():
    known = images(30, 1, 4, 4)
    for contrast in (1.0, 0.5, 0.01):
        dim = 0.5 + contrast * (known - 0.5)
        middle = dim.mean(0, keepdim=True).expand_as(dim)
        assert nmse(middle, dim, variance=variance(dim)).mean().item() == pytest.approx(1, rel=1e-3)
        assert nmse(dim, dim, variance=variance(dim)).tolist() == [0] * 30


def test_without_variance_an_error_is_infinite_and_none_is_not_a_number():
    flat = torch.full((3, 1, 2, 2), 0.5)
    assert variance(flat) == 0 and variance(images(1, 1, 2, 2)) == 0
    assert nmse(flat, torch.zeros_like(flat), variance=0.0).tolist() == [math.inf] * 3 and nmse(flat, flat, variance=0.0).isnan().all()
