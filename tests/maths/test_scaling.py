"""What the scaling recipe runs and how it reads it; that it runs is in tests/recipes."""

from __future__ import annotations

import json

import pytest

from gidef.config import Evaluation, Recipe, Rounds
from gidef.report.pictures import scaling_curves
from gidef.scaling import _folder, _sized_for, row, speedups


def test_weak_work_grows_with_the_ranks_and_is_the_strong_run_on_the_most(tmp_path):
    recipe = Recipe(rounds=Rounds(count=2, cohort_size=8), evaluation=Evaluation(num_victims=16))
    sizes = {(mode, n): _sized_for(recipe, mode, n, 4) for mode in ("strong", "weak") for n in (1, 2, 4)}
    assert [sizes["weak", n].rounds.cohort_size for n in (1, 2, 4)] == [2, 4, 8]
    assert [sizes["weak", n].evaluation.num_victims for n in (1, 2, 4)] == [4, 8, 16]
    assert sizes["weak", 4] == sizes["strong", 4] == sizes["strong", 1] and sizes["strong", 1].speed.workers == 1
    assert _folder(tmp_path, "weak", 4, 4) == _folder(tmp_path, "strong", 4, 4) and _folder(tmp_path, "weak", 2, 4).name == "weak-2"


def test_a_record_is_read_into_a_row(tmp_path):
    lines = [
        *({"kind": "round", "seconds": seconds, "cohort": 3} for seconds in (5.0, 7.0, 9.0, 12.0)),
        {"kind": "trained", "client_seconds": {"0": {"median": 1.0}, "1": {"median": 2.0}, "2": {"median": 3.0}}},
        {"kind": "matched", "seconds": 10.0, "chunk_seconds": [4.0, 4.0, 2.0]},
    ]
    (tmp_path / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert row(tmp_path, "strong", 2) == {
        "mode": "strong", "ranks": 2, "cohort": 3, "round_s": 2.0, "clients_useful": 2.0, "chunks": 3, "attacks_s": 10.0, "chunks_useful": 2.5,
    }  # fmt: skip


def test_speed_ups_are_over_one_rank_and_count_the_work():
    rows = [{"mode": mode, "ranks": n, "round_s": s} for mode, n, s in (("strong", 1, 8.0), ("strong", 2, 5.0), ("weak", 1, 4.0), ("weak", 2, 5.0))]
    assert speedups(rows, "round_s") == {"strong": {1: 1.0, 2: 1.6}, "weak": {1: 1.0, 2: pytest.approx(1.6)}}
    assert speedups(rows[1:2], "round_s") == {}


def test_the_picture_has_lines_for_ideal_and_bound(tmp_path):
    path = scaling_curves(tmp_path / "a.svg", [1, 2, 4], {"strong": [1, 1.9, 3.0]}, ideal=[1, 2, 4], bound=[1, 2, 3.5], title="A title")
    text = path.read_text()
    assert all(f"<!-- {label} -->" in text for label in ("ideal", "bound by the longest client", "strong", "ranks"))
