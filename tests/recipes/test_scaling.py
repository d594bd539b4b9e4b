"""The scaling recipe as a user starts it: by itself, and by a launcher for one number of ranks."""

from __future__ import annotations

import csv

import pytest

from tests.ranks.launch import results, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


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


def test_work_that_does_not_divide_is_refused(tmp_path):
    done = run(1, "scaling.py", "--small", "--ranks", "1", "3", "--out", str(tmp_path / "out"), check=False)
    assert done.returncode == 2 and "do not divide by 3 ranks" in done.stderr
