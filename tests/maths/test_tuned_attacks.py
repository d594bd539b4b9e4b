"""Attacks whose settings are chosen on held-out images: against a plain loop, blind to the victims, taken up again. Small synthetic cells, one round."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json

import pytest
import torch

from gidef import attack as attacks
from gidef import audit, cells, config, job, methods, observe, tuned_attacks
from gidef.config import IsotropicNoise, JointMatching, NaiveMatching, Tuned, Undefended
from gidef.errors import InputError
from gidef.rng import stream_seed
from tests.small_run import RECIPE, Heard, trained_once

GRID = {"lr": (0.003, 0.1), "tv": (1e-3, 0.3)}
NAIVE = NaiveMatching(iterations=6)
ATTACKS = {"naive": Tuned(attack=NAIVE, grid=GRID), "joint": Tuned(attack=JointMatching(iterations=2), grid={"noise_lr": (0.03, 3.0)})}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    recipe = dataclasses.replace(
        RECIPE, defences={"undefended": Undefended(), "noise": IsotropicNoise(std=0.5)}, attacks=ATTACKS,
        evaluation=dataclasses.replace(RECIPE.evaluation, num_tuning=5, judge_epochs=1), speed=dataclasses.replace(RECIPE.speed, attack_mode="vmap", attacks_at_once=8),
    )  # fmt: skip
    with trained_once(tmp_path_factory.mktemp, recipe) as one:
        run, _ = one("undefended")
        yield run, {(name, 0): one(name)[1] for name in recipe.defences}


def with_attacks(run, given, **changes):
    recipe = dataclasses.replace(run.recipe, attacks=given)
    return dataclasses.replace(run, setting=dataclasses.replace(run.setting, recipe=recipe), **changes)


def audited(run, trained, folder):
    found = audit.audit(run, trained, folder=folder, pictures=folder / "pictures")
    return {(row["defence"], row["attack"]): row for row in found.rows}


@pytest.fixture(scope="module")
def rows(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    run, found = trained
    heard = Heard()
    return audited(dataclasses.replace(run, console=heard), found, folder), folder, heard


def psnr_by_hand(images, truth):
    """Of a batch in the order that fits best, capped like the library's."""
    def of(order):
        errors = (images[list(order)].double() - truth.double()).square().flatten(1).mean(1)
        return sum(-10 * torch.log10(errors)) / len(truth), errors.sum()

    return min((of(order) for order in itertools.permutations(range(len(truth)))), key=lambda one: one[1])[0].item()


def test_the_setting_is_the_best_of_a_plain_loop_over_the_tuning_images(trained, rows):
    run, found = trained
    taken, _, heard = rows
    held = dataclasses.replace(run, setting=dataclasses.replace(run.setting, roles=dataclasses.replace(run.setting.roles, victims=run.setting.roles.tuning[:4])))
    for defence in ("undefended", "noise"):
        one = found[defence, 0]
        release = observe.release(held, one, one.snapshots["final"], seed=stream_seed(0, "tuning"))
        assert not set(release.rows.flatten().tolist()) & set(run.setting.roles.victims.tolist()) and release.rows.shape == (2, 2)
        values = {}
        for lr, tv in itertools.product(*GRID.values()):
            attack = dataclasses.replace(NAIVE, lr=lr, tv=tv)
            plan = methods.plan(methods.make_case(held, one, one.snapshots["final"], attack, [release], seed=0))
            guessed = attacks.run(plan.observations, plan.make_simulate, plan.matching, seed=0, mode="vmap", at_once=8)
            values[lr, tv] = sum(psnr_by_hand(guess.images, truth) for guess, truth in zip(guessed, release.images, strict=True)) / 2
        best = max(values, key=values.get)
        told = taken[defence, "naive"]["tuned"]
        assert told["setting"] == {"lr": best[0], "tv": best[1]} and told["images"] == 4
        assert {(t["setting"]["lr"], t["setting"]["tv"]): t["psnr_db"] for t in told["tried"]} == pytest.approx(values, abs=0.02)
        assert max(values.values()) - sorted(values.values())[-2] > tuned_attacks.SAME_DB and told["psnr_db"] == max(t["psnr_db"] for t in told["tried"])
        assert f"tuned on 4 held-out images: lr = {best[0]:g}, tv = {best[1]:g}" in taken[defence, "naive"]["note"]
        assert any(text.startswith(f"{defence} / naive / final: tuned on 4") for text in heard.said)


def test_the_victims_get_the_attack_of_that_setting(trained, rows, tmp_path):
    run, found = trained
    taken, *_ = rows
    here = {name: taken["noise", name] for name in ATTACKS}
    plain = with_attacks(run, {name: ATTACKS[name].at(row["tuned"]["setting"]) for name, row in here.items()})
    for (_, name), again in audited(plain, {("noise", 0): found["noise", 0]}, tmp_path).items():
        assert again["psnr_db"] == here[name]["psnr_db"] and again["iterations"] == here[name]["iterations"] and "tuned" not in again and "tuned" not in again["note"]
        assert here[name]["victims"] == 4


def test_the_choice_does_not_look_at_the_victims(trained, rows, tmp_path):
    run, found = trained
    taken, *_ = rows
    before = {place: row["tuned"] for place, row in taken.items()}
    setting, images = run.setting, run.setting.dataset.train.images
    others = [row for row in setting.roles.judge.tolist() if row not in setting.roles.victims.tolist()][:4]
    swapped = dataclasses.replace(run, setting=dataclasses.replace(setting, roles=dataclasses.replace(setting.roles, victims=torch.tensor(others[::-1]))))
    kept = images.clone()
    images[setting.roles.victims] = 255 - images[setting.roles.victims]
    try:
        chosen = tuned_attacks.choose(swapped, found, folder=tmp_path, attack=audit._attack)
        assert {(defence, name): told["setting"] for (defence, _, name), told in chosen.items()} == {place: told["setting"] for place, told in before.items()}
        for (defence, _, name), told in chosen.items():
            assert [tried["psnr_db"] for tried in told["tried"]] == [tried["psnr_db"] for tried in before[defence, name]["tried"]]
    finally:
        images.copy_(kept)


def test_a_tuning_is_taken_up_where_it_was_and_finished_ones_are_left_alone(trained, rows):
    run, found = trained
    taken, folder, _ = rows
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("attacks-*.safetensors")}
    gone = sorted(path for path in files if "tuning" in path.parts)[::3]
    for path in gone:
        path.unlink()
    again = audited(run, found, folder)
    assert {place: row["tuned"]["setting"] for place, row in again.items()} == {place: row["tuned"]["setting"] for place, row in taken.items()}
    assert {place: row["psnr_db"] for place, row in again.items()} == {place: row["psnr_db"] for place, row in taken.items()}
    assert gone and all(path.exists() if path in gone else path.stat().st_mtime_ns == stamp for path, stamp in files.items())
    told = json.loads((folder / "tuning" / tuned_attacks.FILE).read_text())
    assert {(one["defence"], one["attack"]): one["setting"] for one in told} == {place: row["tuned"]["setting"] for place, row in taken.items()}


def test_the_noise_of_the_tuning_releases_is_not_the_victims_own(trained):
    run, found = trained
    one = found["noise", 0]
    noises = [observe.release(run, one, one.snapshots["final"], seed=seed).noise[0] for seed in (0, stream_seed(0, "tuning"))]
    assert not torch.equal(*noises)


def test_seeds_are_pooled_and_of_equals_the_first_of_the_grid_is_taken(monkeypatch):
    values = {("a", 0): 20.0, ("a", 1): 10.0, ("b", 0): 12.0, ("b", 1): 21.0, ("c", 0): 16.5, ("c", 1): 16.505}
    victims = argparse.Namespace(rows=torch.zeros(2, 3))
    made = [argparse.Namespace(name=name, seed=seed, seconds=1.0, victims=victims, reconstructions=[argparse.Namespace(status="failed")] * (name == "c")) for name, seed in values]
    monkeypatch.setattr(tuned_attacks, "_psnr_db", lambda cell: values[cell.name, cell.seed])
    told = tuned_attacks._best(made, {name: {"lr": name} for name in "abc"}, images=6)
    assert told["setting"] == {"lr": "b"} and told["psnr_db"] == 16.5 and told["seconds"] == 6.0
    assert [(one["setting"]["lr"], one["psnr_db"], one["failed"]) for one in told["tried"]] == [("a", 15.0, 0), ("b", 16.5, 0), ("c", pytest.approx(16.5025), 6)]


def test_a_setting_at_the_grid_s_edge_is_said():
    tried = [{"setting": {"lr": lr, "tv": tv}, "psnr_db": 10.0 + lr, "failed": 0} for lr in (0.1, 0.2, 0.3) for tv in (0.0, 1.0)]
    said = tuned_attacks.words({"setting": {"lr": 0.3, "tv": 0.0}, "psnr_db": 10.3, "images": 8, "tried": tried})
    assert said == "tuned on 8 held-out images: lr = 0.3, tv = 0 (10.3 dB there, 6 settings from 10.1 to 10.3 dB), lr at the grid's edge"
    assert "edge" not in tuned_attacks.words({"setting": {"lr": 0.2, "tv": 0.0}, "psnr_db": 10.2, "images": 8, "tried": tried})


def test_a_tuned_attack_that_has_nothing_to_attack_is_left_out_and_told_once(trained, tmp_path):
    run, found = trained
    heard = Heard()
    run = with_attacks(run, {"eot": Tuned(attack=config.EotMatching(iterations=2), grid={"lr": (0.1, 0.2)})}, console=heard)
    chosen = tuned_attacks.choose(run, {("undefended", 0): found["undefended", 0]}, folder=tmp_path, attack=audit._attack)
    assert chosen == {} and heard.notices == []
    assert cells.make_cells(run, {("undefended", 0): found["undefended", 0]}, tmp_path, tuned=chosen) == []
    assert [text for text in heard.notices if "eot was left out" in text] == heard.notices != []
    assert cells.effort(run.recipe.attacks["eot"]) == "2 iterations, 1 start, the best of 2 settings on images kept for tuning"


def asked(**given):
    return argparse.Namespace(**{"iterations": None, "restarts": None, "labels": None, "steps": None} | given)


def test_a_command_s_budget_reaches_the_attack_within_and_not_what_is_sought():
    tuned = Tuned(attack=NAIVE, grid={"restarts": (1, 2)})
    assert job._asked("naive", tuned, asked(iterations=5)) == Tuned(attack=dataclasses.replace(NAIVE, iterations=5), grid=tuned.grid)
    with pytest.raises(InputError, match="--restarts"):
        job._asked("naive", tuned, asked(restarts=3))
