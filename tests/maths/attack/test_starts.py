import pytest
import torch

from gidef.attack.starts import STARTS, from_images, patterned
from gidef.errors import InputError

SHAPE = (2, 3, 10, 7)


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def test_normal_and_uniform_starts_are_these_draws_and_no_others():
    assert torch.equal(STARTS["normal"](SHAPE, drawn(5)), (0.5 + 0.2 * torch.randn(SHAPE, generator=drawn(5))).clamp(0, 1))
    assert torch.equal(STARTS["uniform"](SHAPE, drawn(5)), torch.rand(SHAPE, generator=drawn(5)))


@pytest.mark.parametrize("name", sorted(STARTS))
def test_every_start_fills_the_shape_with_float32_in_the_box_and_depends_on_the_generator_alone(name):
    first, again, other = (STARTS[name](SHAPE, drawn(seed)) for seed in (0, 0, 1))
    assert first.shape == SHAPE and first.dtype == torch.float32 and first.is_contiguous()
    assert first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again)
    fixed = name in ("grey", "dark", "light", "red", "green", "blue")
    assert torch.equal(first, other) == fixed
    if not fixed:
        assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(("name", "size"), [("patterned", 4), ("patterned-2", 2), ("patterned-4", 4), ("patterned-8", 8), ("patterned-normal", 4)])
def test_a_patterned_start_repeats_its_patch_and_is_cut_at_the_border(name, size):
    images = STARTS[name](SHAPE, drawn())
    rows, columns = torch.arange(10) % size, torch.arange(7) % size
    assert torch.equal(images, images[:, :, rows][:, :, :, columns])
    patch = images[:, :, :size, : min(size, 7)]
    assert len(patch.unique()) > 0.9 * patch.numel() or name == "patterned-normal"  # clipping makes equal pixels


def test_a_patch_larger_than_the_image_is_cut():
    assert patterned((1, 1, 3, 5), drawn(), size=8).shape == (1, 1, 3, 5)


def test_constant_starts_have_their_level_and_colours_their_channel():
    assert [float(STARTS[name](SHAPE, drawn()).unique()) for name in ("dark", "grey", "light")] == [0.0, 0.5, 1.0]
    for channel, name in enumerate(("red", "green", "blue")):
        means = STARTS[name](SHAPE, drawn()).mean((0, 2, 3))
        assert means.tolist() == [float(channel == one) for one in range(3)]
    with pytest.raises(InputError, match="3 channels"):
        STARTS["green"]((1, 1, 4, 4), drawn())


def test_a_smooth_start_is_smoother_than_a_normal_one():
    rough, smooth = (STARTS[name]((4, 1, 32, 32), drawn()).diff(dim=-1).abs().mean() for name in ("normal", "smooth"))
    assert smooth < 0.2 * rough


def test_starts_from_images_begin_there_and_further_restarts_nearby():
    images, noise = torch.rand(2, 1, 3, 4, 4, generator=drawn()), torch.randn(2, 5, generator=drawn(1))
    start = from_images(images, noise=noise, spread=0.1, seed=3)
    assert torch.equal(start(1, 0)[0], images[1]) and torch.equal(start(1, 0)[1], noise[1])
    near = start(1, 1)[0]
    assert (near - images[1]).abs().max() > 0 and (near - images[1]).square().mean().sqrt() < 0.15
    assert near.min() >= 0 and near.max() <= 1
    assert torch.equal(near, from_images(images, spread=0.1, seed=3)(1, 1)[0])
    assert not torch.equal(near, start(1, 2)[0]) and not torch.equal(near, from_images(images, spread=0.1, seed=4)(1, 1)[0])


def test_a_start_from_images_cannot_be_changed_through_what_it_returned():
    start = from_images([torch.full((1, 1, 2, 2), 0.5)])
    start(0, 0)[0].zero_()
    assert (start(0, 0)[0] == 0.5).all() and start(0, 0)[1] is None


def test_images_that_cannot_be_a_start_are_refused():
    for images in ([torch.zeros(3, 4, 4)], [torch.full((1, 1, 2, 2), 1.5)], [torch.full((1, 1, 2, 2), torch.nan)]):
        with pytest.raises(InputError, match="observation 0"):
            from_images(images)
    with pytest.raises(InputError, match="give one each"):
        from_images([torch.zeros(1, 1, 2, 2)], noise=[])
    with pytest.raises(InputError, match="spread"):
        from_images([torch.zeros(1, 1, 2, 2)], spread=-1.0)
    with pytest.raises(InputError, match="no images to start observation 1"):
        from_images([torch.zeros(1, 1, 2, 2)])(1, 0)
