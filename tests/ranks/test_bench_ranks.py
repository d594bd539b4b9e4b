"""The benchmark of ranks, in a form of seconds."""

from __future__ import annotations

import json

import pytest

from tests.ranks import launch

pytestmark = pytest.mark.ranks
SMALL = ("--at-once", "2", "--chunks", "2", "--iterations", "3", "--repetitions", "2", "--mode", "vmap", "--schedule", "dynamic", "--device", "cpu")


def test_two_ranks_beside_one(tmp_path):
    done = launch.run(2, "bench/ranks.py", *SMALL, "--out", str(tmp_path / "ranks.json"))
    told = json.loads((tmp_path / "ranks.json").read_text())
    assert told["ranks"] == 2 and len(told["one_s"]) == len(told["all_s"]) == 2 and min(told["one_s"] + told["all_s"]) > 0
    assert min(a / b for a, b in zip(told["one_s"], told["all_s"], strict=True)) <= told["ratio"]
    assert done.stdout.count("2 ranks, 2 chunks of 2 attacks each") == 1  # by one rank alone


def test_a_number_that_means_nothing_is_refused(tmp_path):
    done = launch.run(1, "bench/ranks.py", "--chunks", "0", "--out", str(tmp_path / "ranks.json"), check=False)
    assert done.returncode and "--chunks" in done.stderr and not (tmp_path / "ranks.json").exists()


def test_sums_over_two_ranks_at_once_and_in_buckets(tmp_path):
    small = ("--parameters", "4800000", "--tensors", "3", "--repetitions", "2", "--device", "cpu", "--out", str(tmp_path / "sums.json"))
    for reduction in ("fixed_point", "float32"):
        done = launch.run(2, "bench/sums.py", *small, "--reduction", reduction)
        told = json.loads((tmp_path / "sums.json").read_text())
        assert len(told["plain_s"]) == len(told["overlapped_s"]) == 2 and min(told["plain_s"] + told["overlapped_s"]) > 0
        assert done.stdout.count("2 ranks, 4,800,000 parameters") == 1
    for more, text in ((), "torchrun"), (("--parameters", "6000"), "--parameters 6000"):
        done = launch.run(1, "bench/sums.py", *small, *more, check=False)
        assert done.returncode and text in done.stderr
