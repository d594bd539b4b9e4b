"""The benchmark of the attack's first-order forms: a short run of it, and its yardsticks."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gidef.attack import drain
from gidef.errors import InputError

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "bench"
SHORT = {"models": ("convnetsmall",), "attacks": 2, "iterations": 2, "repetitions": 2}


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The script as a module; it imports its neighbours by name."""
    before, threads = set(sys.modules), torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("first_order", FOLDER / "first_order.py")
    sys.modules["first_order"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(sys.modules["first_order"])
    yield sys.modules["first_order"]
    sys.path.remove(str(FOLDER))
    for name in ("first_order", "attack", "saving"):
        if name not in before:
            sys.modules.pop(name, None)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIDEF_DATA", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIDEF_OFFLINE", "1")


def test_every_form_is_measured_beside_double_backward_and_judged_by_the_same_attacks(bench, tmp_path, capsys):
    told = bench.main(bench.Options(**SHORT, out=tmp_path / "first.json"))
    assert json.loads((tmp_path / "first.json").read_text())["rows"] == told["rows"] and told["clock"] == "cpu"
    assert [(row["case"], row["settings"], row["iterations"]) for row in told["rows"]] == [("convnetsmall-b1", name, 2) for name in bench.SETTINGS]
    for row in told["rows"]:
        assert set(row["contenders"]) == {f"{form}, {mode}" for form in bench.FORMS for mode in bench.MODES} | {bench.MODULE}
        assert all(len(one["ms"]["all"]) == 2 and one["ms"]["min"] > 0 for one in row["contenders"].values())
        reference = row["quality"][bench.REFERENCE]
        assert reference["difference_db"] == {"mean": 0, "low": 0, "high": 0} and reference["psnr_db"] == statistics.fmean(reference["psnr_db_all"])
        for one in row["quality"].values():
            apart = [ours - other for ours, other in zip(one["psnr_db_all"], reference["psnr_db_all"], strict=True)]
            assert one["difference_db"]["mean"] == pytest.approx(statistics.fmean(apart)) and min(apart) - 1e-9 <= one["difference_db"]["low"] <= one["difference_db"]["high"]
        # two iterations in, the exact form has gone where double backward went
        assert row["quality"]["forward over reverse"]["psnr_db"] == pytest.approx(reference["psnr_db"], abs=0.1)
    said = capsys.readouterr().out
    assert "on the module" in said and "beside double backward" in said and "MiB" in said


@pytest.mark.parametrize("name", ["naive", "published"])
def test_all_forms_begin_at_the_same_images_and_distance(bench, name):
    case = next(case for case in bench.CASES if case.net == "resnet20")
    problem = bench.attack.pose(bench.dataclasses.replace(case, attacks=2, iterations=0), 0, torch.device("cpu"))
    found = [
        drain(bench.attack.Engine(problem, bench.settings_for(name, problem, 0, form), "vmap", 2).start(1)) for form in bench.FORMS.values()
    ]  # fmt: skip
    found.append(bench.OnModule(problem, bench.settings_for(name, problem, 0, "central_difference")).whole())
    for rows in found[1:]:
        assert torch.equal(rows["images"], found[0]["images"]) and rows["attacks"].tolist() == [[0, 0], [1, 0]]
        torch.testing.assert_close(rows["fit"], found[0]["fit"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [({"models": ("lenet",)}, "--models lenet: choose of convnetsmall, resnet20"), ({"settings": ("best",)}, "--settings best"), ({"settings": ()}, "at least one of naive"),
     ({"repetitions": 0}, "expected at least 1"), ({"attacks": 0}, "expected at least 1")],
)  # fmt: skip
def test_unknown_names_and_impossible_numbers_are_refused_in_words(bench, wrong, text):
    with pytest.raises(InputError, match=text):
        bench.main(bench.Options(**wrong))
