"""Which defence of a grid is taken, beside made-up rows (see conftest)."""

import copy
import itertools

import pytest

from gidef.report.choice import choice, chosen
from gidef.report.verdict import verdict

GRID = {  # validation accuracy of two seeds; PSNR of two attacks
    "a": ((0.90, 0.90), (20.0, 25.0)),
    "b": ((0.89, 0.87), (21.0, 18.0)),
    "c": ((0.90, 0.86), (24.0, 15.0)),
    "d": ((0.60, 0.62), (10.0, 9.0)),
    "e": ((0.92, 0.92), (30.0, 14.0)),
}


@pytest.fixture
def swept(results, make_row):
    found = copy.deepcopy(results)
    found["recipe"]["defences"] = {"none": {"type": "Undefended"}, **{name: {"type": "BiDO"} for name in GRID}}
    found["recipe"]["choose"] = {"type": "Choose", "points": 2.0}
    plain = {"none": ((0.91, 0.89), (33.0, 33.0))}
    found["training"] = [
        {"defence": name, "seed": seed, "val_accuracy": value, "test_accuracy": 1 - value} for name, (values, _) in (plain | GRID).items() for seed, value in enumerate(values)
    ]
    found["rows"] = [
        make_row(name, attack, kind, value) for name, (_, values) in (plain | GRID).items() for attack, kind, value in zip(("n", "j"), ("A0", "A3"), values, strict=True)
    ]
    for row in found["rows"]:
        row["failed"] = 0
    return found


def plain_choice(grid, points):
    fit = {name: max(leaks) for name, (values, leaks) in grid.items() if sum(values) / 2 >= 0.90 - points / 100 - 1e-9}
    return min(fit, key=fit.get, default=None)


@pytest.mark.parametrize("points", [0.0, 2.0, 3.0, 40.0])
def test_the_least_leaking_within_the_points_is_taken_by_validation_and_the_strongest_attack(swept, points):
    swept["recipe"]["choose"]["points"] = points
    found = choice(swept)
    assert found["take"] == plain_choice(GRID, points) and found["points"] == points and [one["defence"] for one in found["grid"]] == list(GRID)
    [text] = chosen(swept)
    assert f'"{found["take"]}"' in text and text in verdict(swept)


def test_neither_test_accuracies_nor_the_order_of_rows_decide(swept):
    before = choice(swept)["take"]
    for run in swept["training"]:
        run["test_accuracy"] = 0.0
    assert before == "b" and all(choice(swept | {"rows": list(rows)})["take"] == before for rows in itertools.islice(itertools.permutations(swept["rows"]), 0, 4000, 400))


@pytest.mark.parametrize("backwards", [False, True])
def test_of_defences_that_leak_alike_the_more_accurate_is_taken(swept, backwards):
    for row in swept["rows"]:
        if row["defence"] in ("a", "b", "c"):
            row["psnr_db"]["mean"] = 21.0
    if backwards:
        swept["training"].reverse()
    assert choice(swept)["take"] == "a"  # of 90 %, beside two of 88 %


def test_failed_attacks_bounds_and_malicious_servers_do_not_count(swept, make_row):
    for row in swept["rows"]:
        if row["defence"] == "b" and row["attack"] == "n":
            row["failed"] = 1
    assert choice(swept)["take"] == "b" and next(one for one in choice(swept)["grid"] if one["defence"] == "b")["psnr_db"] == 18.0
    for row in swept["rows"]:
        row["failed"] = int(row["defence"] == "b")
    assert choice(swept)["take"] == "c" and next(one for one in choice(swept)["grid"] if one["defence"] == "b")["psnr_db"] is None
    swept["rows"] += [make_row("c", "given", kind, 60.0) for kind in ("A11", "A12", "control", "standard")]
    assert choice(swept)["take"] == "c"


def test_none_within_the_points_is_said_and_other_recipes_say_nothing(swept, results):
    swept["training"] = [run | {"val_accuracy": 0.5} if run["defence"] != "none" else run for run in swept["training"]]
    assert choice(swept)["take"] is None and "take: none. 0 of 5" in chosen(swept)[0]
    assert choice(results) is None and chosen(results) == []


def test_entries_at_other_strengths_are_no_further_defences(swept, make_row):
    before = choice(swept)
    for name in ("b", "c"):
        swept["training"].append({"defence": f"{name} at strength 2", "trained_as": name, "strength": 2.0, "seed": 0, "test_accuracy": 0.9})
        swept["rows"].append(make_row(f"{name} at strength 2", "n", "A0", 5.0))
    assert choice(swept) == before and [one["defence"] for one in before["grid"]] == list(GRID)
