"""The scaling recipe as a user starts it: by itself, and by a launcher for one number of ranks."""

from __future__ import annotations

import csv
import runpy
import sys

import pytest

from gidef import scaling
from tests.ranks.launch import ROOT, results, run

pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
def test_it_runs_itself_on_each_number_of_ranks_and_draws(tmp_path):
    out = tmp_path / "out"
    done = run(1, "scaling.py", "--small", "--ranks", "1", "2", "--out", str(out), timeout=800)
    rows = list(csv.DictReader((out / "scaling.csv").read_text().splitlines()))
    assert [(row["mode"], row["ranks"], row["cohort"]) for row in rows] == [("strong", "1", "8"), ("strong", "2", "8"), ("weak", "1", "4"), ("weak", "2", "8")]
    assert all(float(row[name]) > 0 for row in rows for name in ("round_s", "attacks_s", "clients_useful", "chunks_useful"))
    assert {path.name for path in out.glob("*.png")} == {"training.png", "attacks.png"}
    assert results(out / "strong-1")["weights_sha256"] == results(out / "strong-2")["weights_sha256"]
    again = run(2, "scaling.py", "--small", "--ranks", "1", "2", "--out", str(out), timeout=300)  # all rows are there: it draws, and says so once
    assert again.stdout.count("table    ") == 1 and "rounds/s" not in again.stdout and done.stdout.count("Scaling\n-------") >= 1


@pytest.mark.slow
def test_bad_input_that_only_the_ranks_find_is_one_message(tmp_path):
    done = run(1, "scaling.py", "--small", "--ranks", "1", "2", "--data.path", str(tmp_path / "none.npz"), "--out", str(tmp_path / "out"), check=False)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("gidef: ") and "none.npz" in lines[0], done.stderr


def test_a_dry_run_is_of_the_strong_run_and_work_that_does_not_divide_is_refused(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(scaling, "_run", lambda recipe, name, ranks: ran.append((recipe.rounds.cohort_size, recipe.speed.workers, name, ranks)))
    for asked in (["--dry-run", "8"], ["--dry-run"]):
        monkeypatch.setattr(sys, "argv", ["scaling.py", "--small", "--ranks", "1", "4", "--out", str(tmp_path / "out"), *asked])
        runpy.run_path(str(ROOT / "recipes" / "scaling.py"), run_name="__main__")
    assert ran == [(8, 1, "scaling strong", 8), (8, 1, "scaling strong", 4)]
    for asked, message in ((["--dry-run", "none"], "expected a number of ranks"), (["--ranks", "1", "3"], "do not divide by 3 ranks")):
        done = run(1, "scaling.py", "--small", "--ranks", "1", "4", "--out", str(tmp_path / "out"), *asked, check=False)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()
