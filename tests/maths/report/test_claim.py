"""The published claim beside made-up rows (see conftest)."""

import copy

import pytest

from gidef.report.claim import claim
from gidef.report.verdict import compare, verdict


def said(results, lines=()):
    return claim(results, compare(results, lines))


@pytest.fixture
def compared(results, make_row):
    """The learned defence beside DP-SGD: 40 % against 50 % attacker accuracy, MSE 0.020 against 0.016, equal client accuracy."""
    found = copy.deepcopy(results)
    found["recipe"]["defences"] = {
        "ours": {"type": "Matched", "defence": {"type": "LearnedPerturbation"}},
        "dp": {"type": "DPSGD"}, "both": [{"type": "LearnedPerturbation"}, {"type": "Pruning"}],
    }  # fmt: skip
    rows = []
    for name, accuracy, mse in (("ours", 0.40, 0.020), ("dp", 0.50, 0.016), ("both", 0.1, 0.5)):
        row = make_row(name, "naive", "A0", 12.0)
        row |= {"attacker_accuracy": {"mean": accuracy, "low": 0.0, "high": 1.0}, "mse": {"mean": mse, "low": 0.0, "high": 1.0}, "client_accuracy": 0.9}
        rows += [row, {**row, "attack": "joint", "attack_id": "A3", "attacker_accuracy": 1.0, "psnr_db": 14.0}]
    found["rows"] = rows
    return found


def test_both_readings_are_judged_by_themselves_naive_first_and_then_the_strongest(compared):
    naive, strongest = said(compared)
    assert '"ours" against "dp" under the naive attack' in naive
    assert "-20.0 % of the baseline (claimed -12.5: pass)" in naive
    assert "-10.0 points (claimed -12.5: FAIL)" in naive
    assert "MSE +25.0 % (claimed +12.4: pass)" in naive and "90.0 % against 90.0 %." in naive and "like with like" not in naive
    assert '"ours" against "dp" under the strongest attack on each (joint) at' in strongest and "100.0 % against 100.0 %, +0.0 % of the baseline (claimed -12.5: FAIL)" in strongest
    assert [text for text in verdict(compared) if "paper's claim" in text] == [naive, strongest]


def test_a_difference_that_is_the_claimed_one_but_for_rounding_passes(compared):
    for row in compared["rows"]:
        if row["attack"] == "naive":
            row["attacker_accuracy"] = {"mean": {"ours": 0.40624999999999994, "dp": 0.5312499999999999}.get(row["defence"], 0.1), "low": 0.0, "high": 1.0}
    assert "-12.5 points (claimed -12.5: pass)" in said(compared)[0]
    for row in compared["rows"]:
        if (row["defence"], row["attack"]) == ("ours", "naive"):
            row["attacker_accuracy"]["mean"] = 0.4063
    assert "-12.5 points (claimed -12.5: FAIL)" in said(compared)[0] and "(claimed +12.4: pass)" in said(compared)[0]


def test_each_side_is_told_with_its_own_strongest_attack(compared):
    compared["rows"] = [row for row in compared["rows"] if (row["defence"], row["attack"]) != ("dp", "joint")]
    assert "the strongest attack on each (joint, naive)" in said(compared)[1]
    compared["rows"] = [row for row in compared["rows"] if row["attack"] != "joint"]
    assert len(said(compared)) == 1, "a naive attack alone says nothing twice"


def test_a_naive_attack_that_is_the_strongest_is_told_as_such(compared):
    for row in compared["rows"]:
        row["psnr_db"] = 11.0 if row["attack"] == "joint" else 12.0
    assert "under the strongest attack on each (naive)" in said(compared)[1]


def test_the_same_of_several_naive_attacks_stands_on_both_sides(compared, make_row):
    def naive(name, defence, psnr_db):
        return make_row(defence, name, "A0", psnr_db, accuracy=0.9) | {"attacker_accuracy": 0.6 if name == "tuned" else 0.3}

    compared["rows"] += [naive("tuned", "ours", 13.0), naive("tuned", "dp", 11.5), naive("published", "dp", 30.0)]
    text = said(compared)[0]
    assert "under the tuned attack" in text and "60.0 % against 60.0 %" in text, "tuned has 24.5 dB on both, naive 24, and published is not of both"
    compared["rows"][-2]["psnr_db"]["mean"] = 10.5
    assert "under the naive attack" in said(compared)[0]


def test_accuracies_that_do_not_match_are_said(compared):
    compared["rows"][0]["client_accuracy"] = 0.85
    assert "do not compare like with like" in said(compared)[0]
    compared["rows"][0]["client_accuracy"] = 0.89
    assert "like with like" not in said(compared)[0], "a point apart is matched, whatever the rounding"
    compared["rows"][0]["client_accuracy"] = None
    assert said(compared)[0].endswith("pass).")


def test_a_release_that_is_undefended_is_told_beside_the_numbers(compared):
    """BiDO compares the images of a batch with one another: of one image at a time nothing is left of it."""
    of = {name: {"type": "Matched", "defence": {"type": kind}} for name, kind in (("ours", "LearnedPerturbation"), ("dp", "BiDO"))}
    compared["recipe"]["defences"] |= of
    told = {
        (1, 1): '"dp" (whose release of one image at a time is undefended: the terms vanish in a batch of one) under the',
        (4, 4): '"dp" (whose local steps of one image each are undefended: the terms vanish in a batch of one) under the', (8, 1): '"dp" under the', (4, 2): '"dp" under the',
    }  # fmt: skip
    for (batch, steps), text in told.items():
        for row in compared["rows"]:
            row["threat"] = {"release": "delta" if steps > 1 else "gradient", "batch_size": batch, "local_steps": steps}
        assert len(said(compared)) == 2 and all(text in one for one in said(compared))
    compared["recipe"]["defences"]["dp"] = {"type": "DPSGD"}
    for row in compared["rows"]:
        row["threat"] = {"release": "gradient", "batch_size": 1, "local_steps": 1}
    assert all('"dp" under the' in one for one in said(compared)), "DP-SGD clips and noises a single image as well"


def test_a_baseline_of_nought_is_no_division(compared):
    compared["rows"][2]["attacker_accuracy"] = 0.0
    compared["rows"][2]["mse"] = 0.0
    assert said(compared)[0].count("not to be had") == 2


def test_without_both_sides_nothing_is_said(compared, results):
    del compared["recipe"]["defences"]["dp"]
    assert said(compared) == [] and said(results) == []
