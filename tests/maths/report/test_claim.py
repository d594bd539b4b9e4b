"""The published claim beside made-up rows (see conftest)."""

import copy

import pytest

from gidef.report.claim import claim
from gidef.report.verdict import verdict


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
        rows += [row, {**row, "attack": "joint", "attack_id": "A3", "attacker_accuracy": 1.0}]
    found["rows"] = rows
    return found


def test_both_readings_are_judged_by_themselves(compared):
    [text] = claim(compared)
    assert '"ours" against "dp" under the naive attack' in text
    assert "-20.0 % of the baseline (claimed -12.5: pass)" in text
    assert "-10.0 points (claimed -12.5: FAIL)" in text
    assert "MSE +25.0 % (claimed +12.4: pass)" in text and "90.0 % against 90.0 %." in text and "like with like" not in text
    assert text in verdict(compared)


def test_accuracies_that_do_not_match_are_said(compared):
    compared["rows"][0]["client_accuracy"] = 0.85
    assert "do not compare like with like" in claim(compared)[0]


def test_a_baseline_of_nought_is_no_division(compared):
    compared["rows"][2]["attacker_accuracy"] = 0.0
    compared["rows"][2]["mse"] = 0.0
    assert claim(compared)[0].count("not to be had") == 2


def test_without_both_sides_nothing_is_said(compared, results):
    del compared["recipe"]["defences"]["dp"]
    assert claim(compared) == [] and claim(results) == []
