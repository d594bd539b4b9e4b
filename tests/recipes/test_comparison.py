"""The recipes of the comparison: all of them are sound on paper; their small forms run in the marker `slow`. Synthetic cells unless GIDEF_DATA is set."""

from __future__ import annotations

import json
import os
import runpy

import pytest

from gidef.config import BiDO, Recipe, problems
from tests.ranks.launch import ROOT, results, run

MAIN = ("paper_table", "ablation", "adaptive", "combinations", "bido_grid", "attackers_and_judges", "schedules_of_play")
SWEEPS = ("certificate", "strength", "architectures", "heterogeneity", "participation", "share_policy", "privacy_budget", "modalities")


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
        found = {(one.x_weight, round(one.y_weight / one.x_weight, 9)) for one in grid if one.measure == measure}
        assert found == {(weight, ratio) for weight in (0.01, 0.05, 0.1, 0.5, 1.0) for ratio in (5, 10, 20)}
    assert len(grid) == 30 and recipe.data.split_seed != 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", MAIN + SWEEPS)
def test_the_small_form_runs_to_its_end(name, tmp_path):
    data = os.environ.get("GIDEF_DATA")
    if name == "modalities" and not data:
        pytest.skip("modalities runs on MedMNIST's files: set GIDEF_DATA to their folder.")
    more = {"GIDEF_DATA": data} if data else {}
    arguments = [] if data or name == "architectures" else ["--data.name", "synthetic"]
    run(1, f"{name}.py", "--small", "--out", str(tmp_path / "out"), *arguments, timeout=1800, **more)
    folders = [path.parent for path in (tmp_path / "out").rglob("results.json")]
    assert folders and (tmp_path / "out" / "report.html").stat().st_size > 10_000
    for folder in folders:
        told = results(folder)
        assert told["rows"] and told["verdict"] and all(row["psnr_db"] is not None for row in told["rows"]), folder
        assert json.dumps(told["recipe"])
