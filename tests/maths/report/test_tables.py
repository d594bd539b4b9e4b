import csv
import io

import pytest

from gidef.report import html, tables
from gidef.report.console import Console


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_the_plain_table_fits_and_breaks_no_number(results, width):
    results["rows"][0]["note"] = "decoder granted"
    results["data"]["synthetic"] = True
    text = tables.text(results, width)
    assert max(map(len, text.splitlines())) <= width and "\x1b" not in text
    assert "bloodmnist (SYNTHETIC data)" in text and "Note 1: decoder granted" in " ".join(text.split())
    for whole in ("[23.8, 25.0]", "[11.5, 12.7]", "24.4", "untrained", "constant", "neighbour", "95.0 %", "12.5 %"):
        assert whole in text, whole
    if width >= 100:
        assert "[0.27, 0.33]" in text and "[17.0, 23.0]" in text


def test_intervals_stand_beside_their_means_where_there_is_room(results):
    assert "24.4 [23.8, 25.0]" in tables.text(results, 160) and "24.4 [23.8, 25.0]" not in tables.text(results, 100)


def test_the_bounds_come_beneath_the_attacks_in_the_same_columns(results):
    lines = tables.text(results, 160).splitlines()
    attack, bound = (next(line for line in lines if start in line) for start in ("learned", "class mean"))
    assert lines.index(bound) > lines.index(attack)
    assert attack.index("8.0 [7.4, 8.6]") + len("8.0 [7.4, 8.6]") == bound.index("19.0 [18.7, 19.3]") + len("19.0 [18.7, 19.3]")


def test_real_data_are_not_called_synthetic(results):
    assert all("ynthetic" not in render(results) for render in (tables.text, tables.markdown, tables.latex))


def test_the_console_prints_the_table_to_screen_and_log(results, tmp_path, capsys):
    with Console(log=tmp_path / "log.txt", width=100) as console:
        console.table(tables.table(results, console.width))
        console.table(tables.training_table(results))
    screen = capsys.readouterr().out
    assert "[11.5, 12.7]" in screen and "90.3" in screen and "without keys, shares and framing" in " ".join(screen.split())

    def words(text):
        return text.replace("─", "").split()

    assert words(screen) == words((tmp_path / "log.txt").read_text())


def test_csv_holds_every_number_as_it_is(results):
    results["data"]["synthetic"] = True
    results["rows"][2]["note"] = 'said "so", twice'
    lines = list(csv.DictReader(io.StringIO(tables.csv(results))))
    assert [line["kind"] for line in lines] == ["attack"] * 3 + ["bound"] * 4
    assert float(lines[2]["psnr_db_high"]) == results["rows"][2]["psnr_db"]["high"]
    assert lines[2]["note"] == 'said "so", twice' and lines[2]["seed"] == "0 1 2" and lines[2]["synthetic"] == "True"
    assert float(lines[2]["attacker_accuracy_mean"]) == 0.5 and lines[2]["attacker_accuracy_low"] == ""
    assert lines[3]["defence"] == "constant grey" and float(lines[3]["mse_mean"]) == 0.08


def test_failures_seeds_and_mixed_share_policies_are_marked(results):
    results["rows"][0].update(failed=2, seeds=None, seed=0, share_policy="head")
    text = " ".join(tables.text(results, 160).split())
    assert "plain (seed 0)" in text and "2 failed, scored as mid-grey" in text and "share policy head" in text
    assert "Share policy full" not in text


def test_markdown_cells_stay_in_their_columns(results):
    results["rows"][0].update(defence="a|b_c*\\", note="x\ny")
    lines = tables.markdown(results).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 3 + 4 and len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "a\\|b\\_c\\*\\\\" in table[2] and "Note 1: x y  " not in lines and any(line.startswith("Note 1: x") for line in lines)


def test_latex_escapes_its_special_characters(results):
    results["rows"][0].update(defence=r"50%_a&b#$~^\{x}", note="")
    text = tables.latex(results)
    assert r"50\%\_a\&b\#\$\textasciitilde{}\textasciicircum{}\textbackslash{}\{x\}" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 8 and all(line.replace(r"\&", "").count("&") == 8 for line in body)
    assert text.count(r"\begin{") == text.count(r"\end{") == 2


def test_missing_values_are_dashes_and_a_run_without_attacks_still_prints(results):
    results["rows"][0].update(psnr_db=None, client_accuracy=None, ssim={"mean": 0.25, "low": None, "high": None})
    line = next(line for line in tables.text(results, 160).splitlines() if "plain" in line)
    assert line.split()[3] == "-" and "0.25" in line
    results["rows"], results["bounds"], results["judge"] = [], [], {}
    for render in (tables.text, tables.csv, tables.markdown, tables.latex):
        assert render(results)


def test_square_brackets_in_names_are_no_markup(results):
    results["rows"][0]["defence"] = "[red]x"
    assert "[red]x" in tables.text(results, 120)


def test_the_oracle_s_choice_stands_in_a_column_of_its_own_and_threat_models_are_named(results):
    results["rows"][1]["oracle_restart_psnr_db"] = 9.9
    results["rows"][0]["threat"]["name"] = "honest but curious server, 1 local step"
    results["rows"][2]["threat"]["name"] = "malicious server"
    text = tables.text(results, 200)
    assert "oracle dB" in text and "which no attacker can" in text
    line = next(line for line in text.splitlines() if line.strip().startswith("learned") and "naive" in line)
    assert "9.9" in line and "9.9" not in next(line for line in text.splitlines() if line.strip().startswith("plain"))
    assert "malicious server" in text and "honest but curious server, 1 local step" in text
    assert "malicious server" in tables.csv(results).splitlines()[3]


def test_what_threat_models_have_in_common_is_said_once_and_the_rest_in_the_notes(results):
    known = [("untrained", "knows the labels"), ("untrained", "knows the labels and the noise law"), ("final", "knows the labels"), ("final", "knows no labels")]
    some = [{**results["rows"][0], "checkpoint": checkpoint, "threat": {"name": f"honest but curious server; {checkpoint} checkpoint; gradient of one batch of 1; {knows}; no BatchNorm"}} for checkpoint, knows in known]
    text = " ".join(tables.markdown({**results, "rows": some}).split())
    assert text.count("honest but curious server") == 1 and text.count("no BatchNorm") == 1
    assert "Threat model: honest but curious server;" in text and "no BatchNorm; what else, in the notes." in text
    notes = [part.split(" Note ")[0] for part in text.split(": ") if part.startswith("knows")]
    assert sorted(notes) == ["knows no labels", "knows the labels", "knows the labels and the noise law"]  # a note for each, the checkpoint has a column
    assert "honest but curious server; final checkpoint; gradient of one batch of 1; knows no labels; no BatchNorm" in tables.csv({**results, "rows": some})
    alone = " ".join(tables.markdown({**results, "rows": some[:1]}).split())
    assert "gradient of one batch of 1; knows the labels; no BatchNorm. " in alone and "in the notes" not in alone


def test_columns_that_nothing_fills_are_left_out_however_wide_the_page(results):
    from gidef.report.tables import text

    for width in (80, 100, 120, 200):
        shown = text(results, width)
        assert "eps" not in shown and "delta" not in shown and "PSNR" in shown
        private = [{**row, "epsilon": 3.0, "delta": 1e-5} for row in results["rows"]]
        shown = text({**results, "rows": private}, width)
        assert "eps" in shown and "3.00" in shown


@pytest.fixture
def tuned(results):
    """Searches as an older version records them, and one with what a later one says."""
    spec = {"type": "Matched", "field": "std", "low": 0.1, "high": 10.0, "defence": {"type": "IsotropicNoise"}}
    results["recipe"]["defences"] |= dict.fromkeys(("met", "never costs", "coarse", "told", "top"), spec)
    one = {"field": "std", "target": 0.9}
    results["tuned"] = {
        "met": one | {"value": 2.345678, "tried": [[10.0, 0.5], [0.1, 0.95], [2.345678, 0.8955]]},
        "never costs": one | {"value": 10.0, "tried": [[10.0, 0.95]]},
        "coarse": one | {"value": 1.0, "tried": [[10.0, 0.5], [0.1, 0.95], [1.0, 0.87]]},
        "told": one | {"value": 0.1, "tried": [[10.0, 0.5], [0.1, 0.895]], "reached": False, "accuracy": 0.895},
        "top": one | {"value": 10.0, "tried": [[10.0, 0.901]]},
        "bare": {"field": "std", "value": 3.0},
    }  # fmt: skip
    return results


def test_the_strengths_that_a_search_found_stand_in_a_table_with_its_outcome(tuned, results):
    assert tables.tuned_cells(tuned) == [
        ("defence", "field", "value", "target acc. %", "reached acc. %", "trials", "outcome"),
        ("met", "std", "2.346", "90.0", "89.5", "3", "reached"),
        ("never costs", "std", "10", "90.0", "95.0", "1", "NOT reached: the search ended at the high end of its range [0.1, 10]"),
        ("coarse", "std", "1", "90.0", "87.0", "3", "NOT reached: the nearest of its trials"),
        ("told", "std", "0.1", "90.0", "89.5", "2", "NOT reached: the search ended at the low end of its range [0.1, 10]"),
        ("top", "std", "10", "90.0", "90.1", "1", "reached, at the high end of its range [0.1, 10]"),
        ("bare", "std", "3", "-", "-", "-", "not recorded"),
    ]
    page = tables.text(tuned, 120)
    assert "strengths found by a search" in page and "2.346" in page and "the high end" in " ".join(page.split()) and max(map(len, page.splitlines())) <= 120
    written = tables.markdown(tuned).splitlines()
    assert "| met | std | 2.346 | 90.0 | 89.5 | 3 | reached |" in written and "| --- | --- | ---: | ---: | ---: | ---: | --- |" in written
    del tuned["tuned"]
    assert tables.tuned_cells(results) == [] and tables.tuned_table(results) is None and "search" not in tables.text(results) + tables.markdown(results)


def test_the_page_shows_what_was_searched(tuned):
    shown = html.render([html.Page(name="one", results=tuned)])
    assert "Tuned: strengths found by a search</figcaption>" in shown and '<td class="number">2.346</td>' in shown
    assert shown.count("NOT reached") == 3, "JSON apart, once for each search"
    del tuned["tuned"]
    assert "Tuned:" not in html.render([html.Page(name="one", results=tuned)])


def test_an_attack_with_nothing_to_attack_is_a_row_that_says_why_everywhere(results):
    from gidef.report.html import Page, render
    from gidef.report.results import validate

    before = tables.markdown(results)
    results["not_applicable"] = [{"defence": "plain", "attack": "zeroed", "attack_id": "A11", "reason": "it needs noise"}] * 2
    validate(results)
    said = tables.markdown(results)
    assert said.count("| plain | zeroed |  | - | - | - | - | - |") == 2 and said.count("not applicable: it needs noise") == 1 and "zeroed" not in before
    assert "not applicable: it needs noise" in tables.latex(results) and "not applicable: it needs noise" in " ".join(tables.text(results, 100).split())
    lines = list(csv.DictReader(io.StringIO(tables.csv(results))))
    assert [(line["kind"], line["psnr_db_mean"], line["note"]) for line in lines[3:5]] == [("not applicable", "", "not applicable: it needs noise")] * 2
    assert render([Page(name="run", results=results)]).count(">not applicable: it needs noise<") == 2


def test_observations_are_counted_where_they_are_of_several_victims(results):
    for row in results["rows"]:
        row["observations"] = 64
    assert "over victims with 95 % intervals; attack" in " ".join(tables.text(results, 160).split())
    for row in results["rows"]:
        row["observations"] = 16
    told = "over victims with 95 % intervals, which are over observations (16 batches of 4 images); attack"
    for render in (tables.text, tables.markdown):
        assert told in " ".join(render(results).split())
    assert told.replace("%", r"\%") in tables.latex(results)
    assert [line["observations"] for line in csv.DictReader(io.StringIO(tables.csv(results)))] == ["16"] * 3 + [""] * 4
