import time

import pytest
import torch
import torch.nn.functional as F

from gidef.data import check_dataset, synthetic_blood_cells
from gidef.errors import InputError
from gidef.rng import generator


@pytest.fixture(scope="module")
def cells():
    began = time.process_time()
    dataset = synthetic_blood_cells()
    return dataset, time.process_time() - began


def test_the_default_set_is_what_it_says_and_quick(cells):
    dataset, seconds = cells
    check_dataset(dataset)
    assert dataset.synthetic and "synthetic" in dataset.title and dataset.image_shape == (3, 28, 28)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (2400, 400, 600)
    names = ("basophil", "eosinophil", "erythroblast", "immature granulocyte", "lymphocyte", "monocyte", "neutrophil", "platelet")
    assert dataset.class_names == names
    assert torch.bincount(dataset.train.labels).tolist() == [300] * 8
    assert seconds < 15  # of processor time, 3 where nobody else is at work
    assert synthetic_blood_cells() is dataset


def test_images_are_all_different_and_splits_too(cells):
    dataset, _ = cells
    rows = torch.cat([dataset.train.images, dataset.val.images, dataset.test.images]).flatten(1)
    assert len(rows.unique(dim=0)) == 3400


def test_a_seed_gives_the_same_bits_in_any_process_and_another_seed_others():
    synthetic_blood_cells.cache_clear()
    first = synthetic_blood_cells(train=16, val=8, test=8, size=12, seed=1)
    synthetic_blood_cells.cache_clear()
    torch.manual_seed(123)
    again = synthetic_blood_cells(train=16, val=8, test=8, size=12, seed=1)
    other = synthetic_blood_cells(train=16, val=8, test=8, size=12, seed=2)
    assert first is not again and torch.equal(first.train.images, again.train.images) and torch.equal(first.test.labels, again.test.labels)
    assert not torch.equal(first.train.images, other.train.images)


@pytest.mark.parametrize("size", [32, 64, 120])
def test_another_size_shows_the_same_scene(size):
    small, large = (synthetic_blood_cells(train=24, val=8, test=8, size=side, seed=0).train for side in (16, size))
    assert torch.equal(small.labels, large.labels)
    shrunk = F.interpolate(large.images.float(), (16, 16), mode="bilinear", antialias=True)
    errors = (shrunk - small.images.float()).square().mean((1, 2, 3))
    strangers = (shrunk - small.images.float().roll(1, 0)).square().mean((1, 2, 3))
    assert errors.mean() < 0.15 * strangers.mean()


@pytest.mark.parametrize("options", [{"train": 7}, {"test": 0}, {"size": 4}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        synthetic_blood_cells(**options)


def test_a_small_net_learns_most_of_it_and_not_all_at_once(cells):
    """A few epochs of a three-layer net; a linear classifier on pixels stays far behind, so that shapes matter."""
    dataset, _ = cells
    draws = generator(0, "test")
    images, labels = dataset.train.images.float() / 127.5 - 1, dataset.train.labels
    weights = [torch.randn(shape, generator=draws) * gain for shape, gain in [((16, 3, 3, 3), 0.25), ((32, 16, 3, 3), 0.1), ((64, 32, 3, 3), 0.08)]]
    weights.append(torch.randn(8, 64 * 16, generator=draws) * 0.02)
    weights = [weight.requires_grad_() for weight in weights]
    optimiser = torch.optim.Adam(weights, lr=2e-3)

    def forward(images):
        for weight in weights[:-1]:
            images = F.leaky_relu(F.group_norm(F.conv2d(images, weight, stride=2, padding=1), 8))
        return images.flatten(1) @ weights[-1].T

    def accuracy():
        with torch.no_grad():
            return float((forward(dataset.test.images.float() / 127.5 - 1).argmax(1) == dataset.test.labels).float().mean())

    scores = []
    for _ in range(4):
        for rows in torch.randperm(len(labels), generator=draws).split(64):
            optimiser.zero_grad()
            F.cross_entropy(forward(images[rows]), labels[rows]).backward()
            optimiser.step()
        scores.append(accuracy())
    assert scores[0] < 0.9 and 0.8 < scores[-1] < 0.985
