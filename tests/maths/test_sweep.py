"""Several recipes under one name: which rows run, where, and the small form. No run is started: `run_recipe` is replaced by a recorder."""

import json
import sys
from types import SimpleNamespace

import pytest

from gidef import main as entry
from gidef.config import Data, Recipe, Rounds
from gidef.main import main, sweep

ROWS = {name: Recipe(data=Data(name=name)) for name in ("bloodmnist", "pneumoniamnist", "breastmnist")}


@pytest.fixture
def runs(monkeypatch):
    """(recipe, name) of every run, each of which leaves results.json behind; pages: folders and place of every page."""
    seen, pages = [], []

    def run(recipe, name):
        from pathlib import Path

        seen.append((recipe, name))
        Path(recipe.out).mkdir(parents=True, exist_ok=True)
        for file in ("results.json", "recipe.json"):
            (Path(recipe.out) / file).write_text(json.dumps({}))

    def write(folders, into):
        pages.append(([folder.name for folder in folders], into))
        return [into / "report.html", into / "table.csv"]

    monkeypatch.setitem(sys.modules, "gidef.job", SimpleNamespace(run_recipe=run))
    monkeypatch.setattr("gidef.report.joined.write", write)
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_JOB_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(seen=seen, pages=pages)


def test_every_row_runs_in_its_own_folder_with_the_overrides(runs, tmp_path, capsys):
    sweep(ROWS, name="sweep", args=["--out", str(tmp_path), "--rounds.count", "3"])
    assert [(one.data.name, one.rounds.count, one.out, name) for one, name in runs.seen] == [
        (row, 3, str(tmp_path / row), f"sweep {row}") for row in ROWS
    ]
    assert runs.pages == [(list(ROWS), tmp_path)] and "over 3 of 3 rows; table.csv beside it" in capsys.readouterr().out


def test_rows_by_name_and_parts_that_cover_everything_once(runs, tmp_path):
    sweep(ROWS, name="sweep", args=["--out", str(tmp_path / "a"), "--rows", "breastmnist", "bloodmnist", "--rounds.count", "2"])
    assert [(one.data.name, one.rounds.count) for one, _ in runs.seen] == [("breastmnist", 2), ("bloodmnist", 2)]
    runs.seen.clear()
    for part in ("0/2", "1/2"):
        sweep(ROWS, name="sweep", args=["--part", part, "--out", str(tmp_path / "b")])
    assert sorted(one.data.name for one, _ in runs.seen) == sorted(ROWS)
    assert runs.pages[-1] == (list(ROWS), tmp_path / "b")


def test_resuming_leaves_what_has_ended_and_goes_on_with_what_was_begun(runs, tmp_path):
    (tmp_path / "bloodmnist").mkdir()
    (tmp_path / "bloodmnist" / "results.json").write_text("{}")
    (tmp_path / "breastmnist").mkdir()
    (tmp_path / "breastmnist" / "recipe.json").write_text("{}")
    with pytest.raises(SystemExit):
        sweep(ROWS, name="sweep", args=["--out", str(tmp_path)])
    assert not runs.seen
    sweep(ROWS, name="sweep", args=["--out", str(tmp_path), "--resume"])
    assert [(one.data.name, one.resume) for one, _ in runs.seen] == [("pneumoniamnist", False), ("breastmnist", True)]


def test_the_small_form(runs, tmp_path, capsys):
    sweep(ROWS, small={"bloodmnist": Recipe(rounds=Rounds(count=1))}, name="sweep", args=["--small", "--out", str(tmp_path)])
    assert [one.rounds.count for one, _ in runs.seen] == [1]
    main(Recipe(), small=Recipe(rounds=Rounds(count=2)), name="one", args=["--out", str(tmp_path / "x"), "--small"])
    assert runs.seen[-1][0].rounds.count == 2
    with pytest.raises(SystemExit):
        main(Recipe(), name="one", args=["--small"])
    assert "no small form" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--rows", "blod"], "--rows blod"),
        (["--rows"], "choose of bloodmnist"),
        (["--part", "2/2", "--out", "a"], "--part 2/2"),
        (["--part"], "expected I/N"),
        (["--part", "0/2"], "needs --out"),
        (["--rounds.count", "0", "--out", "a"], "rounds.count=0"),
    ],
)
def test_what_makes_no_sense_is_one_message(runs, args, said, capsys):
    with pytest.raises(SystemExit) as left:
        sweep(ROWS, name="sweep", args=args)
    assert left.value.code == entry.ERROR and said in capsys.readouterr().err and not runs.seen


def test_ranks_need_a_folder_that_they_share(runs, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        sweep(ROWS, name="sweep", args=[])
    assert "--out" in capsys.readouterr().err
