"""Attacks without matching in slices of the victims: what is lost at a stop, what one victim's error costs, what is told of each. A small perceptron."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from gidef import applications, audit, fits, threats
from gidef.attack import latent
from gidef.attack.latent import invert_latent
from gidef.attack.shadow import fit_shadow, front_latents
from gidef.cells import make_cells, not_applicable
from gidef.config import Analytic, ImprintServer, IsotropicNoise, LatentDecoding, LearnedInversion, Model, PostHocDecoder, Pruning, Undefended
from gidef.fit import fit_decoder
from gidef.models import decoder_for
from gidef.releases import Releases
from gidef.rng import stream_seed
from tests.small_run import RECIPE, Heard, evaluated, trained_once

ATTACKS = {
    "analytic": Analytic(labels="recovered"), "imprint": ImprintServer(bins=32), "learned": LearnedInversion(steps=3, gradients=24),
    "latent": LatentDecoding(iterations=7, restarts=2, steps=2, labels="recovered"),
}  # fmt: skip
NOISELESS = {"undefended": Undefended(), "pruned": Pruning(share=0.5)}
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
        RECIPE, model=Model(name=f"{__file__}:perceptron", cut="2"), defences={"noise": IsotropicNoise(), **NOISELESS}, attacks={**ATTACKS, "decoder": PostHocDecoder(steps=4)},
        evaluation=evaluation,
    )  # fmt: skip
    with trained_once(tmp_path_factory.mktemp, recipe) as one:
        yield one


def cells_of(run, one, folder, *, defence="noise", noisy=()):
    """By name; what the attacks need is trained. noisy: victims whose update no closed form explains."""
    releases, cells = Releases(run), {cell.name: cell for cell in make_cells(run, {(defence, 0): one}, folder)}
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
    assert read.attempts[2 * 2 + kept]["loss"] == read.reconstructions[2].loss <= other["loss"] * (1 + 1e-5)  # the other one's is in single precision


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


def test_the_bar_of_the_latent_attack_moves_with_every_victim_and_is_full_no_sooner_than_the_last(trained, tmp_path, monkeypatch):
    run, one = trained("noise")
    cell, reported, began, unmix = cells_of(run, one, tmp_path)["latent"], [], [], latent.unmix

    def watched(*given, **options):
        began.append(sum(reported))
        return (yield from unmix(*given, **options))

    monkeypatch.setattr(latent, "unmix", watched)
    [task] = applications.tasks(run, [cell])
    assert task.cost == VICTIMS * (16 * (42 + 72) + 2 * 7)  # 32 starts in the span at most, and the free search from two
    task.do(0, reported.append)
    assert len(began) == VICTIMS and began == sorted(set(began)) and began[-1] < task.cost == pytest.approx(sum(reported)) and min(reported) >= 0
    steps = sum(units > 0 for units in reported)
    applications.collect(run, cell)
    assert steps >= sum(attempt["iterations"] for attempt in cell.attempts)  # each shows


@pytest.mark.parametrize("name", ["analytic", "learned", "latent"])
def test_a_delta_of_one_step_of_sgd_is_read_as_the_gradient_that_it_is(trained, tmp_path, monkeypatch, name):
    """What each attack is handed, scale and sign, and what A4 makes of it; deltas of more are left out."""
    run, one = trained("noise")
    handed, made = {}, {}
    for kind, changes in {"gradient": {}, "delta": {"release": "delta", "local_lr": 0.5}}.items():
        seen = handed.setdefault(kind, [])
        asked = evaluated(run, **changes)
        place, reader = {"analytic": (applications, "analytic"), "learned": (fits, "invert_learned"), "latent": (fits, "invert_latent")}[name]
        read = getattr(place, reader)
        with monkeypatch.context() as patch:
            patch.setattr(place, reader, lambda given, *more, read=read, seen=seen, **how: seen.extend([given] if name == "analytic" else given) or read(given, *more, **how))
            if name == "learned":
                patch.setattr(fits, "fit_inverter", lambda net, simulate, *more, fit=fits.fit_inverter, seen=seen, **how: seen.append(simulate) or fit(net, simulate, *more, **how))
            cell = cells_of(asked, one, tmp_path / kind)[name]
            work(asked, cell)
        made[kind] = cell.reconstructions
        assert all(found.status == "ok" for found in made[kind])
    if name == "learned":  # the network is trained on what it is to read
        simulates = [handed[kind].pop(0) for kind in handed]
        params = one.snapshots["final"].params
        given = (torch.rand(1, 3, 16, 16), torch.eye(8)[:1], torch.randn(1, *one.training.defence.noise_shape))
        plain, stepped = simulates[0](params, {}, *given), simulates[1](params, {}, *given[:2], given[2][None])
        for key, tensor in plain.items():
            torch.testing.assert_close(stepped[key], tensor, rtol=1e-3, atol=1e-5)
    assert len(handed["gradient"]) == len(handed["delta"]) == VICTIMS
    for mine, theirs in zip(handed["gradient"], handed["delta"], strict=True):
        assert mine.kind == theirs.kind == "gradient"
        for key, tensor in mine.update.items():
            torch.testing.assert_close(theirs.update[key], tensor, rtol=1e-3, atol=1e-5)
    for mine, theirs in zip(made["gradient"], made["delta"], strict=True):
        assert torch.equal(mine.labels, theirs.labels)
        if name == "analytic":
            torch.testing.assert_close(theirs.images, mine.images, rtol=0, atol=2e-2)
    for changes in ({"local_epochs": 2}, {"local_optimiser": "adam"}):
        left = {cell.name for cell in make_cells(evaluated(run, release="delta", **changes), {("noise", 0): one}, tmp_path / "more")}
        assert name not in left and "decoder" in left


def headed(trained, defence, policy="head", **settings):
    """(run, what training left) with A5 alone."""
    run, one = trained(defence, policy)
    recipe = dataclasses.replace(run.recipe, attacks={"latent": LatentDecoding(iterations=5, batch_size=8, **settings)})
    return dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe), console=Heard()), one


def decoded_by_hand(run, one, cell):
    """What a decoder behind a shadow front, trained by the attack's parts, makes of the victims' own latents."""
    defence, snapshot, attack, val = one.training.defence, cell.snapshot, cell.attack, run.setting.dataset.val
    shadow = copy.deepcopy(defence.model)
    shadow.load_state_dict(shadow.state_dict() | defence.initial_model())
    list(fit_shadow(shadow, snapshot.params, val.images, val.labels, steps=attack.shadow_steps, seed=0))
    decoder = decoder_for(shadow.latent_shape, shadow.channel_dim, (3, 16, 16), size="posthoc", seed=stream_seed(0, "latent decoder") % 2**31)
    list(fit_decoder(decoder, front_latents(shadow), val, steps=attack.steps, seed=0, batch_size=attack.batch_size))
    found, client = [], copy.deepcopy(defence.model)
    for images, private in zip(cell.victims.images, cell.victims.private, strict=True):
        client.load_state_dict(client.state_dict() | private | snapshot.params)
        with torch.no_grad():
            found.append(decoder.eval()(client.run(images).latent).clamp(0, 1))
    return found


def test_under_head_the_latent_of_an_undefended_net_is_read_and_decoded(trained, tmp_path):
    run, one = headed(trained, "undefended", steps=30, shadow_steps=20)
    [cell] = cells_of(run, one, tmp_path, defence="undefended").values()
    work(run, cell)
    expected = decoded_by_hand(run, one, cell)
    assert all(found.status == "ok" for found in cell.reconstructions) and "front guessed on public images" in cell.note
    for found, mine, other in zip(cell.reconstructions, expected, expected[1:] + expected[:1], strict=True):
        assert (found.images - mine).abs().max() < 0.05 * (mine - other).abs().max(), "which is another victim's"


@pytest.mark.parametrize("defence", NOISELESS)
def test_without_noise_the_latent_is_attacked_under_head_alone(defence, trained, tmp_path):
    for front, told in (("shadow", "front guessed on public images"), ("known", "private front known: a bound")):
        run, one = headed(trained, defence, front=front, steps=2, shadow_steps=2)
        [cell] = cells_of(run, one, tmp_path / front, defence=defence).values()
        [found] = fits.latent(run, cell)([0], lambda units: None)
        assert (cell.attack_id, cell.note, found.status) == ("A5", told, "ok") and not_applicable(run, {(defence, 0): one}) == []
        assert threats.threat(run, cell)["knows"] == ["the labels", "public images"] + ["the private front"] * (front == "known")
    for policy in ("full", "all"):
        run, one = headed(trained, defence, policy)
        reason = "it needs a defence with noise on the latent"
        assert make_cells(run, {(defence, 0): one}, tmp_path) == [] and run.console.notices == [f"latent was left out: {reason}."]
        assert [each["reason"] for each in not_applicable(run, {(defence, 0): one})] == [reason]
