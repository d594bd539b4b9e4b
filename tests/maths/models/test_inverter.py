"""The network of learned inversion, untrained, on random numbers."""

from __future__ import annotations

import pytest
import torch

from gidef.errors import InputError
from gidef.models.inverter import Inverter, Upsampler, inverter_for
from gidef.rng import generator

torch.set_num_threads(1)


def given(inverter: Inverter, count: int = 3) -> torch.Tensor:
    return torch.randn(count, inverter.sketch_dim, generator=generator(0, "sketches"))


def awake(inverter: Inverter) -> Inverter:
    """With random weights where it starts at zero, so that the network says something."""
    draw = generator(0, "awake")
    with torch.no_grad():
        inverter.upsampler.last.weight.copy_(torch.randn(inverter.upsampler.last.weight.shape, generator=draw))
        inverter.weight.copy_(0.01 * torch.randn(inverter.weight.shape, generator=draw))
        inverter.components.copy_(torch.linalg.qr(torch.randn(inverter.components.shape[::-1], generator=draw)).Q.T)
        inverter.class_means.copy_(torch.rand(inverter.class_means.shape, generator=draw))
    return inverter


@pytest.mark.parametrize("image_shape", [(3, 28, 28), (1, 32, 32), (3, 65, 40), (2, 5, 7), (1, 1, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_any_image_shape_comes_out_between_0_and_1(image_shape, batch_size):
    inverter = awake(inverter_for(20, 4, image_shape, batch_size=batch_size, width_factor=0.1))
    images = inverter(50 * given(inverter), torch.randint(4, (3, batch_size), generator=generator(0)))
    assert images.shape == (3, batch_size, *image_shape) and images.min() >= 0 and images.max() <= 1 and images.std() > 0.1


def test_it_has_about_a_million_parameters_at_32_pixels():
    assert 0.9e6 < sum(p.numel() for p in inverter_for(2048, 8, (3, 32, 32)).parameters()) < 1.4e6


def test_before_training_the_image_is_that_of_the_linear_part():
    inverter = awake(inverter_for(20, 3, (2, 9, 8), batch_size=2, width_factor=0.1))
    torch.nn.init.zeros_(inverter.upsampler.last.weight)
    sketches, labels = given(inverter), torch.tensor([[0, 2], [1, 1], [0, 1]])
    by_hand = torch.empty(3, 2, 2, 9, 8)
    for sample in range(3):
        coefficients = (sketches[sample] @ inverter.weight).view(2, inverter.rank)
        for slot in range(2):
            by_hand[sample, slot] = inverter.class_means[labels[sample, slot]] + (coefficients[slot] @ inverter.components).view(2, 9, 8)
    torch.testing.assert_close(inverter(sketches, labels), by_hand.clamp(0.005, 0.995))
    assert ((by_hand > 0.005) & (by_hand < 0.995)).float().mean() > 0.5


def test_reordered_labels_reorder_the_images():
    """The order of a batch is the caller's; a gradient knows none."""
    inverter = awake(inverter_for(20, 5, (1, 8, 8), batch_size=4, width_factor=0.1))
    labels, order = torch.tensor([[3, 0, 4, 1], [2, 1, 0, 3], [0, 4, 2, 1]]), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(inverter(given(inverter), labels)[:, order], inverter(given(inverter), labels[:, order]))


def test_images_of_one_label_differ_by_their_rank():
    inverter = awake(inverter_for(20, 3, (1, 8, 8), batch_size=2, width_factor=0.1))
    inverter.weight.zero_()
    same = inverter(given(inverter), torch.tensor([[1, 1]] * 3))
    assert (same[:, 0] - same[:, 1]).abs().mean() > 1e-3


def test_numbers_are_standardised_and_constant_ones_switched_off():
    inverter = inverter_for(3, 2, (1, 4, 4), width_factor=0.1)
    inverter.mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    inverter.std.copy_(torch.tensor([2.0, 0.5, torch.inf]))
    torch.testing.assert_close(inverter.standardised(torch.tensor([[3.0, 1.0, 7.0]])), torch.tensor([[1.0, -2.0, 0.0]]))


def test_a_copy_by_state_dict_gives_the_same_images():
    one, other = awake(inverter_for(20, 3, (1, 8, 8), seed=1, width_factor=0.1)), inverter_for(20, 3, (1, 8, 8), seed=2, width_factor=0.1)
    other.load_state_dict(one.state_dict())
    labels = torch.tensor([[0], [1], [2]])
    assert torch.equal(one(given(one), labels), other(given(one), labels))


def test_weights_depend_on_the_seed_alone_and_leave_the_global_state():
    state = torch.get_rng_state()
    one, two, other = (inverter_for(10, 3, (1, 8, 8), seed=seed, width_factor=0.1).trunk[0].weight for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(one, two) and not torch.equal(one, other)


def test_every_number_reaches_every_part_of_the_upsampled_image():
    upsampler = Upsampler(6, (2, 18, 33), 16)
    vector = torch.randn(1, 6, generator=generator(0), requires_grad=True)
    image = upsampler(vector)
    assert image.shape == (1, 2, 18, 33)
    for corner in (image[0, 0, 0, 0], image[0, 1, -1, -1], image[0, 0, 9, 16]):
        assert (torch.autograd.grad(corner, vector, retain_graph=True)[0] != 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"sketch_dim": 0}, "0 numbers"), ({"num_classes": 1}, "1 classes"), ({"batch_size": 0}, "0 images"), ({"image_shape": (3, 8)}, "channels"),
     ({"width_factor": 0.0}, "width_factor")],
)  # fmt: skip
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        inverter_for(**({"sketch_dim": 10, "num_classes": 3, "image_shape": (1, 8, 8)} | change))


def test_another_batch_size_is_refused():
    inverter = inverter_for(10, 3, (1, 8, 8), batch_size=2, width_factor=0.1)
    with pytest.raises(InputError, match="2 images per gradient"):
        inverter(given(inverter), torch.zeros(3, 1, dtype=torch.int64))
