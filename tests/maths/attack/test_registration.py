import math
import os
import pathlib

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gidef.attack.registration import consensus, group_consistency, register, shifts, warp
from gidef.data.synthetic import synthetic_blood_cells
from gidef.errors import InputError

SIDE = 32


def scene(*, seed=0, shift=(0.0, 0.0), linear=((1.0, 0.0), (0.0, 1.0))):
    """A smooth picture (3, 32, 32) known at every point: what it has at A u + shift from its centre is shown at u."""
    draw = torch.Generator().manual_seed(seed)
    places, widths, colours = (
        torch.rand(8, 2, generator=draw) * SIDE - SIDE / 2,
        2 + 3 * torch.rand(8, generator=draw),
        torch.rand(8, 3, generator=draw),
    )
    u = torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2
    x = linear[0][0] * u + linear[0][1] * u[:, None] + shift[0]
    y = linear[1][0] * u + linear[1][1] * u[:, None] + shift[1]
    blobs = torch.exp(-((x - places[:, 0, None, None]) ** 2 + (y - places[:, 1, None, None]) ** 2) / (2 * widths[:, None, None] ** 2))
    return 0.4 + 0.6 * ((colours[:, :, None, None] - 0.4) * blobs[:, None]).sum(0)


def photographs(count=8):
    """Blood cells (count, 3, 28, 28): real ones where there are any, else made up."""
    path = pathlib.Path(os.environ.get("GIDEF_DATA", "")) / "bloodmnist_resplit.npz"
    if path.is_file():
        with numpy.load(path) as archive:
            return torch.from_numpy(archive["val_images"][:count]).permute(0, 3, 1, 2).double() / 255
    return synthetic_blood_cells(size=28, train=8, val=8, test=8, seed=0).train.images[:count].double() / 255


def psnr(one, other):
    return float(-10 * (one - other).square().mean().log10())


def random_shifts(count, reach, seed=0):
    return ((torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1) * reach).tolist()


# --- registration ----------------------------------------------------------------------------------------------------


def test_shifted_pictures_are_registered_to_a_tenth_of_a_pixel():
    truth = random_shifts(12, 3.5)
    fixed = torch.stack([scene(seed=seed) for seed in range(12)])
    moving = torch.stack([scene(seed=seed, shift=(-x, -y)) for seed, (x, y) in enumerate(truth)])
    found = register(moving, fixed, max_shift=4)
    assert (found[:, :, 2] - torch.tensor(truth)).abs().max() < 0.1
    assert torch.equal(found[:, :, :2], torch.eye(2, dtype=torch.float64).expand(12, 2, 2))
    assert psnr(warp(moving, found)[0][:, :, 4:-4, 4:-4], fixed[:, :, 4:-4, 4:-4]) > 45 > 30 > psnr(moving, fixed)


@pytest.mark.parametrize(("noise", "bound"), [(0.0, 0.1), (0.1, 0.4)])
def test_crops_of_photographs_are_registered_in_noise_too(noise, bound):
    """Unlike a picture rolled around, a crop shows new content at its border."""
    draw = torch.Generator().manual_seed(0)
    pictures = photographs()
    truth = torch.randint(-3, 4, (len(pictures), 2), generator=draw)
    fixed = pictures[:, :, 4:24, 4:24]
    moving = torch.stack([one[:, 4 - y : 24 - y, 4 - x : 24 - x] for one, (x, y) in zip(pictures, truth.tolist(), strict=True)])
    fixed, moving = (each + noise * torch.randn(each.shape, generator=draw, dtype=torch.float64) for each in (fixed, moving))
    assert (register(moving, fixed, max_shift=4)[:, :, 2] - truth).abs().max() < bound


def test_phase_correlation_finds_whole_shifts_of_a_picture_rolled_around():
    pictures = photographs()
    for x, y in ((0, 0), (3, -2), (-4, 4), (1, 0)):
        found = shifts(pictures.roll((y, x), (2, 3)), pictures, max_shift=4)
        assert (found - torch.tensor([x, y])).abs().max() < 0.5


def test_a_shift_beyond_the_allowed_one_is_not_reported():
    found = register(scene(shift=(-5.0, 0.0))[None], scene()[None], max_shift=2)
    assert found[:, :, 2].abs().max() <= 2


@pytest.mark.parametrize("degrees", [3.0, -6.0])
def test_small_rotations_and_scalings_are_registered_with_the_affine_part(degrees):
    cos, sin = 1.05 * math.cos(math.radians(degrees)), 1.05 * math.sin(math.radians(degrees))
    inverse = torch.linalg.inv(torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64))
    shift = torch.tensor([1.2, -0.7], dtype=torch.float64)
    fixed = torch.stack([scene(seed=seed) for seed in range(6)])
    moving = torch.stack([scene(seed=seed, shift=tuple((-inverse @ shift).tolist()), linear=inverse.tolist()) for seed in range(6)])
    affine, translated = (register(moving, fixed, max_shift=4, affine=one) for one in (True, False))
    expected = torch.cat([torch.linalg.inv(inverse), shift[:, None]], 1)
    corners = torch.tensor([[x, y, 1.0] for x in (-12, 12) for y in (-12, 12)], dtype=torch.float64).T
    assert ((affine - expected) @ corners).abs().max() < 0.5
    inner = (..., slice(4, -4), slice(4, -4))
    assert psnr(warp(moving, affine)[0][inner], fixed[inner]) > 5 + psnr(warp(moving, translated)[0][inner], fixed[inner])


def test_equal_constant_and_broken_images_are_left_where_they_are():
    pictures = photographs(4)
    moving = torch.stack(
        [pictures[0], torch.full_like(pictures[1], 0.3), pictures[2].clone().index_fill_(1, torch.tensor([3]), torch.nan), pictures[3]]
    )
    fixed = torch.stack([pictures[0], pictures[1], pictures[2], torch.zeros_like(pictures[3])])
    for dtype in (torch.float64, torch.float32):
        found = register(moving.to(dtype), fixed.to(dtype), max_shift=4, affine=True)
        assert torch.equal(found, torch.eye(2, 3, dtype=dtype).expand(4, 2, 3))


def test_what_rounding_leaves_of_a_constant_image_is_registered_to_nothing():
    pictures = photographs(2)
    nearly = 0.3 + 4 * torch.finfo(torch.float64).eps * (pictures - pictures.mean())
    assert nearly.std() > 0
    for moving, fixed in ((nearly, pictures.roll(2, -1)), (pictures.roll(2, -1), nearly)):
        assert torch.equal(register(moving, fixed, max_shift=4, affine=True), torch.eye(2, 3, dtype=torch.float64).expand(2, 2, 3))


def test_warping_by_whole_pixels_moves_pixels_and_marks_what_was_not_seen():
    picture = photographs(1)
    transform = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]], dtype=torch.float64)
    shown, seen = warp(picture, transform)
    torch.testing.assert_close(shown[..., 1:, :-2], picture[..., :-1, 2:])
    assert torch.equal(seen[0, 0], torch.ones(28, 28).double().index_fill_(1, torch.tensor([26, 27]), 0).index_fill_(0, torch.tensor([0]), 0))
    transform[:, :, 2] = 5e-3
    still, seen = warp(picture, transform)
    assert torch.equal(still, picture) and seen.min() == 1


def test_a_ramp_stays_a_ramp_when_warped():
    ramp = torch.arange(16, dtype=torch.float64).expand(1, 1, 16, 16) / 16
    shown, _ = warp(ramp, torch.tensor([[[1.0, 0.0, 0.3], [0.0, 1.0, 0.4]]], dtype=torch.float64))
    torch.testing.assert_close(shown[..., 2:-2, 2:-2], ramp[..., 2:-2, 2:-2] + 0.3 / 16)


# --- the consensus ---------------------------------------------------------------------------------------------------


def restarts_of(picture_seed, positions, noise=0.05, seed=0):
    """(R, 1, 3, H, W): one picture at several positions, each with noise of its own; and the same without noise."""
    draw = torch.Generator().manual_seed(seed)
    clean = torch.stack([scene(seed=picture_seed, shift=(-x, -y)) for x, y in positions])[:, None]
    return clean + noise * torch.randn(clean.shape, generator=draw, dtype=torch.float64), clean


def test_the_registered_consensus_is_the_image_and_the_plain_mean_is_not():
    noisy, clean = restarts_of(0, random_shifts(6, 2.5))
    registered = consensus(noisy, max_shift=8)
    for one in range(6):
        assert psnr(registered[one], clean[one]) > 4 + psnr(noisy[one], clean[one])  # √6 less noise is 7.8 dB
        assert psnr(registered[one], clean[one]) > 4 + psnr(noisy.mean(0), clean[one])


def test_shifted_copies_without_noise_agree_after_registration_and_not_before():
    images, _ = restarts_of(1, random_shifts(5, 2.5, seed=1), noise=0.0)
    registered, plain = (
        group_consistency(1.0, begin=0, ramp=0, max_shift=8, register_images=one)(images, [[0, 1, 2, 3, 4]], 1.0)[0] for one in (True, False)
    )
    assert registered.max() < 0.02 * plain.min()


@pytest.mark.parametrize("affine", [False, True])
def test_equal_restarts_and_a_single_one_get_exactly_nothing(affine):
    picture = photographs(2)[None]
    coupling = group_consistency(3.0, begin=0, ramp=0, affine=affine)
    for images, groups in ((picture.expand(3, 2, 3, 28, 28), [[0, 1, 2]]), (photographs(3)[:, None], [[0], [1], [2]]), (photographs(3)[:, None], [])):
        loss, gradient = coupling(images, groups, 1.0)
        assert loss.shape == (3,) and gradient.shape == images.shape
        assert not loss.any() and not gradient.any()


def test_the_gradient_is_that_of_the_loss_with_the_consensus_held_constant():
    noisy, _ = restarts_of(2, random_shifts(3, 1.5))
    loss, gradient = group_consistency(0.7, begin=0, ramp=0, max_shift=8, least_correlation=-1.0)(noisy, [[0, 1, 2]], 1.0)
    apart = noisy - consensus(noisy, max_shift=8)
    torch.testing.assert_close(loss, 0.7 * apart.square().mean((1, 2, 3, 4)))
    torch.testing.assert_close(gradient, 0.7 * 2 * apart / apart[0].numel())


def test_following_the_gradient_makes_restarts_agree_without_moving_them():
    positions = random_shifts(4, 2.0, seed=3)
    images, clean = restarts_of(3, positions)
    coupling, before = group_consistency(1.0, begin=0, ramp=0, max_shift=8), images
    for _ in range(10):
        images = images - 0.2 * images[0].numel() * coupling(images, [[0, 1, 2, 3]], 1.0)[1]
    for one in range(4):
        assert psnr(images[one], clean[one]) > 3 + psnr(before[one], clean[one])


def test_observations_do_not_touch_one_another_whatever_the_rows_and_sizes_of_their_groups():
    first, second = restarts_of(4, random_shifts(3, 2))[0], restarts_of(5, random_shifts(2, 2), seed=1)[0]
    coupling = group_consistency(1.0, begin=0, ramp=0)
    alone = [coupling(each, [list(range(len(each)))], 1.0) for each in (first, second)]
    loss, gradient = coupling(torch.stack([second[1], first[0], first[1], second[0], first[2], first[0]]), [[1, 2, 4], [3, 0]], 1.0)
    torch.testing.assert_close(loss[[1, 2, 4, 3, 0]], torch.cat([alone[0][0], alone[1][0]]))
    torch.testing.assert_close(gradient[[1, 2, 4, 3, 0]], torch.cat([alone[0][1], alone[1][1]]))
    assert loss[5] == 0 and not gradient[5].any()


def test_a_broken_or_foreign_restart_does_not_spoil_the_consensus_of_the_others():
    noisy, clean = restarts_of(6, random_shifts(4, 1.5))
    coupling = group_consistency(1.0, begin=0, ramp=0, least_correlation=0.5)
    healthy = coupling(noisy, [[0, 1, 2, 3]], 1.0)
    broken = torch.full_like(noisy[0], torch.nan)
    strange = torch.rand(noisy[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss, gradient = coupling(torch.stack([*noisy[:2], broken, *noisy[2:], strange]), [[0, 1, 2, 3, 4, 5]], 1.0)
    torch.testing.assert_close(loss[[0, 1, 3, 4]], healthy[0], rtol=0.02, atol=0)  # the reference may be another one
    assert torch.cosine_similarity(gradient[[0, 1, 3, 4]].flatten(1), healthy[1].flatten(1)).min() > 0.98
    assert loss[2] == 0 and not gradient[2].any() and loss[5] > 5 * healthy[0].max()
    pulled = strange - gradient[5] * noisy[0].numel() / 2
    reference = max(psnr(pulled, one) for one in clean)
    assert reference > 3 + max(psnr(strange, one) for one in clean)


def test_the_coupling_waits_for_its_share_of_the_iterations_and_then_rises_to_its_weight():
    noisy, _ = restarts_of(7, random_shifts(3, 1.0))
    coupling = group_consistency(2.0, begin=0.5, ramp=0.2)
    losses = [coupling(noisy, [[0, 1, 2]], progress)[0] for progress in (0.0, 0.5, 0.6, 0.7, 1.0)]
    assert not losses[0].any() and not losses[1].any() and losses[2].min() > 0
    torch.testing.assert_close(2 * losses[2], losses[3])
    torch.testing.assert_close(losses[3], losses[4])


# --- batches ---------------------------------------------------------------------------------------------------------

PLACES = [[0, 1, 2, 3], [2, 1, 0, 3], [0, 3, 2, 1], [3, 0, 1, 2]]
"""Which picture each of four restarts shows at each place."""


def shuffled():
    pictures = torch.stack([restarts_of(seed, random_shifts(4, 1.5, seed), noise=0.03, seed=seed)[0][:, 0] for seed in range(10, 14)], 1)
    return torch.stack([pictures[one, places] for one, places in enumerate(PLACES)])


def plain_consistency(images, places):
    """The same loss with every image back at its picture's place."""
    inverse = [[places[one].index(picture) for picture in range(4)] for one in range(4)]
    sorted_images = torch.stack([images[one, inverse[one]] for one in range(4)])
    loss, gradient = group_consistency(1.0, begin=0, ramp=0)(sorted_images, [[0, 1, 2, 3]], 1.0)
    return loss, torch.stack([gradient[one, places[one]] for one in range(4)])


def test_images_that_changed_places_find_one_another_if_any_may():
    images = shuffled()
    expected = plain_consistency(images, PLACES)
    found = group_consistency(1.0, begin=0, ramp=0, permute="all")(images, [[0, 1, 2, 3]], 1.0)
    # another reference may be chosen while images are not in their places yet
    torch.testing.assert_close(found[0], expected[0], rtol=0.05, atol=0)
    assert torch.cosine_similarity(found[1].flatten(1), expected[1].flatten(1)).min() > 0.98
    assert group_consistency(1.0, begin=0, ramp=0)(images, [[0, 1, 2, 3]], 1.0)[0].mean() > 3 * expected[0].max()


def test_only_images_of_one_label_change_places_if_labels_say_so():
    coupling = group_consistency(1.0, begin=0, ramp=0, permute="labels")
    duplicates = [[0, 1, 2, 3], [2, 1, 0, 3], [2, 1, 0, 3], [0, 1, 2, 3]]
    images = shuffled()
    images = torch.stack([images[one, [PLACES[one].index(picture) for picture in places]] for one, places in enumerate(duplicates)])
    labels = torch.tensor([5, 1, 5, 1]).expand(4, 4)
    found, expected = coupling(images, [[0, 1, 2, 3]], 1.0, labels), plain_consistency(images, duplicates)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    never = group_consistency(1.0, begin=0, ramp=0)(images, [[0, 1, 2, 3]], 1.0)
    for labels in (torch.arange(4).expand(4, 4), None):
        kept = coupling(images, [[0, 1, 2, 3]], 1.0, labels)
        assert torch.equal(kept[0], never[0]) and torch.equal(kept[1], never[1])


class Unasked(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading values, and shapes that depend on them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("affine", [False, True])
def test_the_host_asks_the_device_for_nothing(affine):
    images, labels = shuffled(), torch.tensor([5, 1, 5, 1]).expand(4, 4)
    coupling = group_consistency(1.0, begin=0, affine=affine, permute="labels")
    with Unasked():
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            float(images.sum())
        assert coupling(images, [[0, 1, 2], [3]], 1.0, labels)[0].shape == (4,)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1, 1), (2, 2, 1, 1, 9), (2, 2, 3, 3, 2), (3, 1, 1, 6, 6)])
@pytest.mark.parametrize("affine", [False, True])
def test_tiny_images_are_no_trouble(shape, affine):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss, gradient = group_consistency(1.0, begin=0, affine=affine, permute="all")(images, [list(range(shape[0]))], 1.0)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_settings_groups_and_shapes_that_make_no_sense_are_refused():
    for settings in (
        {"weight": -1.0},
        {"weight": 1.0, "max_shift": math.inf},
        {"weight": 1.0, "least_correlation": 1.0},
        {"weight": 1.0, "permute": "some"},
    ):
        with pytest.raises(InputError, match="group_consistency"):
            group_consistency(**settings)
    for groups in ([[0, 1], [1, 2]], [[0, 3]], [[-1, 0]]):
        with pytest.raises(InputError, match="one group at most"):
            group_consistency(1.0, begin=0)(photographs(3)[:, None], groups, 1.0)
    with pytest.raises(InputError, match="equal shape"):
        register(photographs(2), photographs(3), max_shift=1)
    with pytest.raises(InputError, match="max_shift"):
        register(photographs(2), photographs(2), max_shift=-1)
