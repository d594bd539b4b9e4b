"""InstaHide undone: encodings made by the defence itself, of smooth images with a known answer."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from gidef.attack import instahide
from gidef.attack.instahide import similarity, undo_instahide
from gidef.data import synthetic_blood_cells
from gidef.defence.instahide import Hide, coefficients
from gidef.errors import InputError
from gidef.metrics import pair, psnr_db
from gidef.rng import generator
from gidef.types import Client

SIDE, IMAGES, TIMES = 16, 6, 10


def smooth(count, seed):
    """Low-frequency patterns of a common brightness, (count, 3, SIDE, SIDE) of 256 levels."""
    noise = torch.randn(count, 3, SIDE, SIDE, generator=generator(seed, "smooth"), dtype=torch.float64)
    frequency = torch.fft.fftfreq(SIDE)
    low = torch.exp(-(frequency[:, None] ** 2 + frequency**2) / 0.1**2)
    found = torch.fft.ifft2(torch.fft.fft2(noise) * low).real
    found = found / found.flatten(1).std(1)[:, None, None, None]
    return ((0.58 + 0.2 * found).clamp(0, 1) * 255).round().to(torch.uint8)


def encoded(seed, *, mixed=2, signs=True, times=TIMES, pixels=None):
    """(encodings, weights, members, the private images): every image is hidden `times` times, in batches of all, as the defence draws it."""
    pixels = smooth(IMAGES, seed) if pixels is None else pixels
    client = Client(0, pixels, torch.zeros(IMAGES, dtype=torch.int64))
    hide, draw, again = Hide(1, mixed=mixed, signs=signs), generator(seed, "hide"), generator(seed, "hide")
    private, found, weights, members = pixels.float() / 255, [], [], []
    for _ in range(times):
        found.append(hide.encode(private, torch.zeros(IMAGES, dtype=torch.int64), client=client, generator=draw)[0])
        weights.append(coefficients(IMAGES, mixed, hide.largest, generator=again))
        members.append(torch.stack([torch.arange(IMAGES), *(torch.randint(IMAGES, (IMAGES,), generator=again) for _ in range(mixed - 1))], 1))
        if signs:
            torch.randint(2, private.shape, generator=again, dtype=torch.int8)
    return torch.cat(found), torch.cat(weights), torch.cat(members), private


def test_the_draws_of_the_test_are_those_of_the_defence():
    encodings, weights, members, private = encoded(0)
    mixture = sum(weights[:, place, None, None, None] * (2 * private[members[:, place]] - 1) for place in range(2))
    assert torch.allclose((2 * encodings - 1).abs(), mixture.abs(), atol=1e-5)
    assert ((2 * encodings - 1) < 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_encodings_that_share_an_image_are_more_alike():
    encodings, _, members, _ = encoded(0)
    stands = torch.zeros(len(members), IMAGES).scatter_(1, members, 1.0)
    shared, alike = stands @ stands.T > 0, similarity(encodings)
    rows, columns = torch.triu_indices(len(members), len(members), 1)
    yes, no = (alike[rows, columns][shared[rows, columns] == one] for one in (True, False))
    assert (yes[:, None] > no).double().mean() > 0.75  # 0.5 tells nothing
    signed = (2 * encodings.double() - 1).flatten(1)
    blind = torch.nn.functional.cosine_similarity(signed[rows], signed[columns], dim=1)
    with_signs = (blind[shared[rows, columns]][:, None] > blind[~shared[rows, columns]]).double().mean()
    assert with_signs == pytest.approx(0.5, abs=0.08)


def test_private_images_come_back_far_above_the_mean_image():
    encodings, weights, members, private = encoded(0)
    public = (smooth(64, 100).double() / 255).mean(0)
    order = torch.argsort(torch.rand(weights.shape, generator=generator(0, "order")), dim=1)  # whose weight is whose is not told
    found = undo_instahide(encodings, weights.gather(1, order), num_images=IMAGES, public=public, restarts=8)
    truth = private.double()
    best = found.images[pair(found.images, truth)]
    mean = psnr_db(public.expand_as(truth), truth).mean()
    single = psnr_db(encodings[:IMAGES].double(), truth).mean()
    assert psnr_db(best, truth).mean() > mean + 15 and single < mean
    assert found.fit < 0.01 and found.members.shape == members.shape
    assert found.held < 0.2


def cells():
    """(private, the public mean image): blood cells, of which all are alike."""
    data = synthetic_blood_cells(train=8, val=24, test=8, size=SIDE)
    return data.train.images[:IMAGES], (data.val.images.double() / 255).mean(0)


@functools.lru_cache
def undone(*, times, noise, seed=0):
    """(dB of every image, dB of the public mean image, what was found) of cells, with normal errors of that size on their encodings."""
    pixels, public = cells()
    encodings, weights, _, private = encoded(seed, times=times, pixels=pixels)
    errors = noise * torch.randn(encodings.shape, generator=generator(0, "errors"))
    found = undo_instahide((encodings + errors).clamp(0, 1), weights, num_images=IMAGES, public=public, restarts=4)
    truth = private.double()
    return psnr_db(found.images[pair(found.images, truth)], truth), psnr_db(public.expand_as(truth), truth).mean(), found


@pytest.mark.parametrize(("times", "noise", "above"), [(4, 0.05, 1.0), (2, 0.0, 1.0), (1, 0.0, -1.0)])
def test_few_or_inexact_encodings_give_no_worse_than_the_public_mean_image(times, noise, above):
    each, mean, _ = undone(times=times, noise=noise)
    assert each.mean() > mean + above
    assert each.min() > mean - 6  # no negative, nor noise


def test_images_that_are_alike_come_back_far_above_the_mean_image():
    each, mean, found = undone(times=TIMES, noise=0.0)
    assert each.mean() > mean + 10 and found.fit < 0.003


def test_what_was_left_out_tells_few_encodings_where_the_fit_does_not():
    """Of few encodings two are left out, with 36 memberships to choose from: one draw's `held` is anything from 0.4 to 1, as rounding has it."""
    many, few = undone(times=TIMES, noise=0.0)[2], [undone(times=1, noise=0.0, seed=seed)[2] for seed in range(4)]
    assert sum(one.held for one in few) / len(few) > 0.45 > 1.5 * many.held
    assert all(one.fit < 0.05 for one in few)  # wrong images fit six encodings of six


def test_the_loss_of_the_descent_is_the_formula():
    seen, mixing, values = (torch.rand(shape, generator=generator(0, name), dtype=torch.float64) for name, shape in (("e", (5, 12)), ("m", (5, 2)), ("x", (2, 12))))
    values = values - 0.5
    square = sum((abs(sum(float(mixing[j, a] * values[a, p]) for a in range(2))) - float(seen[j, p])) ** 2 for j in range(5) for p in range(12))
    rough = 0.0
    for image in values.view(2, 1, 3, 4)[:, 0].tolist():
        rough += sum(abs(image[row][column] - image[row][column + 1]) for row in range(3) for column in range(3))
        rough += sum(abs(image[row][column] - image[row + 1][column]) for row in range(2) for column in range(4))
    expected = 30 * math.log(square / 60 + instahide._LEAST**2) + rough / instahide._SCALE
    assert float(instahide._loss(seen, mixing, values, torch.Size((1, 3, 4)))) == pytest.approx(expected)


def test_the_descent_stays_at_the_truth():
    pixels, public = cells()
    encodings, weights, members, private = encoded(0, pixels=pixels)
    truth = 2 * private.double() - 1
    mixing = torch.zeros(len(members), IMAGES, dtype=torch.float64).scatter_add_(1, members, weights.double())
    seen = (2 * encodings.double() - 1).abs().flatten(1)
    found = instahide._descended(seen, mixing, truth.flatten(1), truth.shape[1:], 100)
    assert psnr_db((found.view_as(truth) / 2 + 0.5).clamp(0, 1), private.double()).min() > 40
    choices = torch.cartesian_prod(torch.arange(IMAGES), torch.arange(IMAGES))
    kept = instahide._by_descent(seen, weights.double(), members, choices, 2 * public - 1, 3, 1, generator(0, "start"))
    assert (kept == members).all(1).double().mean() > 0.9


def test_without_signs_it_is_the_same():
    with_signs, weights, _, _ = encoded(0)
    mixtures, again, _, _ = encoded(0, signs=False)
    assert torch.equal(weights[:IMAGES], again[:IMAGES])
    assert torch.allclose(similarity(with_signs[:IMAGES]), similarity(mixtures[:IMAGES]), atol=1e-5)


def test_encodings_of_nothing_in_common_do_not_fit():
    """The attacker's own fit tells: weights of other encodings explain nothing."""
    encodings, weights, _, _ = encoded(0)
    public = (smooth(64, 100).double() / 255).mean(0)
    options = {"num_images": IMAGES, "public": public, "restarts": 2, "rounds": 2, "starts": 4}
    noise = torch.rand(encodings.shape, generator=generator(0, "noise"))
    found = undo_instahide(noise, weights, **options)
    assert found.fit > 0.05 and found.held > 0.5


def test_what_cannot_be_undone_is_refused():
    public = torch.zeros(1, 4, 4)
    with pytest.raises(InputError, match="expected \\(m, C, H, W\\)"):
        undo_instahide(torch.rand(3, 1, 4, 4), torch.rand(2, 2), num_images=2, public=public)
    with pytest.raises(InputError, match="3 encodings of num_images=4"):
        undo_instahide(torch.rand(3, 1, 4, 4), torch.rand(3, 2), num_images=4, public=public)
    with pytest.raises(InputError, match="10000 memberships"):
        undo_instahide(torch.rand(20, 1, 4, 4), torch.rand(20, 4), num_images=10, public=public)
