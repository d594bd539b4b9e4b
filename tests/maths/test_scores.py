"""The evaluator's scores of reconstructions: paired with their truth, the oracle in a column of its own. Synthetic cells, an untrained judge."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gidef import metrics
from gidef.data import synthetic_blood_cells
from gidef.models import make_judge
from gidef.observe import Victims
from gidef.parallel import World
from gidef.scores import MEASURES, Scorer
from gidef.types import Reconstruction


@pytest.fixture(scope="module")
def scorer():
    dataset = synthetic_blood_cells(train=24, val=16, test=8, size=16)
    roles = SimpleNamespace(victims=torch.arange(8), judge=torch.arange(8, 24))
    run = SimpleNamespace(setting=SimpleNamespace(dataset=dataset, roles=roles), world=World())
    return Scorer(run, make_judge(8, (3, 16, 16), seed=0).eval())


def batches(scorer) -> Victims:
    """Two batches of four."""
    images, labels = scorer.truth.unflatten(0, (2, 4)), scorer.labels.view(2, 4)
    return Victims(torch.arange(8).view(2, 4), [0, 0], images, labels, [None] * 2, [{}] * 2, [{}] * 2)


def reconstructed(images, labels, **fields) -> Reconstruction:
    return Reconstruction(images=images, labels=labels, loss=0.0, losses=torch.zeros(1), **fields)


def test_images_are_scored_beside_the_truth_that_they_stand_for_whatever_their_order(scorer):
    victims, draw = batches(scorer), torch.Generator().manual_seed(0)
    noisy = (victims.images + 0.1 * torch.rand(victims.images.shape, generator=draw)).clamp(0, 1)
    straight = scorer.score(victims, [reconstructed(*one) for one in zip(noisy, victims.labels, strict=True)])
    order = torch.tensor([2, 0, 3, 1])
    mixed = scorer.score(victims, [reconstructed(images[order], labels[order]) for images, labels in zip(noisy, victims.labels, strict=True)])
    for name in (*MEASURES, "recovered", "oracle_psnr_db", "images"):
        assert torch.equal(straight[name], mixed[name]), name
    truth = victims.images.flatten(0, 1)
    expected = -10 * (noisy.flatten(0, 1) - truth).double().square().flatten(1).mean(1).log10()
    torch.testing.assert_close(straight["psnr_db"], expected, rtol=1e-5, atol=1e-4)
    swapped = scorer.score(victims, [reconstructed(*one) for one in zip(noisy.flip(0), victims.labels.flip(0), strict=True)])
    assert swapped["psnr_db"].mean() < straight["psnr_db"].mean() - 5  # a batch is not paired with another one's truth


def test_errors_are_normalised_by_the_variance_of_public_images(scorer):
    public = scorer._run.setting.dataset.val.images.double() / 255
    variance = (public - public.mean(0)).square().mean()
    images = (0.8 * scorer.truth + 0.1).clamp(0, 1)
    found = scorer.measure(images, scorer.truth, scorer.labels)["nmse"]
    torch.testing.assert_close(found, (images - scorer.truth).double().square().flatten(1).mean(1) / variance, rtol=1e-5, atol=1e-7)


def test_a_victim_is_identified_among_further_images_of_its_label(scorer):
    """The reconstructions are images of the pool, where the label has another one: nobody's victim is found by them."""
    train, pool = scorer._run.setting.dataset.train, range(24)
    images, labels = train.images.double() / 255, train.labels.tolist()
    others = [next((row for row in range(8, 24) if labels[row] == labels[victim]), victim) for victim in range(8)]
    expected = []
    for victim, other in enumerate(others):
        same = [row for row in pool if labels[row] == labels[victim]]
        expected.append(float(min(same, key=lambda row, other=other: float((images[row] - images[other]).square().mean())) == victim))
    assert 0.0 in expected
    assert scorer.measure(images[others].float(), scorer.truth, scorer.labels)["iip"].tolist() == expected
    assert scorer.measure(scorer.truth, scorer.truth, scorer.labels)["iip"].tolist() == [1.0] * 8


def test_the_start_that_the_truth_would_choose_moves_no_other_column(scorer):
    victims = batches(scorer)
    grey = torch.full_like(victims.images, 0.5)
    near = (0.9 * victims.images + 0.05).clamp(0, 1)
    plain = scorer.score(victims, [reconstructed(*one) for one in zip(grey, victims.labels, strict=True)])
    starts = [torch.stack([one, other, one]) for one, other in zip(grey, near, strict=True)]
    found = scorer.score(victims, [
        reconstructed(images, labels, restart_images=tried) for images, labels, tried in zip(grey, victims.labels, starts, strict=True)
    ])  # fmt: skip
    for name in (*MEASURES, "recovered"):
        assert torch.equal(plain[name], found[name]), name
    best = torch.stack([metrics.psnr_db(one, other).mean() for one, other in zip(near, victims.images, strict=True)]).double()
    torch.testing.assert_close(found["oracle_psnr_db"], best.repeat_interleave(4), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(plain["oracle_psnr_db"].view(2, 4).mean(1), plain["psnr_db"].view(2, 4).mean(1), rtol=1e-5, atol=1e-4)


def test_the_evaluator_s_curve_is_that_of_the_best_pairing_at_each_snapshot(scorer):
    victims = batches(scorer)
    ways = [torch.stack([torch.full_like(images, 0.5), (0.8 * images + 0.1).flip(0), images]) for images in victims.images]
    found = scorer.score(victims, [
        reconstructed(images, labels, snapshots=way.half()) for images, labels, way in zip(victims.images, victims.labels, ways, strict=True)
    ])  # fmt: skip
    curve = found["psnr_on_the_way"]
    assert curve.shape == (2, 3) and (curve.diff(dim=1) > 3).all()
    assert "psnr_on_the_way" not in scorer.score(victims, [reconstructed(*one) for one in zip(victims.images, victims.labels, strict=True)])
