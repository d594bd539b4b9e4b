"""A loss that is not finite at one client of one rank: all ranks leave that training out together, and go on. Synthetic cells."""

from __future__ import annotations

import pytest

from tests.diverging import ERROR
from tests.ranks.launch import record, results, run

pytestmark = pytest.mark.ranks
RECIPE = "../tests/ranks/diverging_recipe.py"
LOST = [{"defence": name, "seed": seed, "error": ERROR} for name, seed in (("bad", 0), ("bad", 1), ("half", 1))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(1, RECIPE, "--out", str(folder))
    return results(folder)


@pytest.mark.parametrize(("ranks", "schedule"), [(2, "dynamic"), pytest.param(3, "longest_first", marks=pytest.mark.slow)])
def test_ranks_end_with_what_one_rank_trained_and_left_out_also_when_resumed(ranks, schedule, alone, tmp_path):
    folder = tmp_path / "run"
    arguments = (ranks, RECIPE, "--out", str(folder), "--speed.clients-schedule", schedule)
    run(*arguments)
    for resumed in (False, True):
        found = results(folder)
        assert found["failed"] == alone["failed"] == LOST and found["tuned"] == alone["tuned"] and found["tuned"]["searched"]["diverged"] == [100.0, 10.0]
        assert found["weights_sha256"] == alone["weights_sha256"] and len(found["rows"]) == len(alone["rows"]) == 4
        assert [(line["defence"], line["seed"]) for line in record(folder) if line["kind"] == "failed"] == [(one["defence"], one["seed"]) for one in LOST]
        if not resumed:
            run(*arguments, "--resume")


def test_a_group_of_ranks_leaves_a_client_that_diverges_and_trains_the_next_defence(tmp_path):
    folder = tmp_path / "run"
    run(2, RECIPE, "--out", str(folder), "--speed.shard-size", "2", "--only", "bad", "undefended", "--seeds", "0")
    found = results(folder)
    assert found["failed"] == LOST[:1] and list(found["weights_sha256"]) == ["undefended/0"] and [row["defence"] for row in found["rows"]] == ["undefended"]
