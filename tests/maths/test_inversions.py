"""The engine at work on an evaluation's cells: what is kept, taken up again, and told of failures. Small synthetic cells, one round."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import re

import pytest
import torch

from gidef import applications, audit, build, config, findings, fits, inversions, job, methods, metrics, observe, parity
from gidef import attack as attacks
from gidef.attack import Calibration, drain, engine, run_chunk
from gidef.attack.calibrate import Candidate
from gidef.cells import Cell, make_cells, mark, not_applicable
from gidef.checkpoint import load_file
from gidef.config import Data, Evaluation, LearnedPerturbation, LocalTraining, Model, Recipe, Rounds, Speed, Undefended
from gidef.data import Dataset, synthetic_blood_cells
from gidef.errors import InputError, StorageError
from gidef.models import decoder_for, make_judge
from gidef.parallel import World
from gidef.releases import Releases
from gidef.report import Console
from gidef.report.results import bound_label
from gidef.runs import Run
from gidef.scores import Scorer
from gidef.training import train
from gidef.types import Reconstruction
from tests.hasty import hasty, of_fewer
from tests.small_run import Heard, evaluated

NAIVE = config.NaiveMatching(iterations=4, restarts=2)


def few_cells() -> Dataset:
    return synthetic_blood_cells(train=64, val=24, test=16, size=16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    defences = {"undefended": Undefended(), "learned": LearnedPerturbation(ramp=0.0)}
    recipe = Recipe(
        data=Data(name=f"{__file__}:few_cells", num_clients=3, min_examples=8), model=Model(cut="blocks.0"), rounds=Rounds(count=1),
        clients=LocalTraining(batch_size=8), defences=defences, speed=Speed(device="cpu", workers=1, attacks_at_once=2, attack_mode="vmap"),
        evaluation=Evaluation(num_victims=4, num_tuning=8, checkpoints=("final",)), attacks={"naive": NAIVE},
    )  # fmt: skip
    setting = build.load_setting(recipe, world=World(), notice=lambda text: None)
    run = Run(setting, World(), tmp_path_factory.mktemp("run"), Console(rank=1), None, "mark")
    yield run, {(name, 0): train(run, name, defence, 0) for name, defence in defences.items()}
    torch.set_num_threads(before)


def with_speed(run, console=None, attacks=None, **speed):
    recipe = dataclasses.replace(run.recipe, speed=dataclasses.replace(run.recipe.speed, **speed), attacks=attacks or run.recipe.attacks)
    return dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe), console=console or run.console)


def cells_of(run, trained, folder, defence="undefended"):
    releases = Releases(run)
    cells = [cell for cell in make_cells(run, trained, folder) if cell.defence == defence]
    for cell in cells:
        cell.releases = releases.of(cell)
    return cells


def tasks_of(run, cells, folder):
    return inversions.matching_tasks(run, cells, lambda cell: {}, folder)


def finish(run, cells, folder, only=None):
    tasks = tasks_of(run, cells, folder)
    for task in tasks[:only]:
        task.do(0, lambda units: None)
    return tasks


def assert_same_images(found, expected):
    """But for rounding, which depends on what shares a program: Adam's first step is the gradient's sign, so that it decides a few pixels of no gradient."""
    apart = (found - expected).abs().flatten()
    assert found.shape == expected.shape and float(apart.quantile(0.98)) < 1e-3 and float(apart.max()) < 0.1, (apart.quantile(0.98), apart.max())


def test_a_stopped_attack_is_taken_up_where_it_was_with_another_number_at_once(trained, tmp_path):
    run, found = trained
    whole = cells_of(run, found, tmp_path / "whole")
    assert len(finish(run, whole, tmp_path / "whole")) == 4
    inversions.collect(run, whole[0])
    cut = cells_of(run, found, tmp_path / "cut")
    finish(run, cut, tmp_path / "cut", only=2)
    resumed = with_speed(run, attacks_at_once=3)
    again = cells_of(resumed, found, tmp_path / "cut")
    assert len(finish(resumed, again, tmp_path / "cut")) == 2  # four attacks are left, three at once
    assert tasks_of(resumed, again, tmp_path / "cut") == []
    inversions.collect(resumed, again[0])
    assert len(again[0].attempts) == 8
    for one, other in zip(whole[0].reconstructions, again[0].reconstructions, strict=True):
        assert one.restart == other.restart
        assert_same_images(one.images, other.images)


def test_every_cell_attacks_the_same_victims_and_every_attack_on_a_defence_the_same_updates(trained, tmp_path):
    run, found = trained
    run = with_speed(run, attacks={"naive": NAIVE, "joint": config.JointMatching(), "rounds": config.MultiRound(rounds=2), "learned": config.LearnedInversion()})
    releases, cells = Releases(run), make_cells(run, found, tmp_path)
    for cell in cells:
        cell.releases = releases.of(cell)
    assert len({id(cell.victims) for cell in cells}) == len(found) < len(cells) - 1
    first = cells[0].victims
    for cell in cells:
        assert torch.equal(cell.victims.rows, first.rows) and torch.equal(cell.victims.images, first.images) and cell.victims.owners == first.owners
    again = Releases(run)
    for cell in cells:  # another life of the run observes the same bits
        for one, other in zip(again.of(cell), cell.releases, strict=True):
            assert all(torch.equal(update[name], tensor) for update, theirs in zip(one.updates, other.updates, strict=True) for name, tensor in theirs.items())


def test_an_attack_can_be_stopped_at_any_report_and_leaves_no_file(trained, tmp_path, monkeypatch):
    """Reports come by the clock, too, so that a signal need not wait for slow iterations."""
    run, found = trained
    monkeypatch.setattr(inversions, "REPORT_S", 0.0)
    [cell] = cells_of(run, found, tmp_path)
    first, *_ = tasks_of(run, [cell], tmp_path)
    reports = []

    def report(units):
        reports.append(units)
        if len(reports) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.do(0, report)
    assert reports == [0.0, 2.0, 2.0] and not list(cell.folder.glob("*"))  # two attacks at once, after each iteration
    assert len(finish(run, [cell], tmp_path)) == 4


def test_attacks_whose_program_raises_are_rows_with_their_error_and_the_others_go_on(trained, tmp_path, monkeypatch):
    run, found = trained
    real = inversions.climb

    def sometimes(chunk, *arguments, **options):
        if chunk[0][0] == 1:
            raise RuntimeError("this operator has no derivative\nand a long story")
        return real(chunk, *arguments, **options)

    monkeypatch.setattr(inversions, "climb", sometimes)
    heard = Heard()
    run = with_speed(run, heard)
    [cell] = cells_of(run, found, tmp_path)
    finish(run, [cell], tmp_path)
    inversions.collect(run, cell)
    statuses = [one.status for one in cell.reconstructions]
    assert statuses == ["ok", "failed", "ok", "ok"] and (cell.reconstructions[1].images == 0.5).all()
    assert cell.reconstructions[1].error == "RuntimeError: this operator has no derivative"
    failed = [attempt for attempt in cell.attempts if attempt["status"] == "failed"]
    assert [(one["observation"], one["start"], one["iterations"]) for one in failed] == [(1, 0, 0), (1, 1, 0)]
    assert len(cell.attempts) == 8 and any("no derivative" in text for text in heard.notices)


def test_attacks_whose_loss_becomes_nan_keep_their_best_image_and_the_record_says_so(trained, tmp_path, monkeypatch):
    run, found = trained
    [whole] = cells_of(run, found, tmp_path / "whole")
    finish(run, [whole], tmp_path / "whole")
    inversions.collect(run, whole)
    noted = engine._noted

    def lost(best, own, variables, final, fit, iteration, *more):  # of two starts in a chunk the second from the beginning, the first in the end
        broken = torch.tensor([iteration >= 4, True])
        return noted(best, own, variables, torch.where(broken, torch.nan, final), fit, iteration, *more)

    monkeypatch.setattr(engine, "_noted", lost)
    [cell] = cells_of(run, found, tmp_path / "lost")
    finish(run, [cell], tmp_path / "lost", only=2)
    assert len(finish(run, [cell], tmp_path / "lost")) == 2  # those that were lost are done, too
    inversions.collect(run, cell)
    told = [(one["start"], one["status"], one["error"]) for one in cell.attempts]
    text = "the attacker's loss became infinite or NaN at iteration "
    assert told == [(0, "ok", f"{text}4{attacks.KEPT}"), (1, "failed", f"{text}0")] * 4
    for one, other in zip(cell.reconstructions, whole.reconstructions, strict=True):
        assert (one.restart, one.status, one.error, one.restart_losses[1]) == (0, "ok", told[0][2], torch.inf)
        assert one.loss == pytest.approx(float(other.losses[:4].min()) if other.restart == 0 else one.loss) and (one.restart_images[1] == 0.5).all()
        torch.testing.assert_close(one.images, one.snapshots[-1].float(), rtol=0, atol=1e-3)
    assert any(one.restart == 0 for one in whole.reconstructions)
    scorer = Scorer(run, make_judge(8, (3, 16, 16), seed=0).eval())
    rows = [findings.rows(run, [one], {id(one): scorer.score(one.victims, one.reconstructions)})[0] for one in (cell, whole)]
    assert [row["failed"] for row in rows] == [0, 0] and "of 4 of 4 images the attacker's loss became infinite or NaN" in rows[0]["note"] and not rows[1]["note"]


def test_an_attack_without_matching_that_raises_is_a_row_with_its_error(trained, tmp_path, monkeypatch):
    run, found = trained

    def breaks(*arguments, **options):
        raise ArithmeticError("the matrix is singular\nand a long story")

    monkeypatch.setattr(applications, "analytic", breaks)
    heard = Heard()
    run = with_speed(run, heard, attacks={"analytic": config.Analytic()})
    [cell] = cells_of(run, found, tmp_path)
    for task in applications.tasks(run, [cell]):
        task.do(0, lambda units: None)
    applications.collect(run, cell)
    assert [one.status for one in cell.reconstructions] == ["failed"] * 4 and all((one.images == 0.5).all() for one in cell.reconstructions)
    assert {one["error"] for one in cell.attempts} == {"ArithmeticError: the matrix is singular"} and any("singular" in text for text in heard.notices)


def test_attacks_without_matching_cannot_see_the_truth_either(trained, tmp_path, monkeypatch):
    """A4, A5 and A7: the victims' images and the training set are overwritten after the release, and no reconstruction changes in any bit."""
    hasty(monkeypatch)
    run, found = trained
    attacks = {
        "analytic": config.Analytic(labels="recovered"), "latent": config.LatentDecoding(iterations=2, steps=2, labels="recovered"),
        "learned": config.LearnedInversion(steps=2, gradients=8, labels="recovered"),
    }  # fmt: skip
    run, train_images, images = with_speed(run, attacks=attacks), run.setting.dataset.train.images, []
    kept = train_images.clone()
    for folder in (tmp_path / "one", tmp_path / "other"):
        cells = cells_of(run, found, folder, "learned")
        if images:
            train_images.copy_(kept.flip(0))
            for cell in cells:
                cell.victims.images.copy_(1 - cell.victims.images)
                cell.victims.labels.copy_((cell.victims.labels + 1) % 8)
        try:
            for tasks in (fits.tasks(run, cells, folder), fits.later_tasks(run, cells), applications.tasks(run, cells)):
                for task in tasks:
                    task.do(0, lambda units: None)
        finally:
            train_images.copy_(kept)
        for cell in cells:
            applications.collect(run, cell)
        images.append({cell.name: torch.stack([one.images for one in cell.reconstructions]) for cell in cells})
    assert images[0].keys() == attacks.keys() and not torch.equal(images[0]["learned"][0], images[0]["learned"][1])
    for name, before in images[0].items():
        assert torch.equal(before, images[1][name]), name


def test_what_attackers_train_sees_no_image_of_a_client(trained, tmp_path, monkeypatch):
    """A3's guess, A5, A8 and A12: the victims' images and the training set are overwritten before, and no network changes in any bit."""
    run, found = trained
    attacks = {
        "guessed": config.JointMatching(decoder="surrogate", surrogate_steps=2), "latent": config.LatentDecoding(iterations=2, steps=3), "decoder": config.PostHocDecoder(steps=4),
        "generative": config.GenerativePrior(fit_steps=2), "gan": config.GenerativePrior(fit_steps=2, generator="gan"),
    }  # fmt: skip
    run, train_images, networks = with_speed(run, attacks=attacks), run.setting.dataset.train.images, []
    for name in ("fit_decoder", "fit_autoencoder", "fit_gan"):
        monkeypatch.setattr(fits, name, lambda network, *given, fit=getattr(fits, name), **how: networks[-1].append(network) or fit(network, *given, **how))
    kept = train_images.clone()
    for folder in (tmp_path / "one", tmp_path / "other"):
        cells = cells_of(run, found, folder, "learned")
        if networks:
            train_images.copy_(255 - kept)
            for cell in cells:
                cell.victims.images.copy_(1 - cell.victims.images)
        networks.append([])
        try:
            for task in fits.tasks(run, cells, folder):
                task.do(0, lambda units: None)
        finally:
            train_images.copy_(kept)
    assert len(networks[0]) == len(networks[1]) >= len(attacks)
    for one, other in zip(*networks, strict=True):
        theirs = other.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items()), type(one).__name__


def test_the_judge_has_seen_no_victim(trained, tmp_path):
    run = evaluated(trained[0], judge_epochs=1)
    images, roles = run.setting.dataset.train.images, run.setting.roles
    kept = images.clone()

    def fitted(rows):
        try:
            images[rows] = 255 - images[rows]
            fits.judge_task(run, tmp_path / "judge.safetensors").do(0, lambda units: None)
        finally:
            images.copy_(kept)
        return load_file(tmp_path / "judge.safetensors")[0]

    before, of_victims, of_its_own = (fitted(rows) for rows in ([], torch.cat([roles.victims, roles.tuning]), roles.judge[:4]))
    assert all(torch.equal(tensor, of_victims[name]) for name, tensor in before.items())
    assert not all(torch.equal(tensor, of_its_own[name]) for name, tensor in before.items())


def test_images_that_are_not_finite_are_failures_that_can_be_scored():
    images = torch.rand(1, 3, 4, 4)
    found = [Reconstruction(images=one, labels=torch.zeros(1, dtype=torch.int64), loss=0.0, losses=torch.zeros(1)) for one in (images, images * torch.nan)]
    good, bad = inversions.sound(found)
    assert good is found[0] and bad.status == "failed" and bad.error and bad.loss == torch.inf and (bad.images == 0.5).all()


def test_an_attack_that_fits_no_defence_is_left_out_with_the_reason(trained, tmp_path):
    run, found = trained
    heard, attacks = Heard(), {"naive": NAIVE, "latent": config.LatentDecoding(), "zeroed": config.ZeroedLevel(iterations=1)}
    run = with_speed(run, heard, attacks=attacks)
    cells = make_cells(run, {key: one for key, one in found.items() if key[0] == "undefended"}, tmp_path)
    assert {cell.name for cell in cells} == {"naive"} and [text.partition(" ")[0] for text in heard.notices] == ["latent", "zeroed"]
    assert all("noise" in text for text in heard.notices)
    heard.notices.clear()
    assert {cell.name for cell in make_cells(run, found, tmp_path)} == set(attacks) and heard.notices == []


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewDraws(config.EotMatching):
    samples: int = 2
    iterations: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewBins(config.ImprintServer):
    bins: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine:
    iterations: int = 2
    restarts: int = 1
    labels: str = "known"
    decoder: str = "surrogate"
    surrogate_steps: int = 2

    def plan(self, case):
        return methods.Plan(case.observations, case.simulator, case.matching(noise_shape=case.noise_shape))


def test_an_attack_of_one_s_own_without_work_on_one_defence_is_told_as_ours_are(trained, tmp_path):
    """Subclasses of ours stay in their family; a field called decoder means what it does in ours only where it says so."""
    run, found = trained
    kinds = {"few draws": FewDraws(), "few bins": FewBins(), "guessed": Mine(), "other": Mine(decoder="a net of mine")}
    run = evaluated(with_speed(run, attacks=kinds, attacks_at_once=0), judge_epochs=1)
    result = audit.audit(run, found, folder=tmp_path)
    assert {(one["attack"], one["attack_id"], one["defence"]) for one in result.not_applicable} == {("few draws", "A1", "undefended"), ("guessed", "own", "undefended")}
    rows = {(row["attack"], row["attack_id"], row["defence"]) for row in result.rows if not row["failed"]}
    ids = {"few draws": "A1", "few bins": "A11", "guessed": "own", "other": "own"}
    assert rows == {(name, ids[name], defence) for name in ids for defence in ("undefended", "learned")} - {("few draws", "A1", "undefended"), ("guessed", "own", "undefended")}


def test_an_ensemble_says_which_of_its_members_have_nothing_to_do_and_why(trained, tmp_path):
    run, found = trained
    heard = Heard()
    run = with_speed(run, heard, attacks={"smoke": config.Standard(version="smoke")})
    cells = make_cells(run, {key: one for key, one in found.items() if key[0] == "undefended"}, tmp_path)
    assert {cell.name.removeprefix("smoke - ") for cell in cells} == {"naive", "joint", "joint smooth", "joint smoother", "read latent", "analytic", "learned", "shuffled gradient"}
    assert heard.notices == [
        "smoke goes without decoder, eot, read noise, read noise guessed decoder: it needs a defence with noise on the latent.",
        "smoke goes without generative: the updates carry no noise that a prior could see through.",
        "smoke goes without joint guessed decoder: it needs a defence with a decoder.",
        "smoke goes without latent: the front is shared, and other members invert it.",
        "smoke goes without rounds: it needs a defence that draws something in every release.",
        "smoke goes without statistics: it needs BatchNorm's statistics, of the batch or running ones, and nothing is known of any.",
    ]  # fmt: skip
    head = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(run.recipe, share_policy="head")))
    assert "smoke - latent" in {cell.name for cell in make_cells(head, found, tmp_path, tell=False)}
    evaluation = dataclasses.replace(run.recipe.evaluation, release="delta", batch_size=2, local_steps=2)
    deltas = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=dataclasses.replace(run.recipe, evaluation=evaluation)))
    heard.notices.clear()
    cells = make_cells(deltas, found, tmp_path)
    # A9 reads deltas, as it does when it is asked for by name, and the latents of every step are read
    assert {"smoke - rounds", "smoke - eot", "smoke - read latent", "smoke - read noise"} <= {cell.name for cell in cells}
    assert heard.notices == [
        "smoke goes without analytic, latent, learned: it reads single gradients, and evaluation.release is a delta of more than one step of SGD.",
        "smoke goes without generative: the updates carry no noise that a prior could see through.",
        "smoke goes without statistics: it needs BatchNorm's statistics, of the batch or running ones, and nothing is known of any.",
    ]  # fmt: skip
    for changes, labels, why in (
        ({"local_epochs": 2}, "known", "it reads the latents of steps of SGD in one epoch of one client"),
        ({"local_optimiser": "adam"}, "known", "it reads the latents of steps of SGD in one epoch of one client"),
        ({}, "recovered", "it reads the latent of every local step, and has to know the labels of each"),
    ):
        other = evaluated(with_speed(deltas, attacks={"read": config.ReadLatent(labels=labels)}), **changes)
        assert [one["reason"] for one in not_applicable(other, found) if one["defence"] == "undefended"] == [why]


def test_a_full_disk_is_no_failed_attack_but_ends_the_run(trained, tmp_path, monkeypatch):
    run, found = trained

    def full(*arguments, **options):
        raise StorageError("disk full")

    [cell] = cells_of(run, found, tmp_path)
    for name in ("save_file", "climb"):
        with monkeypatch.context() as patch, pytest.raises(StorageError, match="disk full"):
            patch.setattr(inversions, name, full)
            finish(run, [cell], tmp_path)
    assert not list(cell.folder.glob("*.safetensors"))


def test_one_victim_s_error_fails_that_victim_alone_whatever_shares_its_program(trained, tmp_path, monkeypatch):
    run, found = trained
    real = inversions.climb

    def sometimes(chunk, *arguments, **options):
        if any(observation == 2 for observation, _ in chunk):
            raise InputError("granted labels do not fit")
        return real(chunk, *arguments, **options)

    [whole] = cells_of(run, found, tmp_path / "whole")
    finish(run, [whole], tmp_path / "whole")
    inversions.collect(run, whole)
    monkeypatch.setattr(inversions, "climb", sometimes)
    run = with_speed(run, heard := Heard(), attacks_at_once=8)
    [cell] = cells_of(run, found, tmp_path)
    assert len(finish(run, [cell], tmp_path)) == 1
    inversions.collect(run, cell)
    assert [one.status for one in cell.reconstructions] == ["ok", "ok", "failed", "ok"] and heard.notices == [f"{cell.label}: 2 attacks failed: granted labels do not fit"]
    assert [(one["observation"], one["error"]) for one in cell.attempts if one["error"]] == [(2, "granted labels do not fit")] * 2
    for victim in (0, 1, 3):
        assert_same_images(cell.reconstructions[victim].images, whole.reconstructions[victim].images)
    assert tasks_of(run, [cell], tmp_path) == []


def test_an_attack_that_cannot_be_planned_or_measured_is_rows_with_its_error(trained, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Own:
        unplanned: bool
        iterations: int = 2
        restarts: int = 2
        labels: str = "known"

        def plan(self, case):
            if self.unplanned:
                raise KeyError("no such tensor")

            def prior(point):
                raise ZeroDivisionError("a prior of its own")

            return methods.Plan(case.observations, case.simulator, case.matching(priors=((1.0, prior),)))

    run, found = trained
    heard = Heard()
    run = with_speed(run, heard, attacks={"unplanned": Own(True), "unmeasured": Own(False), "naive": NAIVE}, attacks_at_once=0, attack_mode="auto")
    cells = cells_of(run, found, tmp_path)
    finish(run, cells, tmp_path)
    for cell, error in zip(cells, ("KeyError: 'no such tensor'", "ZeroDivisionError: a prior of its own", ""), strict=True):
        inversions.collect(run, cell)
        assert [one.error for one in cell.reconstructions] == [error] * 4 and [one["error"] for one in cell.attempts] == [error] * 8
        assert error == "" or all((one.images == 0.5).all() for one in cell.reconstructions)
    assert any("no program could be measured" in text for text in heard.notices)


def test_where_the_classifier_tells_no_labels_the_skipping_attack_fails_on_that_victim_alone(trained, tmp_path):
    run, found = trained
    run = with_speed(run, attacks={"skip": config.SkipLayers(iterations=2, labels="recovered")})
    [cell] = cells_of(run, found, tmp_path, "learned")
    for victim, value in ((1, 0.0), (2, torch.nan)):
        for name in ("backbone.head.weight", "backbone.head.bias"):
            cell.victims.updates[victim][name] = torch.full_like(cell.victims.updates[victim][name], value)
    finish(run, [cell], tmp_path)
    inversions.collect(run, cell)
    assert [one.status for one in cell.reconstructions] == ["ok", "failed", "failed", "ok"]
    assert all("labels cannot be recovered" in cell.reconstructions[victim].error for victim in (1, 2))
    assert [int(cell.reconstructions[victim].labels) for victim in (0, 3)] == [int(cell.victims.labels[victim]) for victim in (0, 3)]


def test_the_row_of_the_latent_says_how_well_it_explains_the_update_and_whether_that_determines_it(trained, tmp_path, monkeypatch):
    run, found = trained
    run = with_speed(run, attacks={"latent": config.LatentDecoding(iterations=2, steps=2)})
    [row] = audit.audit(run, {("learned", 0): found["learned", 0]}, folder=tmp_path).rows
    distance, most = re.fullmatch(r"its latents' gradients are (\S+) from the update, (\S+) at most", row["note"]).groups()
    assert 0 < float(distance) <= float(most) < 1e-8  # batches of one: exact
    kept = applications.Predictor.__init__
    monkeypatch.setattr(applications.Predictor, "__init__", lambda self, model: (kept(self, model), setattr(self, "told", 100))[0])
    [row] = audit.audit(run, {("learned", 0): found["learned", 0]}, folder=tmp_path).rows
    assert row["note"].endswith("it does not determine them") and "100 numbers" in row["note"]


def test_networks_that_cannot_be_trained_fail_the_attacks_that_need_them_and_no_others(trained, tmp_path, monkeypatch):
    def breaks(*arguments, **options):
        raise RuntimeError("no kernel for this\nand a long story")

    run, found = trained
    heard = Heard()
    attacks = {
        "naive": NAIVE, "guessed": config.JointMatching(iterations=2, decoder="surrogate"), "latent": config.LatentDecoding(iterations=2, steps=2),
        "learned": config.LearnedInversion(steps=2, gradients=8), "generative": config.GenerativePrior(iterations=2, fit_steps=2),
        "decoder": config.PostHocDecoder(steps=2), "known": config.JointMatching(iterations=2),
    }  # fmt: skip
    run = with_speed(run, heard, attacks=attacks)
    for name in ("fit_decoder", "fit_autoencoder"):
        monkeypatch.setattr(fits, name, breaks)
    for one in range(2):  # the second time what failed is read from its files
        rows = audit.audit(run, {("learned", 0): found["learned", 0]}, folder=tmp_path).rows
        assert {row["attack"]: row["failed"] for row in rows} == {name: 0 if name in ("naive", "known") else 4 for name in attacks}
        assert all((row["label_recovery"] is None) == (row["failed"] == 4) for row in rows)
        if one == 0:
            assert sum("could not be trained: RuntimeError: no kernel for this" in text for text in heard.notices) == 9
            monkeypatch.setattr(fits, "_follow", breaks)
    cells = cells_of(run, found, tmp_path, "learned")
    [learned] = [cell for cell in cells if cell.name == "learned"]
    applications.collect(run, learned)
    text = "the inverter could not be trained: the surrogate decoder could not be trained: RuntimeError: no kernel for this"
    assert {one.error for one in learned.reconstructions} == {text}
    [decoder] = [cell for cell in cells if cell.name == "decoder"]
    fits.collect_decoded(run, decoder)
    for cell, error in ((learned, text), (decoder, "the decoder could not be trained: RuntimeError: no kernel for this")):
        told = [(one["observation"], one["start"], one["status"], one["iterations"], one["error"]) for one in cell.attempts]
        assert told == [(observation, 0, "failed", 0, error) for observation in range(4)]


def test_the_first_look_on_a_cpu_takes_as_many_at_once_as_fit_beside_the_other_workers(trained, tmp_path, monkeypatch):
    run, found = trained
    run = with_speed(run, attacks_at_once=0, workers=3)
    [cell] = cells_of(run, found, tmp_path)
    plan = methods.plan(methods.make_case(run, cell.trained, cell.snapshot, cell.attack, cell.releases, seed=0))
    asked, shared = [], []

    def calibrate(*given, at_once, memory_bytes, **how):
        asked.append((at_once, memory_bytes))
        return Calibration("vmap", at_once, (Candidate("vmap", at_once, 1e-3, 0.0, 100 * at_once),))

    monkeypatch.setattr(inversions.attacks, "calibrate", calibrate)
    for free, expected in ((350, [(1, 350), (3, 350)]), (10**9, [(1, 10**9), (8, 10**9)]), (10, [(1, 10), (1, 10)]), (None, [(1, None), (8, None)])):
        monkeypatch.setattr(inversions.attacks, "free_bytes", lambda device, workers, free=free: shared.append(workers) or free)
        chosen = inversions._measure(run, cell, plan, attacks.Programs(), 24, None)
        assert asked == expected and chosen.at_once == expected[-1][0]
        asked.clear()
    inversions._measure(with_speed(run, attacks_at_once=5), cell, plan, attacks.Programs(), 24, None)
    assert [size for size, _ in asked] == [5] and shared == [3] * 5  # what is asked for is done
    wide = dataclasses.replace(run, world=dataclasses.replace(run.world, size=16))
    for variables, ranks in (({}, 16), ({"LOCAL_WORLD_SIZE": "4"}, 4), ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 8), ({"SLURM_STEP_TASKS_PER_NODE": "2,4"}, 2)):
        with monkeypatch.context() as patch:
            for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            assert inversions._ranks_here(wide) == ranks


def test_any_run_has_a_control_per_defence_and_checkpoint_and_its_sheets_every_guess(trained, tmp_path):
    run, found = trained
    kinds = {"joint": config.JointMatching(iterations=1), "naive": config.NaiveMatching(iterations=1), "analytic": config.Analytic()}
    run = evaluated(with_speed(run, attacks=kinds), control=True, judge_epochs=1)
    result = audit.audit(run, found, folder=tmp_path / "attacks", pictures=tmp_path / "pictures")
    controls = {row["defence"]: row for row in result.rows if row["attack_id"] == "control"}
    bounds = {bound["of"]: bound for bound in result.bounds if bound["name"] == "shuffled gradient"}
    assert controls.keys() == bounds.keys() == {"undefended", "learned"} and all(row["attack"] == "shuffled gradient" and row["of"] == "naive" for row in controls.values())
    for control, naive in zip(*([cell for cell in make_cells(run, found, tmp_path / "cells") if cell.name == name] for name in ("shuffled gradient", "naive")), strict=True):
        made, true = (Releases(run).of(cell)[0] for cell in (control, naive))
        assert control.control and "public images" in control.note and torch.equal(made.images, true.images) and torch.equal(made.labels, true.labels)
        assert not any(torch.equal(made.updates[0][name].flatten().sort().values, true.updates[0][name].flatten().sort().values) for name in ("backbone.blocks.0.conv.weight", "backbone.head.bias"))
    for name, bound in bounds.items():
        assert bound["checkpoint"] == "final" and bound["psnr_db"] == controls[name]["psnr_db"] and bound_label(bound) == f"shuffled gradient of {name}"
    assert bounds["undefended"]["psnr_db"] != bounds["learned"]["psnr_db"]
    tensors, meta = load_file(tmp_path / "pictures" / "reconstructions-final.safetensors")
    guesses = ["constant grey", "mean image", "class mean", "nearest public neighbour"]
    assert meta["titles"][1:5] == [f"no gradient:\n{name}" for name in guesses] and (tensors["001"] == 0.5).all()
    mean = run.setting.dataset.val.images.float().div(255).mean(0)
    assert torch.allclose(tensors["002"], mean.expand_as(tensors["002"]), atol=1e-5) and [len(meta["captions"][place]) for place in range(1, 5)] == [4] * 4
    for name, several in (("joint", {"x": config.Analytic(), "y": kinds["joint"]}), (None, {"x": config.Analytic()})):
        assert config.controlled(several) == (name and "y")
    recipe = dataclasses.replace(run.recipe, attacks={"x": config.Analytic()})
    assert any("evaluation.control shuffles the gradient" in text for text in config.problems(recipe))
    assert make_cells(evaluated(with_speed(run, attacks={"smoke": config.Standard(version="smoke")}), control=True), found, tmp_path)[-1].name == "smoke - shuffled gradient"


def test_a_guessed_decoder_is_trained_as_long_as_its_attack_says_and_never_longer_than_asked(trained, tmp_path, monkeypatch):
    run, found = trained
    kinds = {"guessed": config.JointMatching(decoder="surrogate"), "learned": config.LearnedInversion(steps=9, gradients=3), "short": config.JointMatching(decoder="surrogate", surrogate_steps=2)}
    asked = argparse.Namespace(iterations=None, restarts=None, labels=None, steps=4)
    attacks = {name: job._asked(name, attack, asked) for name, attack in kinds.items()}
    assert [one.surrogate_steps for one in attacks.values()] == [4, 4, 2] and (attacks["learned"].steps, attacks["learned"].gradients) == (4, 3)
    cells, steps, fit = cells_of(with_speed(run, attacks=attacks), found, tmp_path, "learned"), [], fits.fit_decoder
    monkeypatch.setattr(fits, "fit_decoder", lambda *given, **how: steps.append(how["steps"]) or fit(*given, **how))
    tasks = fits.tasks(run, cells, tmp_path)
    assert [task.cost for task in tasks] == [4, 2]
    for task in tasks:
        task.do(0, lambda units: None)
    long, same, short = (fits.surrogate(run, cell) for cell in cells)
    assert steps == [4, 2] and all(torch.equal(long[name], tensor) for name, tensor in same.items()) and any(not torch.equal(long[name], tensor) for name, tensor in short.items())
    assert [config.standard(version)["joint guessed decoder"].surrogate_steps for version in ("standard", "quick", "smoke")] == [600, 150, 2]


def reading(iterations=4, **changes):
    return config.ReadNoise(iterations=iterations, restarts=1, **changes)


def test_latents_are_read_once_for_all_who_may_and_kept_for_another_life(trained, tmp_path, monkeypatch):
    """In slices that do not depend on the number of ranks; each as by itself."""
    run, found = trained
    hasty(monkeypatch, read=True)
    monkeypatch.setattr(fits, "READ_AT_ONCE", 3)
    attacks = {"read": reading(), "guessed": reading(decoder="surrogate", surrogate_steps=2), "recovered": reading(labels="recovered")}
    run, read = with_speed(run, attacks=attacks), methods.reading
    cells, numbers = cells_of(run, found, tmp_path, "learned"), []
    monkeypatch.setattr(methods, "reading", lambda case, one, number: numbers.append(number) or read(case, one, number))
    tasks = fits.later_tasks(run, cells)
    assert [task.path.name for task in tasks] == [f"latents-{labels}-{part}.safetensors" for labels in ("known", "recovered") for part in ("00000-003", "00003-001")]
    for task in fits.tasks(run, cells, tmp_path):
        task.do(0, lambda units: None)
    done = [0.0] * len(tasks)
    for place, task in enumerate(tasks):
        task.do(0, lambda units, place=place: done.__setitem__(place, done[place] + units))
        assert 0 < done[place] <= task.cost * (1 + 1e-9)
    assert numbers == [0, 1, 2, 3] * 2
    for cell in cells:
        case = methods.make_case(run, cell.trained, cell.snapshot, cell.attack, cell.releases, seed=cell.seed, fitted=fits.fitted(run, cell, tmp_path))
        shared, numbers[:] = methods.plan(case), []
        alone = methods.plan(dataclasses.replace(case, fitted={name: one for name, one in case.fitted.items() if name != "latents"}))
        assert numbers == [0, 1, 2, 3] and shared.note == alone.note
        for one, other in zip(shared.observations, alone.observations, strict=True):
            assert torch.equal(one.labels, other.labels) and one.known.keys() == other.known.keys()
            assert all(torch.equal(tensor, other.known[name]) for name, tensor in one.known.items()) and all(torch.equal(tensor, other.update[name]) for name, tensor in one.update.items())
        assert fits.reading_seconds(run, cell) > 0
    with pytest.raises(StorageError, match="of another recipe"):
        fits.fitted(run, dataclasses.replace(cells[0], seed=1), tmp_path)


def test_a_control_reads_the_latents_of_its_own_updates(trained, tmp_path, monkeypatch):
    run, found = trained
    monkeypatch.setattr(methods, "READING", 2)
    run = of_fewer(evaluated(with_speed(run, attacks={"read": reading()}), control=True), 2)
    cells = cells_of(run, found, tmp_path, "learned")
    assert [cell.control for cell in cells] == [False, True]
    tasks = fits.later_tasks(run, cells)
    assert len({task.path for task in tasks}) == 2
    for task in tasks:
        task.do(0, lambda units: None)
    own, control = ([losses for _, losses, _ in fits.fitted(run, cell, tmp_path)["latents"]] for cell in cells)
    assert max(own) < methods.READ < min(control)


def test_latents_that_raise_while_they_are_read_fail_their_attacks_alone(trained, tmp_path, monkeypatch):
    run, found = trained
    heard = Heard()
    run = with_speed(run, heard, attacks={"naive": NAIVE, "read": reading()})
    cells = cells_of(run, found, tmp_path, "learned")

    def broken(case, one, number):
        raise ArithmeticError("the matrix is singular")
        yield 0.0

    monkeypatch.setattr(methods, "reading", broken)
    audit._attack(run, cells, tmp_path)
    assert [one.status for cell in cells for one in cell.reconstructions] == ["ok"] * 4 + ["failed"] * 4
    assert {one["error"] for one in cells[1].attempts} == {"its latents could not be read: ArithmeticError: the matrix is singular"}
    assert any("could not be read" in text for text in heard.notices)


def test_broken_attacks_are_no_guesses_of_labels(trained, tmp_path):
    run, found = trained
    [cell] = cells_of(run, found, tmp_path)
    right = [Reconstruction(torch.rand(1, 3, 16, 16), one.cpu(), 0.0, torch.zeros(1)) for one in cell.victims.labels]
    wrong = dataclasses.replace(right[0], labels=(right[0].labels + 1) % 8)
    broken = inversions.failures(cell, "it broke")
    broken = [dataclasses.replace(one, labels=torch.zeros_like(one.labels)) for one in broken]
    scorer = Scorer(run, make_judge(8, (3, 16, 16), seed=0).eval())
    for reconstructions, expected in (([wrong, *right[1:]], 0.75), ([wrong, right[1], *broken[2:]], 0.5), (broken, None)):
        cell.reconstructions = reconstructions
        [row] = findings.rows(run, [cell], {id(cell): scorer.score(cell.victims, reconstructions)})
        assert row["label_recovery"] == expected and row["failed"] == sum(one.status == "failed" for one in reconstructions)
    other = dataclasses.replace(cell, seed=1, reconstructions=[right[0], *broken[1:]])
    cell.reconstructions = [wrong, right[1], *broken[2:]]
    [row] = findings.rows(run, [cell, other], {id(one): scorer.score(cell.victims, one.reconstructions) for one in (cell, other)})
    assert row["label_recovery"] == 0.75  # ½ of the first victim, 1 of the second


def test_an_attack_of_two_stages_keeps_the_curve_the_candidates_and_the_first_fit_of_both(trained, tmp_path):
    run, found = trained
    run = with_speed(run, attacks={"generative": config.GenerativePrior(iterations=10, code=64)})
    cells, fitted = cells_of(run, found, tmp_path, "undefended"), {"generator": decoder_for((64,), -1, (3, 16, 16), size="loop", seed=0)}
    for task in inversions.matching_tasks(run, cells, lambda cell: fitted, tmp_path):
        task.do(0, lambda units: None)
    inversions.collect(run, cells[0])
    plan = methods.plan(methods.make_case(run, cells[0].trained, cells[0].snapshot, cells[0].attack, cells[0].releases, seed=0, fitted=fitted))
    chunk = tuple((observation, 0) for observation in range(4))
    codes = drain(run_chunk(chunk, plan.observations, plan.make_simulate(), plan.matching, seed=0))
    pixels = drain(run_chunk(chunk, plan.observations, plan.make_simulate(), methods.refined(plan, codes), seed=0))
    for row, (one, attempt) in enumerate(zip(cells[0].reconstructions, cells[0].attempts, strict=True)):
        torch.testing.assert_close(one.losses, torch.cat([codes["losses"][row], pixels["losses"][row, 1:]]), rtol=1e-3, atol=1e-4)
        assert len(one.losses) == 11 and one.iterations == attempt["iterations"] == 4 + 8 and len(one.snapshots) == methods.SNAPSHOTS
        assert one.first_fit == pytest.approx(float(codes["first_fit"][row]), rel=1e-4) and one.fit == pytest.approx(float(pixels["fit"][row]), rel=1e-2)
        torch.testing.assert_close(one.snapshots[1].float(), codes["images"][row], atol=2e-3, rtol=0)  # the best code's image, before pixels
    long = [{**part, "losses": torch.linspace(*ends, 200).expand(4, -1)} for part, ends in ((codes, (0.0, 300.0)), (pixels, (300.0, 1000.0)))]
    long[1] |= {"failure": torch.tensor([0, 3, 1, 0]), "failed_at": torch.tensor([0, 5, 0, 0])}  # lost in the second stage; a zero update
    joined = attacks.joined(long, [300, 700])
    torch.testing.assert_close(joined["losses"], torch.linspace(0, 1000, 200).expand(4, -1), atol=2.5, rtol=0)  # evenly, to a point of the longer stage
    assert joined["failed_at"].tolist() == [0, 305, 0, 0]
    # the first is lost in the first stage, the second in both, the third at the second's beginning: what it had found before is kept
    stages = [dict(part) for part in (codes, pixels)]
    stages[0] |= {"failure": torch.tensor([3, 3, 0, 0]), "failed_at": torch.tensor([2, 1, 0, 0])}
    stages[1] |= {"failure": torch.tensor([0, 3, 3, 0]), "failed_at": torch.tensor([0, 4, 0, 0]), "loss": torch.where(torch.arange(4) == 2, torch.inf, pixels["loss"])}
    joined = attacks.joined(stages, [3, 7])
    assert joined["failure"].tolist() == [3, 3, 3, 0] and joined["failed_at"].tolist() == [2, 1, 3, 0]
    for name in ("images", "loss", "fit", "labels"):
        torch.testing.assert_close(joined[name], torch.stack([codes[name][2] if row == 2 else pixels[name][row] for row in range(4)]))


def test_both_stages_of_an_attack_are_recorded_once_whatever_the_chunks_and_give_the_loop_s_numbers(trained, tmp_path, monkeypatch):
    run, found = trained
    generator, made, kept = decoder_for((64,), -1, (3, 16, 16), size="loop", seed=0), [], {}
    monkeypatch.setattr(attacks.Programs, "_make", lambda self, program, *given: made.append(1) or program)  # recording takes seconds, and is tested elsewhere
    for mode in ("loop", "traced"):
        own = with_speed(run, attacks={"generative": config.GenerativePrior(iterations=4, code=64)}, attack_mode=mode, attacks_at_once=3)
        [cell] = cells_of(own, found, tmp_path / mode)
        made.clear()
        tasks = inversions.matching_tasks(own, [cell], lambda cell: {"generator": generator}, tmp_path / mode)
        for task in tasks:
            task.do(0, lambda units: None)
        assert len(tasks) == 2 and len(made) == (0 if mode == "loop" else 2), (mode, made)
        inversions.collect(own, cell)
        kept[mode] = cell.reconstructions
    for one, other in zip(*kept.values(), strict=True):
        assert one.status == other.status == "ok" and one.iterations == other.iterations == 6
        for name in ("images", "losses"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-3, atol=1e-3)
    images = torch.cat([one.images for one in kept["loop"]])
    assert float((images - images[:1]).flatten(1).abs().amax(1)[1:].min()) > 0.01  # each victim's are its own: a chunk cannot have begun at another's


def test_an_ensemble_counts_the_worst_case_of_what_did_not_fail_with_and_without_bounds(trained, tmp_path):
    run, found = trained
    run = with_speed(run, attacks={"smoke": config.Standard(version="smoke")})
    cells = cells_of(run, found, tmp_path, "learned")
    truth = cells[0].victims.images
    good = {"naive": 0.3, "joint": 0.1, "decoder": 0.05}  # of these the images are the truth, so far off; the others give its negative, worse than grey
    for cell in cells:
        far = good.get(cell.name.removeprefix("smoke - "))
        images = 1 - truth if far is None else torch.where(truth > 0.5, truth - far, truth + far)
        cell.reconstructions = [Reconstruction(one.clone(), labels, 0.0, torch.zeros(1)) for one, labels in zip(images, cell.victims.labels, strict=True)]
        failed = inversions.failures(cell, "it broke")
        if cell.name.removeprefix("smoke - ") in good:
            cell.reconstructions[0] = failed[0]  # of the first victim only the worse than grey are left
        cell.reconstructions[3] = failed[3]
        if far == 0.05:
            cell.reconstructions[2] = failed[2]
    scorer = Scorer(run, make_judge(8, (3, 16, 16), seed=0).eval())
    scored = {id(cell): scorer.score(cell.victims, cell.reconstructions) for cell in cells}
    grey = metrics.psnr_db(torch.full_like(truth, 0.5).flatten(0, 1), truth.flatten(0, 1))
    negative = metrics.psnr_db((1 - truth).flatten(0, 1), truth.flatten(0, 1))
    assert float(negative[0]) < float(grey[0])  # the failed ones' grey would win
    fair, whole = [row for row in findings.rows(run, cells, scored) if row["attack_id"] == "standard"]
    naive = [max(-20 * math.log10(0.3), float(negative[victim])) for victim in range(4)]
    for row, second, third in ((whole, -20 * math.log10(0.05), 20.0), (fair, naive[1], naive[2])):
        assert row["psnr_db"]["mean"] == pytest.approx((float(negative[0]) + second + third + float(grey[3])) / 4, abs=1e-4), row["attack"]
        assert row["failed"] == 1 and sum(row["worst_by"].values()) == 3 and "none 1, where all failed" in row["note"]
    assert whole["worst_by"]["decoder"] == whole["worst_by"]["joint"] == 1 and not {"decoder", "joint"} & fair["worst_by"].keys()
    assert whole["attack"] == "smoke" and fair["attack"] == "smoke without bounds" and set(fair["without"]) == {"decoder", "joint", "joint smooth", "joint smoother", "read noise", "rounds"}
    assert whole["threat"]["beyond"]["decoder"] == ["is given the latent"] and whole["threat"]["beyond"]["joint"] == ["knows the private decoder"]
    assert "bounds beyond that: joint knows the private decoder" in whole["threat"]["name"] and "beyond" not in fair["threat"]
    assert "2 releases" in whole["threat"]["name"] and "releases" not in fair["threat"]["name"] and fair["members"] == whole["members"] - 6


def test_the_joint_attack_smooths_less_where_there_is_noise_to_search_unless_it_is_told_how_much(trained, tmp_path):
    run, found = trained
    kinds = {"naive": config.NaiveMatching(), "joint": config.JointMatching(), "smooth": config.JointMatching(tv=3e-3), "zeroed": config.ZeroedLevel(), "told": config.JointMatching(tv=0.5)}
    run = with_speed(run, attacks=kinds)
    for defence, expected in (("learned", {"naive": 3e-3, "joint": 1e-3, "smooth": 3e-3, "zeroed": 3e-3, "told": 0.5}), ("undefended", {"naive": 3e-3, "joint": 3e-3, "smooth": 3e-3, "told": 0.5})):
        cells = cells_of(run, found, tmp_path, defence)
        plans = {cell.name: methods.plan(methods.make_case(run, cell.trained, cell.snapshot, cell.attack, cell.releases, seed=cell.seed)) for cell in cells}
        assert {name: plan.matching.tv for name, plan in plans.items()} == expected
        assert {cell.name: cell.twin and cell.twin.name for cell in cells if cell.twin} == ({} if defence == "learned" else {"joint": "naive", "smooth": "naive"})
    members = {version: config.standard(version) for version in ("standard", "quick", "smoke")}
    for one in members.values():
        assert [config.weight_of_variation(one[name], noise=True) for name in ("naive", "joint", "joint smooth", "joint smoother")] == [3e-3, 1e-3, 3e-3, 1e-2]


@pytest.mark.parametrize(
    "change", [{"tv": 0.5}, {"batch_size": 2}, {"release": "delta"}, {"local_lr": 0.3}, {"num_victims": 3}, {"released_loss": "utility"}], ids=lambda change: next(iter(change))
)  # fmt: skip
def test_results_of_another_recipe_are_refused(trained, tmp_path, change):
    run, found = trained
    finish(run, cells_of(run, found, tmp_path), tmp_path, only=1)
    other = with_speed(run, attacks={"naive": dataclasses.replace(NAIVE, **change)}) if "tv" in change else evaluated(run, **change)
    with pytest.raises(InputError, match="another recipe"):
        tasks_of(other, cells_of(other, found, tmp_path), tmp_path)


def test_a_control_s_results_are_no_attack_s_and_a_control_beside_it_is_no_other_recipe(trained, tmp_path):
    run, found = trained
    [cell] = cells_of(run, found, tmp_path)
    control = dataclasses.replace(cell, control=True)
    marks = {mark(run, one) for one in (cell, control, dataclasses.replace(cell, seed=1), dataclasses.replace(cell, checkpoint="best"), dataclasses.replace(cell, defence="other"))}
    assert len(marks) == 5 and mark(evaluated(run, control=True), cell) == mark(evaluated(run, control=False), cell)
    finish(run, [cell], tmp_path, only=1)
    with pytest.raises(InputError, match="another recipe"):
        tasks_of(run, [control], tmp_path)


def test_a_damaged_result_is_named(trained, tmp_path):
    run, found = trained
    cells = cells_of(run, found, tmp_path)
    finish(run, cells, tmp_path, only=1)
    [path] = sorted(cells[0].folder.glob("attacks-*"))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match=path.name):
        tasks_of(run, cells_of(run, found, tmp_path), tmp_path)


def test_a_calibration_is_kept_in_the_run_s_folder_and_not_taken_twice(trained, tmp_path, monkeypatch):
    run, found = trained
    heard = Heard()
    run = with_speed(run, heard, attacks_at_once=0, attack_mode="auto")
    monkeypatch.setattr(inversions, "SHORT_S", 0.0)
    [cell] = cells_of(run, found, tmp_path)
    tasks_of(run, [cell], tmp_path)
    kept = json.loads((tmp_path / "calibration.json").read_text())
    [one] = kept.values()
    assert [candidate["mode"] for candidate in one["candidates"]][0] == "vmap" and len(one["candidates"]) > 1 and one["at_once"] == cell.calibration.at_once
    assert sum("<- chosen" in line for line in heard.said) == 1

    def never(*arguments, **options):
        raise AssertionError("it was calibrated before")

    monkeypatch.setattr(inversions.attacks, "calibrate", never)
    [again] = cells_of(run, found, tmp_path)
    tasks_of(run, [again], tmp_path)
    assert again.calibration == Calibration.from_json(one)
    assert sum("<- chosen" in line for line in heard.said) == 1  # nor told twice


def test_a_calibration_serves_only_attacks_whose_program_is_the_same(trained, tmp_path):
    run, found = trained

    def key(chosen, attack=NAIVE, net="undefended", progress=None, **evaluation):
        own = evaluated(run, **evaluation)
        defence = build.make_defence(chosen, own.recipe, own.setting.dataset, seed=0)
        one = dataclasses.replace(found[net, 0], training=dataclasses.replace(found[net, 0].training, defence=defence))
        snapshot = one.snapshots["final"] if progress is None else dataclasses.replace(one.snapshots["final"], progress=progress)
        cell = Cell(net, 0, "final", "one", attack, one, snapshot, tmp_path, releases=[observe.release(own, one, snapshot, seed=0)])
        return inversions._key(own, cell, methods.plan(methods.make_case(own, one, snapshot, attack, cell.releases, seed=0)))

    plain, joint = key(Undefended()), config.JointMatching(decoder="unused")
    assert key(config.SecureAggregation()) != plain  # three clients' images in an attack
    assert key(Undefended(), batch_size=2, num_victims=8) != plain and key(Undefended(), release="delta", local_epochs=2) != key(Undefended(), release="delta")
    assert key(config.Pruning()) == key(config.Pruning(share=0.5)) == plain  # which this attack overlooks
    adaptive = key(Undefended(), joint)
    changed = [key(chosen, joint) for chosen in (config.Pruning(), config.Clipping(), config.MixUp(), (config.MixUp(), config.Pruning()))]
    assert len({adaptive, *changed}) == 5
    whole = config.JointMatching()
    terms = [key(chosen, whole) for chosen in (Undefended(), config.BiDO(), config.BiDO(measure="coco"), config.BiDO(x_weight=0.0))]
    assert len(set(terms)) == 4 and key(config.BiDO(x_weight=0.1), whole) == terms[1]  # another weight is the same program
    ramped = LearnedPerturbation(ramp=0.5)
    early, half, late = (key(ramped, whole, "learned", progress) for progress in (0.0, 0.25, 1.0))
    assert early != half == late and key(ramped, NAIVE, "learned", 0.0) == key(ramped, NAIVE, "learned", 1.0)


def test_low_precision_is_used_only_behind_its_gate(trained, tmp_path, monkeypatch):
    run, found = trained
    heard = Heard()
    run = with_speed(run, heard, attack_precision="bfloat16")
    [cell] = cells_of(run, found, tmp_path)
    shift = parity.shift_db(run, cell, "bfloat16", mode="vmap", at_once=8)
    assert shift != 0.0 and abs(shift) < 1.0
    for measured, used in ((0.05, "bfloat16"), (-0.3, "float32"), (0.3, "float32"), (None, "float32")):
        monkeypatch.setattr(parity, "shift_db", lambda *a, measured=measured, **k: measured)
        path = tmp_path / f"{measured}.json"
        assert parity.gated(run, cell, mode="vmap", at_once=2, path=path) == used
        monkeypatch.setattr(parity, "shift_db", lambda *a, **k: 1 / 0)
        assert parity.gated(run, cell, mode="vmap", at_once=2, path=path) == used  # as it was measured
    assert [len([text for text in heard.notices if told in text]) for told in ("-0.30 dB", "+0.30 dB")] == [2, 2] and any("num_tuning" in text for text in heard.notices)
    run = with_speed(run, heard, attack_precision="tf32")
    assert parity.gated(run, cell, mode="vmap", at_once=2, path=path) == "float32" and "no TF32" in heard.notices[-1]


def test_attacks_run_in_the_precision_that_the_gate_lets_through(trained, tmp_path, monkeypatch):
    run, found = trained
    used, climb = [], inversions.climb
    monkeypatch.setattr(inversions, "climb", lambda *given, **how: used.append(how["precision"]) or climb(*given, **how))
    for verdict in ("float32", "bfloat16"):
        monkeypatch.setattr(parity, "gated", lambda *given, verdict=verdict, **how: verdict)
        own = with_speed(run, attack_precision="bfloat16")
        finish(own, cells_of(own, found, tmp_path / verdict), tmp_path / verdict, only=1)
    assert used == ["float32", "bfloat16"]


def test_the_gate_looks_at_images_kept_for_tuning_and_never_at_the_victims(trained, tmp_path):
    run, found = trained
    [cell] = cells_of(run, found, tmp_path)
    images, roles = run.setting.dataset.train.images, run.setting.roles
    kept = images.clone()

    def shift(rows):
        try:
            images[rows] = 255 - images[rows]
            return parity.shift_db(run, cell, "bfloat16", mode="vmap", at_once=8)
        finally:
            images.copy_(kept)

    before = shift([])
    assert before != 0.0 and shift(roles.victims) == before and shift(roles.tuning) != before


def test_a_gate_s_verdict_is_of_its_precision_seed_and_device_alone(trained, tmp_path, monkeypatch):
    """What a run that is resumed takes over."""
    run, found = trained
    [cell] = cells_of(run, found, tmp_path)
    path, asked = tmp_path / "parity.json", []
    old = hashlib.sha256(json.dumps([config.to_json(cell.attack), cell.defence, cell.checkpoint]).encode()).hexdigest()[:16]
    path.write_text(json.dumps({old: 0.0}))  # as kept before the precision was in the name

    def shift(run, cell, precision, **options):
        asked.append((precision, cell.seed, cell.checkpoint, run.world.device.type))
        return {"tf32": 0.01, "bfloat16": -0.8}[precision] / (1 + 9 * cell.seed)

    monkeypatch.setattr(parity, "shift_db", shift)

    def gated(precision, seed=0, device="cpu", **changes):
        heard = Heard()
        own = with_speed(run, heard, attack_precision=precision)
        own = dataclasses.replace(own, world=dataclasses.replace(own.world, device=torch.device(device)))
        used = parity.gated(own, dataclasses.replace(cell, seed=seed, **changes), mode="vmap", at_once=2, path=path)
        return used, re.findall(r"[+-]\d\.\d\d dB", " ".join([*heard.said, *heard.notices]))

    first = [("tf32", 0, "cuda"), ("bfloat16", 0, "cuda"), ("bfloat16", 1, "cuda"), ("bfloat16", 0, "cpu")]
    for _ in range(2):  # the second time as it was measured
        said = [gated(*one) for one in first]
        assert said == [("tf32", ["+0.01 dB"]), ("float32", ["-0.80 dB"]), ("bfloat16", ["-0.08 dB"]), ("float32", ["-0.80 dB"])]
        assert asked == [(precision, seed, "final", device) for precision, seed, device in first]
    gated("bfloat16", control=True)
    assert len(asked) == 4  # a control attacks as the attack does that it is of
    gated("bfloat16", checkpoint="early")
    gated("bfloat16", attack=dataclasses.replace(NAIVE, iterations=5))
    assert len(asked) == 6


def test_the_naive_attack_s_result_serves_for_the_joint_one_where_there_is_no_noise(trained, tmp_path):
    run, found = trained
    joint = config.JointMatching(**{spec.name: getattr(NAIVE, spec.name) for spec in dataclasses.fields(NAIVE)})
    run = with_speed(run, attacks={"naive": NAIVE, "joint": joint, "eot": config.EotMatching(iterations=4)})
    undefended, learned = (make_cells(run, {key: one}, tmp_path) for key, one in found.items())
    assert [cell.name for cell in undefended] == ["naive", "joint"] and undefended[1].twin is undefended[0]
    assert [(cell.name, cell.twin) for cell in learned] == [("naive", None), ("joint", None), ("eot", None)]


CHANGED = (
    config.Pruning(), config.Clipping(), config.Sign(), config.GradientNoise(), config.DPSGD(noise_multiplier=1.0, target_epsilon=None, accountant="rdp"),
    config.DPSGD(level="client", noise_multiplier=1.0, target_epsilon=None, accountant="rdp"),
)  # fmt: skip


@pytest.mark.parametrize("chosen", [Undefended(), *CHANGED], ids=lambda one: type(one).__name__)
def test_who_simulates_a_change_of_updates_does_other_work_than_the_naive_attack(trained, tmp_path, chosen):
    run, found = trained
    joint = config.JointMatching(**{spec.name: getattr(NAIVE, spec.name) for spec in dataclasses.fields(NAIVE)})
    run, one = with_speed(run, attacks={"naive": NAIVE, "joint": joint}), found["undefended", 0]
    defence = build.make_defence(chosen, run.recipe, run.setting.dataset, seed=0, spends=build.privacy_budget(run.setting, chosen, seed=0))
    one = dataclasses.replace(one, training=dataclasses.replace(one.training, defence=defence))
    cells = {cell.name: cell for cell in make_cells(run, {("undefended", 0): one}, tmp_path)}
    assert cells["naive"].twin is None and cells["joint"].twin is (cells["naive"] if chosen == Undefended() else None)


def test_when_nothing_else_fits_the_naive_attack_runs_on_the_module_itself(trained, tmp_path, monkeypatch):
    run, found = trained
    heard = Heard()
    run = with_speed(run, heard)
    [cell] = cells_of(run, found, tmp_path)
    monkeypatch.setattr("gidef.attack.ladder.run_chunk", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    finish(run, [cell], tmp_path, only=1)
    assert "on the module itself" in heard.notices[-1]
    [path] = cell.folder.glob("attacks-*")
    rows, _ = inversions.load_marked(path, inversions.mark(run, cell))
    assert rows["attacks"].tolist() == [[0, 0], [0, 1]] and (rows["loss"] < rows["losses"][:, 0]).all() and not rows["failure"].any()


def on_the_module(run, found, folder, monkeypatch, attack, defence):
    """(the rows of the vectorised program, those of the module itself)."""
    run = with_speed(run, attacks={"one": attack})
    rows = []
    for name in ("vectorised", "module"):
        if name == "module":
            monkeypatch.setattr("gidef.attack.ladder.run_chunk", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
        [cell] = cells_of(run, found, folder / name, defence)
        finish(run, [cell], folder / name, only=1)
        [path] = cell.folder.glob("attacks-*")
        rows.append(inversions.load_marked(path, inversions.mark(run, cell))[0])
    return rows


def test_the_joint_attack_runs_on_the_module_itself_over_images_and_noise(trained, tmp_path, monkeypatch):
    attack = config.JointMatching(decoder="unused", iterations=3, labels="recovered")
    expected, rows = on_the_module(*trained, tmp_path, monkeypatch, attack, "learned")
    assert rows["noise"].shape == expected["noise"].shape and (rows["noise"] != 0).any()
    for name, tolerance in (("images", 1e-3), ("noise", 1e-3)):
        assert float((rows[name] - expected[name]).abs().median()) < tolerance < 0.05 < float((rows["images"] - rows["images"][0, 0]).abs().max())
    torch.testing.assert_close(rows["losses"], expected["losses"], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("defence", "attack", "fits"),
    [
        ("undefended", config.JointMatching(), True),
        ("undefended", config.InvertingGradients(), True),
        ("learned", config.JointMatching(decoder="unused"), True),
        ("learned", config.JointMatching(), False),  # the released loss has the decoder in it
        ("learned", config.DecoderAware(decoder="unused"), False),
        ("learned", config.EotMatching(), False),
        ("undefended", config.DeepLeakage(), False),
    ],
)
def test_the_module_itself_is_attacked_only_where_one_gradient_of_the_cross_entropy_is_all(trained, tmp_path, defence, attack, fits):
    run, found = trained
    run = with_speed(run, attacks={"one": attack})
    [cell] = cells_of(run, found, tmp_path, defence)
    plan = methods.plan(methods.make_case(run, cell.trained, cell.snapshot, cell.attack, cell.releases, seed=0))
    assert inversions.on_itself(run, cell, plan) is fits
    if defence == "learned" and fits:  # changes that the attack would have to simulate
        changed = build.make_defence((LearnedPerturbation(), config.Pruning()), run.recipe, run.setting.dataset, seed=0)
        cell.trained = dataclasses.replace(cell.trained, training=dataclasses.replace(cell.trained.training, defence=changed))
        assert not inversions.on_itself(run, cell, plan)


@pytest.mark.parametrize(("cut", "safe"), [("blocks.0", True), ("blocks.1.norm", False), ("before:head", True)])
def test_blocks_are_computed_again_only_where_the_latent_is_not_inside_of_one(trained, cut, safe):
    run, _ = trained
    for chosen, expected in ((LearnedPerturbation(cut=cut), safe), (Undefended(), True)):
        assert inversions.recomputable(build.make_defence(chosen, run.recipe, run.setting.dataset, seed=0).model) is expected


@pytest.mark.parametrize(("steps", "epochs", "least_db"), [(1, 1, 40), (2, 1, 30), (2, 2, 30)])
def test_an_imprint_block_gives_images_away_by_gradients_and_by_deltas_of_several_steps(trained, tmp_path, steps, epochs, least_db):
    run, found = trained
    delta = {"release": "delta", "local_steps": steps, "local_epochs": epochs, "local_lr": 0.01}
    evaluation = dataclasses.replace(run.recipe.evaluation, batch_size=4, **(delta if steps > 1 else {}))
    recipe = dataclasses.replace(run.recipe, evaluation=evaluation, attacks={"imprint": config.ImprintServer(bins=64)})
    assert config.problems(recipe) == []
    run = dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe))
    [cell] = cells_of(run, found, tmp_path)
    [one] = applications._imprinted(run, cell)(range(len(cell.victims.rows)), lambda units: None)
    truth = cell.victims.images[0]
    apart = (one.images[:, None].clamp(0, 1) - truth[None].to(one.images)).square().mean((2, 3, 4)).amin(0)
    assert one.status == "ok" and int((-10 * apart.clamp(min=1e-12).log10() > least_db).sum()) >= 3
