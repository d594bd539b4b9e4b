import pytest
import torch

from gidef.metrics import bounds, mse


def flat(*levels):
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).clone()


PUBLIC, LABELS = flat(0.0, 0.2, 0.7, 0.9), torch.tensor([0, 0, 1, 1])


def test_bounds_are_the_images_that_their_names_say():
    victims = flat(0.6, 0.15, 0.05)
    labels = torch.tensor([1, 0, 0])
    torch.testing.assert_close(bounds.grey(victims), flat(0.5, 0.5, 0.5))
    torch.testing.assert_close(bounds.mean_image(PUBLIC, 3), flat(0.45, 0.45, 0.45))
    torch.testing.assert_close(bounds.class_means(PUBLIC, LABELS, labels), flat(0.8, 0.1, 0.1))
    torch.testing.assert_close(bounds.nearest_public(victims, labels, PUBLIC, LABELS), flat(0.7, 0.2, 0.0))


def test_the_nearest_neighbour_is_never_of_another_class():
    assert bounds.nearest_public(flat(0.01), torch.tensor([1]), PUBLIC, LABELS)[0, 0, 0, 0] == pytest.approx(0.7)


def test_the_class_mean_beats_the_mean_image_on_the_public_images_themselves():
    public = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)) / 2
    labels = torch.arange(30) % 3
    public += labels[:, None, None, None] / 5
    by_class = mse(bounds.class_means(public, labels, labels), public).mean()
    assert by_class < mse(bounds.mean_image(public, 30), public).mean() < mse(bounds.grey(public), public).mean()


def test_results_are_fresh_and_public_images_stay():
    before = PUBLIC.clone()
    for image in (bounds.mean_image(PUBLIC, 2), bounds.class_means(PUBLIC, LABELS, LABELS), bounds.nearest_public(PUBLIC, LABELS, PUBLIC, LABELS)):
        image.fill_(9)
    assert torch.equal(PUBLIC, before)


def test_a_class_without_public_images_is_named():
    with pytest.raises(ValueError, match="class 5 has no public image"):
        bounds.class_means(PUBLIC, LABELS, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="class 5 has no public image"):
        bounds.nearest_public(flat(0.5), torch.tensor([5]), PUBLIC, LABELS)
    with pytest.raises(ValueError, match="no public image"):
        bounds.mean_image(PUBLIC[:0], 2)
