"""Trade-offs as CSV and PNG, and what is written over several runs: made-up results (see conftest)."""

import copy
import csv
import io

import numpy as np
import pytest
from PIL import Image

from gidef.errors import InputError
from gidef.report import joined, results, svg, tables, tradeoff

save = results.save


def lines_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.fixture
def other(results):
    """Another run on the same data: two strengths of noise, one of them private, judged by a second judge as well."""
    found = copy.deepcopy(results)
    found["recipe"]["defences"] = {"plain": {"type": "Undefended"}, **{f"noise {std:g}": {"type": "IsotropicNoise", "std": std} for std in (1.0, 4.0)}}
    names = {0: "plain", 1: "noise 1", 2: "noise 4"}
    for number, row in enumerate(found["rows"]):
        row |= {"defence": names[number], "client_accuracy": 0.9 - 0.1 * number, "client_accuracies": [0.88 - 0.1 * number, 0.91 - 0.1 * number]}
        row |= {"attacker_accuracy_by": {"second": 0.25 * number}, "note": "of this run" if number else ""}
    found["rows"][2] |= {"epsilon": 3.0, "delta": 1e-5, "client_accuracy": None}
    found["judge"] |= {"others": {"second": {"accuracy_on_truth": 0.9, "accuracy_on_test": 0.8}}, "accuracy_on_truth": 0.99}
    return found


@pytest.fixture
def folders(results, other, tmp_path):
    for name, content in (("a", results), ("b", other)):
        (tmp_path / name).mkdir()
        save(tmp_path / name / "results.json", content)
    return [tmp_path / "a", tmp_path / "b"]


def test_the_numbers_of_the_plots_are_in_a_file_at_full_precision(results, other, tmp_path):
    results["rows"][0]["psnr_db"]["mean"] = 24.4 + 1e-9
    paths = tradeoff.save([("one", results), ("two", other)], tmp_path)
    assert [path.name for path in paths] == ["tradeoff.png", "tradeoff.csv"]
    lines = lines_of(paths[1])
    points = {(line["measure"], line["run"], line["defence"]): line for line in lines if line["family"] != "level"}
    assert list(points) == [(measure, *name) for measure in ("psnr_db", "attacker_accuracy") for name in (("one", "plain"), ("one", "learned"), ("two", "plain"), ("two", "noise 1"))]
    first = points["psnr_db", "one", "plain"]
    assert float(first["value"]) == 24.4 + 1e-9 and (float(first["low"]), float(first["high"])) == (24.4 - 0.6, 24.4 + 0.6) and float(first["client_accuracy"]) == 0.9
    assert first["family"] == "Undefended" and first["client_accuracy_low"] == ""
    assert points["psnr_db", "one", "learned"]["attack"] == "joint", "the strongest"
    noisy = points["attacker_accuracy", "two", "noise 1"]
    assert (noisy["family"], noisy["value"], noisy["low"], noisy["client_accuracy_low"]) == ("IsotropicNoise", "0.5", "", "0.78")
    assert {(line["data"], line["share_policy"], line["release"], line["checkpoint"]) for line in lines} == {("bloodmnist", "full", "gradient of 1, 1 local step(s)", "untrained")}
    levels = [(line["measure"], line["defence"], float(line["value"])) for line in lines if line["family"] == "level"]
    assert levels == [
        ("psnr_db", "class mean", 19.0), ("attacker_accuracy", "class mean", 0.98), ("attacker_accuracy", "chance", 0.125),
        ("attacker_accuracy", "judge on the true images (one)", 0.95), ("attacker_accuracy", "judge on the true images (two)", 0.99),
    ]  # fmt: skip


def test_nothing_is_written_without_a_point(results, tmp_path):
    results["rows"] = []
    assert tradeoff.save([("one", results)], tmp_path) == [] and not list(tmp_path.iterdir())


def coloured(path, colour):
    """Middle of the pixels of a colour (x, y), in px; None without any."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    hit = np.abs(pixels - [int(colour[at : at + 2], 16) for at in (1, 3, 5)]).max(2) < 12
    return np.argwhere(hit).mean(0)[::-1] if hit.any() else None


def test_the_picture_shows_each_family_in_its_colour_and_lower_values_lower(results, make_row, tmp_path):
    results["recipe"]["defences"] |= {"iso": {"type": "IsotropicNoise", "std": 1.0}, "iso 4": {"type": "IsotropicNoise", "std": 4.0}}
    results["rows"] += [make_row("iso", "joint", "A3", 20.0, accuracy=0.85), make_row("iso 4", "joint", "A3", 18.0, accuracy=0.8)]
    path, _ = tradeoff.save([("one", results)], tmp_path)
    learned, iso = (coloured(path, svg.COLOURS[number]) for number in (0, 1))
    with Image.open(path) as picture:
        width, height = picture.size
    assert width > 1.5 * height, "PSNR beside attacker accuracy"
    assert learned[1] > iso[1] and learned[0] > iso[0], "learned: 12.1 dB at 90 %; isotropic: 18 and 20 dB at 80 and 85 %"
    assert coloured(path, svg.COLOURS[2]) is None


def test_a_single_point_and_hostile_names_are_drawn(results, tmp_path):
    results["rows"] = results["rows"][:1]
    results["rows"][0] |= {"defence": "$x_{", "attack": "_" + 80 * "long "}
    results["rows"][0]["psnr_db"] = 20.0
    path, _ = tradeoff.save([("one", results)], tmp_path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"


def test_several_runs_have_a_page_a_table_and_a_trade_off_in_a_folder_of_their_own(folders, tmp_path):
    paths = joined.write(folders, into=tmp_path / "all")
    assert [path.name for path in paths] == ["report.html", "table.csv", "table.tex", "tradeoff.png", "tradeoff.csv"] and all(path.parent == tmp_path / "all" for path in paths)
    assert {line["run"] for line in lines_of(paths[4])} == {"quickstart a", "quickstart b", ""}
    lines = lines_of(paths[1])
    alone = [list(csv.DictReader(io.StringIO(tables.csv(results.load(folder / "results.json"))))) for folder in folders]
    assert [line["run"] for line in lines] == ["quickstart a"] * 7 + ["quickstart b"] * 7
    for line, single in zip(lines, alone[0] + alone[1], strict=True):
        assert {key: line[key] for key in single} == single
    assert "attacker_accuracy_by_second" not in alone[0][0] and lines[0]["attacker_accuracy_by_second"] == "" and lines[8]["attacker_accuracy_by_second"] == "0.25"


def test_the_joined_latex_has_the_columns_and_notes_of_all_runs(folders, other, results):
    text = tables.joined_latex([("first_run", results), ("second", other)])
    rows = [line.removeprefix("    {}").removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.startswith("    {}")]
    assert len(rows) == 1 + 2 * 7 and len({len(row) for row in rows}) == 1 and rows[0][0] == "run"
    assert [row[0] for row in rows[1:]] == [r"first\_run"] * 7 + ["second"] * 7
    place = rows[0].index("eps, delta")
    assert rows[10][place] == "3.00, 1e-05" and all(row[place] == "" for number, row in enumerate(rows[1:]) if number != 9)
    assert rows[9][-1] == rows[10][-1] == "1" and "Note 1: of this run." in text
    assert r"first\_run: Attacker accuracy is a judge's" in text and text.count("quickstart: what the shared updates gave away") == 1
    assert text.count(r"\hline") == 1 + 4 + 1


def test_in_the_folder_of_a_run_its_own_tables_stay(folders):
    (folders[0] / "table.csv").write_text("own")
    paths = joined.write(folders)
    assert [path.name for path in paths] == ["report.html", "joined-table.csv", "joined-table.tex", "tradeoff.png", "tradeoff.csv"]
    assert (folders[0] / "table.csv").read_text() == "own" and not (folders[1] / "report.html").exists()
    (folders[1] / "results.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        joined.write(folders)
