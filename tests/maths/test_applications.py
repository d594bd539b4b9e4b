"""Attacks without matching in slices of the victims: what is lost at a stop, what one victim's error costs, what is told of each. A small perceptron."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from gidef import applications, audit, fits
from gidef.attack import latent
from gidef.attack.latent import invert_latent
from gidef.cells import make_cells
from gidef.config import Analytic, ImprintServer, IsotropicNoise, LatentDecoding, LearnedInversion, Model, PostHocDecoder
from gidef.releases import Releases
from tests.small_run import RECIPE, Heard, trained_once

ATTACKS = {
    "analytic": Analytic(labels="recovered"), "imprint": ImprintServer(bins=32), "learned": LearnedInversion(steps=3, gradients=24),
    "latent": LatentDecoding(iterations=7, restarts=2, steps=2, labels="recovered"),
}  # fmt: skip
VICTIMS = 5


def perceptron(*, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, num_classes))


class Broken(Mapping):
    """A victim's tensors that nobody can read."""

    def __getitem__(self, name):
        raise torch.linalg.LinAlgError("the matrix is singular")

    __iter__ = __len__ = lambda self: self[""]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    evaluation = dataclasses.replace(RECIPE.evaluation, num_victims=VICTIMS, batch_size=1)
    recipe = dataclasses.replace(
        RECIPE, model=Model(name=f"{__file__}:perceptron", cut="2"), defences={"noise": IsotropicNoise()}, attacks={**ATTACKS, "decoder": PostHocDecoder(steps=4)},
        evaluation=evaluation,
    )  # fmt: skip
    with trained_once(tmp_path_factory.mktemp, recipe) as one:
        yield one


def cells_of(run, one, folder, *, noisy=()):
    """By name; what the attacks need is trained. noisy: victims whose update no closed form explains."""
    releases, cells = Releases(run), {cell.name: cell for cell in make_cells(run, {("noise", 0): one}, folder)}
    draw = torch.Generator().manual_seed(0)
    for cell in cells.values():
        cell.releases = releases.of(cell)
    for victim in noisy:
        for name, tensor in cell.victims.updates[victim].items():
            cell.victims.updates[victim][name] = tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=draw)
    audit._work(run, fits.tasks(run, list(cells.values()), folder), "fit")
    audit._work(run, fits.later_tasks(run, list(cells.values())), "fit")
    return cells


def work(run, cell):
    """Do what is not done yet; returns the files."""
    audit._work(run, applications.tasks(run, [cell]), "attack")
    applications.collect(run, cell)
    return sorted(cell.folder.glob("reconstructed-*"))


def in_slices(monkeypatch, size):
    for kind, settings in applications.KINDS.items():
        monkeypatch.setitem(applications.KINDS, kind, dataclasses.replace(settings, at_once=size))


def assert_same(one, other):
    for mine, theirs in zip(one.reconstructions, other.reconstructions, strict=True):
        torch.testing.assert_close(mine.images, theirs.images, rtol=1e-4, atol=1e-4)
        assert torch.equal(mine.labels, theirs.labels) and (mine.status, mine.restart) == (theirs.status, theirs.restart)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-3, abs=1e-6) and mine.iterations == pytest.approx(theirs.iterations, abs=5)


@pytest.mark.parametrize("name", ATTACKS)
def test_victims_are_attacked_in_slices_of_which_only_the_missing_ones_are_done_again(trained, tmp_path, monkeypatch, name):
    run, one = trained("noise")
    monkeypatch.setattr(latent, "UNMIXED", 0)  # so that what a start draws shows
    whole = cells_of(run, one, tmp_path / "whole")[name]
    assert len(work(run, whole)) == (2 if name == "analytic" else 1)  # of which the first holds four
    in_slices(monkeypatch, 2)
    cell = cells_of(run, one, tmp_path / "cut")[name]
    tasks = applications.tasks(run, [cell])
    for task in tasks[:2]:  # a kill, while the last one runs
        task.do(0, lambda units: None)
    before = {path: path.stat().st_ino for path in cell.folder.glob("reconstructed-*")}
    assert len(before) == 2 and len(tasks) == 3
    again = cells_of(run, one, tmp_path / "cut")[name]
    files = work(run, again)
    assert [path.name for path in files] == [f"reconstructed-0000{first}-00{count}.safetensors" for first, count in ((0, 2), (2, 2), (4, 1))]
    assert {path: path.stat().st_ino for path in files[:2]} == before  # a file that is written again is another one
    assert_same(again, whole)
    files[1].unlink()
    kept = {path: path.stat().st_ino for path in (files[0], files[2])}
    assert work(run, again) == files and {path: path.stat().st_ino for path in kept} == kept
    assert_same(again, whole)
    spread = torch.stack([found.images for found in whole.reconstructions])
    assert float((spread - spread[0]).abs().max()) > 1e-3 and all(found.status == "ok" for found in whole.reconstructions)  # a victim's are its own


@pytest.mark.parametrize("name", ATTACKS)
def test_a_victim_that_raises_fails_alone(trained, tmp_path, name):
    run, one = trained("noise")
    run = dataclasses.replace(run, console=(heard := Heard()))
    whole = cells_of(run, one, tmp_path / "whole")[name]
    work(run, whole)
    cell = cells_of(run, one, tmp_path / "broken")[name]
    cell.victims.updates[1] = cell.victims.private[1] = Broken()
    reported, cost = 0.0, 0.0
    for task in applications.tasks(run, [cell]):
        units = []
        task.do(0, units.append)
        reported, cost = reported + sum(units), cost + task.cost
    assert reported == pytest.approx(cost)  # attacked twice, counted once
    applications.collect(run, cell)
    assert [found.status for found in cell.reconstructions] == ["ok", "failed", "ok", "ok", "ok"]
    error = cell.reconstructions[1].error
    assert error.endswith("Error: the matrix is singular") and (cell.reconstructions[1].images == 0.5).all()
    assert heard.notices == [f"{cell.label}: 1 attacks failed: {error}"]
    failed = [(attempt["observation"], attempt["start"], attempt["iterations"], attempt["error"]) for attempt in cell.attempts if attempt["status"] == "failed"]
    assert failed == [(1, start, 0, error) for start in range(getattr(cell.attack, "restarts", 1))]
    whole.reconstructions[1] = cell.reconstructions[1]
    assert_same(cell, whole)


def test_every_observation_and_start_leaves_an_attempt_that_says_what_it_took(trained, tmp_path):
    run, one = trained("noise")
    cells = cells_of(run, one, tmp_path, noisy=(2,))
    for name, cell in cells.items():
        if name == "decoder":
            fits.collect_decoded(run, cell)
        else:
            work(run, cell)
        starts = 2 if name == "latent" else 1
        assert [(attempt["observation"], attempt["start"]) for attempt in cell.attempts] == [(o, s) for o in range(VICTIMS) for s in range(starts)], name
        assert all(attempt["status"] == "ok" and attempt["error"] == "" and len(attempt["mark"]) == 16 for attempt in cell.attempts)
        assert cell.seconds > 0 and sum(attempt["seconds"] for attempt in cell.attempts) == pytest.approx(cell.seconds)
        expected = {"analytic": 0, "imprint": 0, "learned": 3, "decoder": 4}.get(name)
        assert expected is None or all(attempt["iterations"] == expected for attempt in cell.attempts), name
    read = cells["latent"]
    first, second = ([attempt["iterations"] for attempt in read.attempts if attempt["start"] == start] for start in range(2))
    assert all(first[victim] > 0 == second[victim] for victim in (0, 1, 3, 4))  # the span tells their latents: the other start is not needed
    kept = read.reconstructions[2].restart
    other = read.attempts[2 * 2 + 1 - kept]
    assert other["iterations"] == 7 < read.attempts[2 * 2 + kept]["iterations"]  # the search in the span and the polish count to the start that is kept
    assert read.attempts[2 * 2 + kept]["loss"] == read.reconstructions[2].loss < other["loss"]


def test_a_start_whose_loss_became_infinite_is_a_failed_attempt_beside_a_good_one(trained, tmp_path, monkeypatch):
    run, one = trained("noise")
    cell = cells_of(run, one, tmp_path, noisy=range(VICTIMS))["latent"]

    def lost(*arguments, **options):
        found = yield from invert_latent(*arguments, **options)
        for one in found:
            one.restart_losses[1 - one.restart] = math.inf
        return found

    monkeypatch.setattr(fits, "invert_latent", lost)
    work(run, cell)
    for victim, found in enumerate(cell.reconstructions):
        good, bad = cell.attempts[2 * victim + found.restart], cell.attempts[2 * victim + 1 - found.restart]
        assert found.status == good["status"] == "ok" and bad["status"] == "failed" and "infinite" in bad["error"] and bad["loss"] == math.inf
