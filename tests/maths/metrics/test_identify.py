import pytest
import torch

from gidef.metrics import iip


def flat(*levels):
    """One constant 2×2 image per grey level."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


POOL, POOL_LABELS = flat(0.1, 0.2, 0.5, 0.9), torch.tensor([0, 0, 1, 0])


def test_a_perfect_reconstruction_is_identified():
    assert iip(POOL, POOL, POOL_LABELS, POOL, POOL_LABELS).tolist() == [1, 1, 1, 1]


def test_only_images_of_the_same_label_compete():
    # 0.36 is nearest to 0.5 of class 1, but its truth 0.2 is the nearest of class 0; 0.14 is nearer to 0.1 than to 0.2
    truth, labels = flat(0.2, 0.2, 0.5), torch.tensor([0, 0, 1])
    assert iip(flat(0.36, 0.14, 0.0), truth, labels, POOL, POOL_LABELS).tolist() == [1, 0, 1]


def test_copies_of_the_true_image_in_the_pool_are_no_protection():
    pool, labels = torch.cat([flat(0.2), POOL]), torch.cat([torch.tensor([0]), POOL_LABELS])
    assert iip(flat(0.25), flat(0.2), torch.tensor([0]), pool, labels).tolist() == [1]


def test_a_guess_scores_one_over_the_pool():
    draw = torch.Generator().manual_seed(0)
    pool = torch.rand(200, 1, 4, 4, generator=draw)
    labels = torch.zeros(200, dtype=torch.int64)
    assert iip(torch.rand(200, 1, 4, 4, generator=draw), pool, labels, pool, labels).mean() < 0.05


def test_a_pool_without_the_truth_is_refused():
    with pytest.raises(ValueError, match="lacks a true image of class 1"):
        iip(flat(0.2), flat(0.2), torch.tensor([1]), POOL, POOL_LABELS)
    with pytest.raises(ValueError, match="lacks a true image of class 7"):
        iip(flat(0.2), flat(0.2), torch.tensor([7]), POOL, POOL_LABELS)
    with pytest.raises(ValueError, match="shapes do not fit"):
        iip(flat(0.2), flat(0.2), torch.tensor([0, 0]), POOL, POOL_LABELS)
