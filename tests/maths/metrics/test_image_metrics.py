import math

import pytest
import torch

from gidef import similarity
from gidef.metrics import feature_distance, mse, pairwise_mse, psnr_db, ssim
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
