"""The recipes of the comparison: all of them are sound on paper; their small forms run in the marker `slow`. Synthetic cells unless GIDEF_DATA is set."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import runpy

import pytest

from gidef import build
from gidef.config import BiDO, Matched, Recipe, problems
from gidef.data import medmnist_sets, synthetic_blood_cells
from tests.ranks.launch import ROOT, results, run

MAIN = ("paper_table", "ablation", "adaptive", "combinations", "bido_grid", "attackers_and_judges", "schedules_of_play")
SWEEPS = ("certificate", "strength", "architectures", "heterogeneity", "participation", "share_policy", "privacy_budget", "modalities", "robust")


def declared(name, monkeypatch):
    """Full and small rows of a recipe, by name."""
    seen = {}

    def record(full, *, small=None):
        seen["full"], seen["small"] = (one if isinstance(one, dict) else {"": one} for one in (full, small))

    monkeypatch.setattr("gidef.main.main", record)
    monkeypatch.setattr("gidef.main.sweep", record)
    page = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="page")
    if name == "modalities":
        record(page["rows"](page["RECIPE"], list(page["SETS"])), small=page["rows"](page["SMALL"], list(page["SETS"])))
    return seen


@pytest.mark.parametrize("name", MAIN + SWEEPS)
def test_a_recipe_is_sound_in_both_forms(name, monkeypatch):
    for rows in declared(name, monkeypatch).values():
        assert rows
        for row, recipe in rows.items():
            assert isinstance(recipe, Recipe) and problems(recipe) == [], (row, problems(recipe))
            assert recipe.attacks and len(recipe.chosen) > 1


def test_every_defence_of_every_recipe_can_be_built_and_its_noise_is_where_the_name_says(monkeypatch):
    """Places of the noise, layers, policies: what a run would refuse before it begins. Large nets in the small forms alone."""
    built = {}
    for name in MAIN + SWEEPS:
        for form, rows in declared(name, monkeypatch).items():
            for recipe in (one for one in rows.values() if form == "small" or one.model.name == "small"):
                shape = build.Shape(8, (3, recipe.data.size or 28, recipe.data.size or 28))
                for key, one in recipe.chosen.items():
                    one = one.at(one.low) if isinstance(one, Matched) else one
                    if (place := (str(recipe.model), recipe.data.size, recipe.share_policy, str(one))) not in built:
                        built[place] = build.make_defence(one, recipe, shape, seed=0).model.latent_shape
                    if name == "ablation":
                        built[key] = built[place]
    assert len(built) > 100
    for kind in ("full", "level alone", "isotropic 1"):
        shapes = [built[f"{kind}{place}"] for place in (" after block 0", "", " after block 2", " before the head")]
        assert shapes == [(32, 14, 14), (64, 7, 7), (128, 4, 4), (512,)]


def test_the_small_form_is_smaller(monkeypatch):
    for name in MAIN + SWEEPS:
        seen = declared(name, monkeypatch)
        for row, small in seen["small"].items():
            full = seen["full"].get(row) or next(iter(seen["full"].values()))
            assert small.rounds.count < full.rounds.count and small.evaluation.num_victims < full.evaluation.num_victims, (name, row)


def test_the_grid_of_bido_is_the_published_one_with_both_measures(monkeypatch):
    [recipe] = declared("bido_grid", monkeypatch)["full"].values()
    grid = [one for one in recipe.defences.values() if isinstance(one, BiDO)]
    for measure in ("hsic", "coco"):
        found = {(one.x_weight, round(one.label_weight / one.x_weight, 9)) for one in grid if one.measure == measure}
        assert found == {(weight, ratio) for weight in (0.01, 0.05, 0.1, 0.5, 1.0) for ratio in (5, 10, 20)}
    assert len(grid) == 30


def test_the_grid_of_bido_attacks_no_victim_of_the_comparison(monkeypatch):
    recipes = [declared(name, monkeypatch)[form][""] for form in ("full", "small") for name in ("bido_grid", "paper_table")]
    dataset = synthetic_blood_cells(train=600, val=24, test=16, size=16)
    for grid, table in (recipes[:2], recipes[2:]):
        attacked, victims = (set(build._roles(one, dataset).victims.tolist()) for one in (grid, table))
        assert len(attacked) == grid.evaluation.num_tuning and len(victims) == table.evaluation.num_victims and not attacked & victims


def test_the_search_of_bido_keeps_the_ratio_of_its_weights(monkeypatch):
    matched = declared("paper_table", monkeypatch)["full"][""].defences["BiDO"]
    assert [matched.at(value).label_weight for value in (0.005, 0.1, 5.0)] == pytest.approx([0.05, 1.0, 50.0])


@pytest.mark.parametrize(("clients", "expected"), [(20, {"0.05": 1, "0.1": 2, "0.3": 6, "1": 20}), (100, {"0.05": 5, "0.1": 10, "0.3": 30, "1": 100}), (3, {"0.05": 1, "0.1": 1, "0.3": 1, "1": 3})])
def test_fractions_of_clients_are_those_of_however_many_there_are(clients, expected, monkeypatch):
    rows = declared("participation", monkeypatch)["full"]
    found = {share: dataclasses.replace(rows[f"fraction {share}"], data=dataclasses.replace(rows[f"fraction {share}"].data, num_clients=clients)) for share in expected}
    assert {share: recipe.cohort for share, recipe in found.items()} == expected and not any(problems(recipe) for recipe in found.values())


def test_every_set_of_the_modalities_is_one_that_can_be_trained_on():
    page = runpy.run_path(str(ROOT / "recipes" / "modalities.py"), run_name="page")
    assert set(page["SETS"]) == {name for name, one in medmnist_sets.entries().items() if one.supported}


def _images_for(name):
    """(arguments, environment): real images where they are at hand, synthetic ones otherwise."""
    data = os.environ.get("GIDEF_DATA")
    if name == "modalities" and not data:
        pytest.skip("modalities runs on MedMNIST's files: set GIDEF_DATA to their folder.")
    return [] if data or name == "architectures" else ["--data.name", "synthetic"], {"GIDEF_DATA": data} if data else {}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MAIN + SWEEPS)
def test_the_small_form_can_be_rehearsed(name, tmp_path):
    """`--small --dry-run 2`: it loads, builds and takes a step of everything."""
    arguments, more = _images_for(name)
    done = run(1, f"{name}.py", "--small", "--dry-run", "2", "--out", str(tmp_path / "out"), *arguments, timeout=900, **more)
    assert "useful ranks" in done.stdout and not (tmp_path / "out").exists()


CPU_S = 2 * 600
"""Of the processor: what ten minutes on 2 cores have. Other work on the machine changes the minutes, and these next to nothing."""


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", MAIN + SWEEPS)
def test_the_small_form_runs_to_its_end(name, tmp_path):
    arguments, more = _images_for(name)
    before = _children_s()
    run(1, f"{name}.py", "--small", "--out", str(tmp_path / "out"), *arguments, timeout=7200, **more)
    assert _children_s() - before < CPU_S
    folders = [path.parent for path in (tmp_path / "out").rglob("results.json")]
    assert folders and (tmp_path / "out" / "report.html").stat().st_size > 10_000
    if name in SWEEPS:
        assert {"table.csv", "table.tex", "tradeoff.png", "tradeoff.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}
    for folder in folders:
        told = results(folder)
        assert told["rows"] and told["verdict"] and all(row["psnr_db"] is not None and row["failed"] == 0 for row in told["rows"]), folder
        assert json.dumps(told["recipe"])


def _children_s() -> float:
    """Processor seconds of the processes that this one started, and those started, once they have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
