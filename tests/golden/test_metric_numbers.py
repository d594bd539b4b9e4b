"""Image and classification metrics against TorchMetrics, NumPy and numbers worked by hand."""

import numpy as np
import pytest
import torch
from torchmetrics.functional import auroc, f1_score
from torchmetrics.functional.image import peak_signal_noise_ratio

from gidef.metrics import auc, macro_f1, mse, psnr_db

torch.set_num_threads(1)


def test_two_images_a_tenth_apart_everywhere_are_at_20_db():
    x = torch.full((2, 3, 8, 8), 0.4, dtype=torch.float64)
    assert psnr_db(x, x + 0.1).tolist() == pytest.approx([20, 20])
    assert psnr_db(x, x - 0.01).tolist() == pytest.approx([40, 40])
    assert mse(x, x + 0.1).tolist() == pytest.approx([0.01, 0.01])


def test_psnr_is_torchmetrics_per_image():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(5, 3, 9, 7, generator=draw), torch.rand(5, 3, 9, 7, generator=draw)
    expected = torch.stack([peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(psnr_db(x, y), expected)
    np.testing.assert_allclose(mse(x, y), ((x.numpy() - y.numpy()) ** 2).reshape(5, -1).mean(1), rtol=1e-6)


def test_a_batch_is_the_mean_of_its_images_and_not_the_psnr_of_its_mse():
    x = torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64)
    y = x + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1).double()
    assert psnr_db(x, y).mean().item() == pytest.approx(30)  # 20 and 40 dB; the pooled MSE would say 22.97


def test_auc_by_hand_with_a_tie():
    # class 1 against class 0 by the logit of class 1: positives 0.3, 0.5, 0.9; negatives 0.3, 0.1.
    # Pairs won: 0.3 ties one and beats one (1.5), the others beat both (4): 5.5 of 6. Class 0 mirrors it.
    score = torch.tensor([0.3, 0.1, 0.3, 0.5, 0.9])
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert auc(torch.stack([torch.zeros(5), score], 1), labels) == pytest.approx(5.5 / 6)


def test_auc_and_macro_f1_are_torchmetrics():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (300,), generator=draw)
    logits = torch.randn(300, 5, generator=draw) + torch.nn.functional.one_hot(labels, 5)
    expected = auroc(logits.double().softmax(1), labels, task="multiclass", num_classes=5, average="macro")
    assert 0.6 < auc(logits, labels) < 0.95
    assert auc(logits, labels) == pytest.approx(expected.item(), abs=1e-6)
    expected = f1_score(logits, labels, task="multiclass", num_classes=5, average="macro")
    assert macro_f1(logits, labels) == pytest.approx(expected.item(), abs=1e-6)


def test_macro_f1_by_hand():
    # true 0 0 0 1 1 2, predicted 0 0 1 1 2 2: F1 = 2·2/(2·2+0+1), 2·1/(2+1+1), 2·1/(2+1+0) = 4/5, 1/2, 2/3
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 2, 2]), 3).float()
    assert macro_f1(logits, torch.tensor([0, 0, 0, 1, 1, 2])) == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
