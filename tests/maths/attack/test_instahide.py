"""InstaHide undone: encodings made by the defence itself, of smooth images with a known answer."""

from __future__ import annotations

import pytest
import torch

from gidef.attack.instahide import similarity, undo_instahide
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


def encoded(seed, *, mixed=2, signs=True):
    """(encodings, weights, members, the private images): every image is hidden TIMES times, in batches of all, as the defence draws it."""
    pixels = smooth(IMAGES, seed)
    client = Client(0, pixels, torch.zeros(IMAGES, dtype=torch.int64))
    hide, draw, again = Hide(1, mixed=mixed, signs=signs), generator(seed, "hide"), generator(seed, "hide")
    private, found, weights, members = pixels.float() / 255, [], [], []
    for _ in range(TIMES):
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
    assert undo_instahide(noise, weights, **options).fit > 0.05


def test_what_cannot_be_undone_is_refused():
    public = torch.zeros(1, 4, 4)
    with pytest.raises(InputError, match="expected \\(m, C, H, W\\)"):
        undo_instahide(torch.rand(3, 1, 4, 4), torch.rand(2, 2), num_images=2, public=public)
    with pytest.raises(InputError, match="3 encodings of num_images=4"):
        undo_instahide(torch.rand(3, 1, 4, 4), torch.rand(3, 2), num_images=4, public=public)
    with pytest.raises(InputError, match="10000 memberships"):
        undo_instahide(torch.rand(20, 1, 4, 4), torch.rand(20, 4), num_images=10, public=public)
