import copy
import json

import pytest
import torch

from gidef.errors import InputError
from gidef.report import results as results_module
from gidef.report.results import interval_of, load, mean_of, save, validate


def test_results_come_back_as_saved_with_tensors_as_numbers_and_nan_as_null(tmp_path, results):
    results["rows"][0]["mse"] = {"mean": torch.tensor(0.5), "low": float("nan"), "high": float("inf")}
    before = copy.deepcopy(results)
    path = save(tmp_path / "run" / "results.json", results)
    found = load(path)
    assert found["rows"][0]["mse"] == {"mean": 0.5, "low": None, "high": None}
    assert found["rows"][1:] == results["rows"][1:] and list(found) == list(results)
    assert repr(before) == repr(results)
    json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_file_that_is_missing_or_no_json_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        load(tmp_path / "results.json")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format=2), "format 2, expected 1"),
        (lambda r: r.pop("bounds"), "'bounds' is missing"),
        (lambda r: r.update(rows={}), r"rows: found \{\}, expected list"),
        (lambda r: r["data"].pop("synthetic"), "data: 'synthetic' is missing"),
        (lambda r: r["rows"].append(3), r"rows\[3\]: found int"),
        (lambda r: r["rows"][1].pop("share_policy"), r"rows\[1\]: 'share_policy' is missing"),
        (lambda r: r["rows"][0].update(victims="16"), r"rows\[0\].victims: found '16', expected int"),
        (lambda r: r["rows"][0].update(psnr_db="24"), r"rows\[0\].psnr_db: found mean='24'"),
        (lambda r: r["rows"][0]["ssim"].update(low=float("nan")), r"rows\[0\].ssim: found low=nan"),
        (lambda r: r["bounds"][0].update(name="grey"), "unknown names"),
        (lambda r: r.update(judge=[]), "judge: found"),
    ],
)
def test_a_broken_layout_is_named_by_its_place(results, change, message):
    validate(results)
    change(results)
    with pytest.raises(InputError, match=message):
        validate(results, "run/results.json")


def test_nothing_broken_is_written_over_a_good_file(tmp_path, results):
    path = save(tmp_path / "results.json", results)
    before = path.read_bytes()
    del results["seeds"]
    with pytest.raises(InputError):
        save(path, results)
    assert path.read_bytes() == before


def test_a_run_that_only_trained_is_valid(results):
    results["rows"], results["bounds"] = [], []
    del results["judge"], results["pictures"]
    validate(results)


def test_a_measured_value_is_a_number_nothing_or_an_interval():
    assert (mean_of(0.5), mean_of(None), mean_of({"mean": 0.25})) == (0.5, None, 0.25)
    assert interval_of(0.5) is None and interval_of({"mean": 1.0, "low": None, "high": 2.0}) is None
    assert interval_of({"mean": 1.0, "low": 0.0, "high": 2.0}) == (0.0, 2.0)


def test_the_documented_layout_names_every_key_of_the_example(results):
    from gidef import report

    keys = {*results, *results["rows"][0], *results["training"][0], *results["bounds"][0], *results["judge"], *results["data"]}
    assert not {key for key in keys if key not in report.__doc__} and all(name in report.__doc__ for name in results_module.BOUNDS)
