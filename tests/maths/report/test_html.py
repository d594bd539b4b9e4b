import base64
import copy
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gidef.checkpoint import save_file
from gidef.job import report_again
from gidef.report import html, results, svg
from gidef.report.markup import image_uri, json_script, tag
from gidef.report.record import Record
from gidef.report.verdict import strongest, verdict

HOSTILE = "<script>alert(1)</script>"
VOID = {"meta", "img", "input", "br"}
SECTIONS = ["shows", "table", "utility", "sheets", "victims", "clients", "learning", "cost", "origin"]
VICTIMS = [7, 3, 40]


class Element:
    def __init__(self, name, attributes, parent):
        self.name, self.attributes, self.parent, self.children, self.data = name, attributes, parent, [], []

    def all(self, name=None, **wanted):
        """Descendants of a name with these attributes (`_` for `-`), in document order."""
        for child in self.children:
            if (name is None or child.name == name) and all(child.attributes.get(key.strip("_").replace("_", "-")) == value for key, value in wanted.items()):
                yield child
            yield from child.all(name, **wanted)

    def one(self, name=None, **wanted):
        (found,) = self.all(name, **wanted)
        return found

    @property
    def text(self):
        return "".join(part if isinstance(part, str) else part.text for part in self.data)


class Tree(HTMLParser):
    """A strict reader: everything that is opened is closed, in order."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.root = self.here = Element("document", {}, None)
        self.feed(page)
        self.close()
        assert self.here is self.root, f"<{self.here.name}> is not closed"

    def handle_starttag(self, name, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in <{name}>"
        element = Element(name, dict(attributes), self.here)
        self.here.children.append(element)
        self.here.data.append(element)
        if name not in VOID:
            self.here = element

    def handle_endtag(self, name):
        assert self.here.name == name, f"</{name}> closes <{self.here.name}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.data.append(data)


def read(page):
    return Tree(page).root


def complete(content):
    """The made-up results with all that a finished run has beside them."""
    for number, run in enumerate(content["training"]):
        run |= {"client_accuracies": [0.9 - 0.01 * number, 0.8, 0.7], "seconds": 12.5, "seconds_per_round": 0.3125, "bytes_per_round": 2_400_000, "peak_gib": 1.25}
    for row in content["rows"]:
        row["client_accuracies"] = [row["client_accuracy"] - 0.01, row["client_accuracy"] + 0.02]
        row["threat"]["name"] = "honest but curious server, gradient of one batch of 1"
    content["pictures"] = ["pictures/reconstructions-final.png", "pictures/partition.png", "../outside.png", "pictures/gone.png"]
    content["verdict"] = verdict(content)
    return content


def psnr(victim, defence, attack, seed):
    return 10.0 + victim / 8 + len(defence) + len(attack) / 16 + seed / 4


def make_run(folder, content, *, labels=("a cell", "a cell", "another"), error="", side=8):
    """A run's folder: results, record, a contact sheet's images, pictures."""
    folder.mkdir(parents=True)
    results.save(folder / "results.json", content)
    cells = [(row["defence"], row["attack"]) for row in content["rows"]]
    with Record(folder / "record.jsonl") as record:
        for defence in dict.fromkeys(row["defence"] for row in content["rows"]):
            for number in range(1, 6):
                record.append("round", defence=defence, seed=0, round=number, val_accuracy=0.1 * number)
        for defence, attack in cells:
            for seed in (0, 1):
                for client, victim in enumerate(VICTIMS):
                    record.append("attack", defence=defence, attack=attack, checkpoint="untrained", seed=seed, victim=victim, client=client % 2, ssim=0.25,
                                  status="failed" if error else "ok", error=error, psnr_db=psnr(victim, defence, attack, seed))  # fmt: skip
    images = torch.rand(2 + len(cells), len(VICTIMS), 3, side, side, generator=torch.Generator().manual_seed(0))
    titles = ["private", "no gradient:\nclass mean", *(f"{defence}:\n{attack}" for defence, attack in cells)]
    rows = [f"{label} #{victim}" for label, victim in zip(labels, VICTIMS, strict=True)]
    meta = {"titles": titles, "captions": [None] + [["9.9 dB"] * len(VICTIMS)] * (len(titles) - 1), "row_labels": rows, "title": "a sheet"}
    sheet = folder / "pictures" / "reconstructions-untrained.safetensors"
    sheet.parent.mkdir()
    save_file(sheet, {f"{number:03d}": one for number, one in enumerate(images)}, meta)
    for name in ("pictures/reconstructions-final.png", "pictures/partition.png", "../outside.png"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name)
    return images


@pytest.fixture
def run(results, tmp_path):
    content = complete(results)
    images = make_run(tmp_path / "one", content)
    return content, images, tmp_path / "one"


def page_of(*folders):
    return html.write(folders).read_text()


def uri_pixels(uri):
    assert uri.startswith("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2], validate=True))) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def test_the_page_is_well_formed_and_its_sections_come_in_order(run):
    tree = read(page_of(run[2]))
    ids = [element.attributes["id"] for element in tree.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    assert [section.attributes["id"] for section in tree.all("section")] == SECTIONS
    assert {link.attributes["href"][1:] for link in tree.all("a")} <= set(ids)
    assert [item.text for item in tree.one("ul", class_="verdict").all("li")] == run[0]["verdict"] != []
    assert tree.one("h1").text == tree.one("head").one("title").text == "quickstart: what the shared updates gave away, bloodmnist"
    assert next(tree.all("html")).attributes["lang"] == "en"


def test_the_page_loads_nothing_and_says_so_before_anything_else(run):
    tree = read(page_of(run[2]))
    policy = tree.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    order = [element.name for element in tree.one("head").all()]
    assert order.index("meta") < order.index("style") and order[1] == "meta"
    for element in tree.all():
        assert element.name not in ("link", "iframe", "object", "embed", "base", "video", "audio", "use", "image")
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name not in ("srcset", "action", "poster", "data", "background", "style"), (element.name, name)
            if name in ("href", "src"):
                assert value.startswith(("#", "data:image/png;base64,")), value[:60]
    assert len(list(tree.all("style"))) == 1 and "url(" not in tree.one("style").text and "@import" not in tree.one("style").text
    assert [script.attributes.get("type") for script in tree.all("script")] == ["application/json", None]
    assert not re.search(r"fetch|XMLHttp|WebSocket|import\(|eval|innerHTML|document\.write", list(tree.all("script"))[-1].text)


def test_all_pictures_are_png_and_those_of_victims_are_the_saved_images(run):
    content, images, folder = run
    tree = read(page_of(folder))
    assert all(uri_pixels(image.attributes["src"]).shape[-1] == 3 and "alt" in image.attributes for image in tree.all("img"))
    expected = np.round(255 * images.numpy().transpose(0, 1, 3, 4, 2)).astype(np.uint8)
    for place, victim in enumerate(VICTIMS):
        detail = tree.one("article", id=f"v0-{victim}")
        found = [uri_pixels(image.attributes["src"]) for image in detail.all("img")]
        assert np.array_equal(np.stack(found), expected[:, place])
    (sheet,) = tree.one("section", id="sheets").all("img")
    assert sheet.attributes["src"].endswith(base64.b64encode((folder / "pictures/reconstructions-final.png").read_bytes()).decode())
    assert len(list(tree.one("section", id="clients").all("img"))) == 1, "the partition's picture; the file outside the folder stays out"


def test_large_images_are_averaged_down_and_small_ones_left_alone():
    pixels = np.random.default_rng(0).random((128, 128, 3))
    small = pixels.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(uri_pixels(image_uri(pixels, 64)).astype(int) - 255 * small).max() <= 1.5
    assert uri_pixels(image_uri(pixels[:5, :7], 64)).shape == (5, 7, 3)
    assert uri_pixels(image_uri(pixels[:128, :2], 64)).shape == (64, 1, 3)


def test_the_numbers_of_the_table_are_those_of_the_results(run):
    content, _, folder = run
    tree = read(page_of(folder))
    rows = list(tree.one("table", id="rows").one("tbody").all("tr"))
    entries = content["rows"] + content["bounds"]
    assert len(rows) == len(entries)
    for row, entry in zip(rows, entries, strict=True):
        for key in results.MEASURED:
            cell, value = row.one("td", data_key=key), entry.get(key)
            parts = value if isinstance(value, dict) else {"mean": value}
            for name, part in (("data-value", "mean"), ("data-low", "low"), ("data-high", "high")):
                assert cell.attributes.get(name) == (None if parts.get(part) is None else repr(parts[part])), (key, part)
        assert row.one("td", data_key="worst").attributes["data-value"] == repr(entry["psnr_db"]["worst"])
    assert rows[0].one("td", data_key="psnr_db").text == "24.4 [23.8, 25.0]" and rows[0].one("td", data_key="client_accuracy").text == "90.0"
    assert rows[2].one("td", data_key="mse").text == "20.00 [17.00, 23.00]"
    heads = [head.text for head in tree.one("table", id="rows").one("thead").all("th")]
    assert rows[0].children[heads.index("threat model")].text == content["rows"][0]["threat"]["name"]
    assert rows[0].children[heads.index("PSNR dB")].attributes["data-key"] == "psnr_db"
    assert json.loads(tree.one("script", id="data").text) == {"format": 1, "runs": [{"name": "quickstart one", "results": content}]}


def test_bounds_and_attackers_of_another_kind_are_marked(results, make_row, tmp_path):
    results["bounds"].append({"name": "shuffled gradient", "psnr_db": 9.0})
    results["rows"] += [make_row("plain", name, number, 50.0) for name, number in (("d", "A12"), ("malicious", "A11"), ("e", "standard"), ("s", "control"))]
    results["rows"].append(make_row("learned", "malicious", "A11", 50.0))
    make_run(tmp_path / "one", results)
    tree = read(page_of(tmp_path / "one"))
    marked = {}
    for row in tree.one("table", id="rows").one("tbody").all("tr"):
        badges = [badge.text for badge in row.all("span", class_="tag")]
        if row.attributes.get("class") == "bound":
            assert badges == ["bound"]
        marked[row.attributes["data-defence"], row.attributes["data-attack"]] = badges
    assert marked["shuffled gradient", "none"] == ["bound"] and marked["plain", "naive"] == []
    assert marked["plain", "d"] == ["bound: is given the latent"] and marked["plain", "malicious"] == ["malicious server"]
    assert marked["plain", "e"] == ["worst case per image"] and marked["plain", "s"] == ["shuffled control"]
    points = [point.one("title").text for point in tree.one("section", id="utility").all("g", class_="point")]
    assert all("(naive)" in text or "(joint)" in text for text in points), "none of the four competes in the plots"
    best, shown = psnr(7, "learned", "naive", 0), next(tree.one("ul", class_="faces").all("span", class_="interval")).text
    assert psnr(7, "learned", "malicious", 0) > best and shown == f"up to {best:.1f} dB", "nor on a victim's face"


IDLE = {"defence": "plain", "attack": "zeroed", "attack_id": "A11", "reason": "it needs noise"}


def test_attacks_that_were_not_run_are_marked_as_such(results, tmp_path):
    results["not_applicable"] = [IDLE]
    make_run(tmp_path / "one", results)
    rows = list(read(page_of(tmp_path / "one")).one("table", id="rows").one("tbody").all("tr"))
    assert [row.attributes.get("class") for row in rows] == [None] * 3 + ["idle"] + ["bound"] * 4
    assert "not applicable: it needs noise" in rows[3].text


def hostile(content):
    """The results with markup in every text that a user or a data set can name."""
    names = {"plain": HOSTILE, "learned": '"><img src=x onerror=alert(1)>'}
    content = json.loads(json.dumps(content))
    content["recipe"]["defences"] = {names[key]: value | {"note": "</script><script>alert(2)</script><!--"} for key, value in content["recipe"]["defences"].items()}
    for entry in content["rows"] + content["training"]:
        entry["defence"] = names[entry["defence"]]
    for row in content["rows"]:
        row |= {"attack": f"<b>{row['attack']}</b> & 'co'", "note": "</td></table><h1>note</h1>"}
        row["threat"]["name"] = "<i>threat</i> &amp; \" '"
    content["data"] |= {"title": "</title><svg onload=alert(3)>", "source": "https://example.org/<x>", "md5": "<em>"}
    content["recipe_name"] = "</h1><marquee>"
    content["versions"]["<u>"] = content["hardware"]["<s>"] = "<strike>"
    content["weights_sha256"] = {"<del>": "<ins>"}
    content["seconds"]["attack"] = {"<form>": 1.0}
    content["verdict"] = [*verdict(content), "<h6>verdict</h6>\ud800"]
    return content


def test_markup_in_names_recipe_notes_and_errors_stays_text(run, tmp_path):
    content, _, folder = run
    bad = hostile(content)
    bad["verdict"][-1] = "<h6>verdict</h6>"
    make_run(tmp_path / "<two>", bad, labels=("<i>cell</i>", "cell #", "&lt;"), error="<b>failed</b> </script> & more")
    quiet = copy.deepcopy(content)
    quiet["seconds"]["attack"], quiet["weights_sha256"] = {"a": 1.0}, {"b": "c"}
    quiet["verdict"] = ["x"] * len(bad["verdict"])
    make_run(tmp_path / "two", quiet, error="failed")
    plain, tree = read(page_of(tmp_path / "two")), read(page_of(tmp_path / "<two>"))

    def shape(root):  # the made-up PSNR, and so the ticks, depends on the length of names; versions have more entries here
        return [element.name for element in root.all() if element.name not in ("dt", "dd", "line", "text")]

    assert shape(plain) == shape(tree), "markup in a text made an element"
    assert {element.name for element in tree.all()} == {element.name for element in plain.all()}
    assert {name for element in tree.all() for name in element.attributes} == {name for element in plain.all() for name in element.attributes}
    row = next(tree.one("table", id="rows").one("tbody").all("tr"))
    assert row.one("th").text == HOSTILE == row.attributes["data-defence"]
    assert row.children[1].text == "<b>naive</b> & 'co'" and row.children[-2].text == "</td></table><h1>note</h1>"
    assert tree.one("h1").text == "</h1><marquee>: what the shared updates gave away, </title><svg onload=alert(3)>"
    assert "<b>naive</b> & 'co' failed: <b>failed</b> </script> & more" in tree.one("article", id="v0-7").text
    assert tree.one("article", id="v0-7").one("h4").text == "<i>cell</i> #7, client 0"
    assert json.loads(tree.one("script", id="data").text)["runs"][0]["results"] == bad
    assert json.loads(tree.one("pre").text) == bad["recipe"]
    assert "https://example.org/<x>" in [value.text for value in tree.all("dd")]


def test_half_a_surrogate_in_a_text_does_not_break_the_page(results, tmp_path):
    page = html.render([html.Page(name="one", results=hostile(complete(results)))])
    assert "verdict&lt;/h6&gt;\ud800" in page and read(page.encode(errors="replace").decode())


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>&amp;", "\u2028", 'a"b\\'])
def test_embedded_json_holds_no_markup(text):
    script = json_script("data", {text: [text, 1.5, None]})
    assert re.search("[<>&]", script[len('<script type="application/json" id="data">') : -len("</script>")]) is None
    assert json.loads(read(script).one("script").text) == {text: [text, 1.5, None]}


def test_elements_escape_text_and_attributes():
    made = tag("td", "<", tag("b", "&"), None, [1, "\""], class_="a\"b'<", data_x=None, hidden=True, id=False)
    assert made == "<td class=\"a&quot;b&#x27;&lt;\" hidden>&lt;<b>&amp;</b>1\"</td>"
    assert tag("img", src="x", alt="") == '<img src="x" alt="">'


def test_several_runs_share_one_table_and_each_is_named(run, tmp_path):
    content, _, folder = run
    other = copy.deepcopy(content)
    other["recipe_name"], other["rows"] = "quickstart", other["rows"][:1]
    make_run(tmp_path / "deeper" / "one", other)
    path = html.write([folder, tmp_path / "deeper" / "one"])
    assert path == folder / "report.html" and not (tmp_path / "deeper" / "one" / "report.html").exists()
    tree = read(path.read_text())
    owners = [row.children[0].text for row in tree.one("table", id="rows").one("tbody").all("tr")]
    assert owners == ["quickstart one"] * 7 + ["quickstart one #2"] * 5
    assert tree.one("h1").text == "2 runs side by side"
    assert [[head.text for head in section.all("h3")] for section in tree.all("section") if section.attributes["id"] not in ("table", "utility")] == [
        ["quickstart one", "quickstart one #2"]
    ] * 7
    points = list(tree.one("section", id="utility").all("g", class_="point"))
    assert len(points) == 2 * 3 and sum("quickstart one #2" in point.one("title").text for point in points) == 2
    assert [level.text for level in tree.one("section", id="utility").all("text", class_="quiet")][0] == "class mean", "the same for both, named once"
    assert len(list(tree.all("article"))) == 6


def test_a_run_without_record_pictures_training_or_attacks_has_a_page(results, tmp_path):
    results |= {"training": [], "judge": {}, "seconds": {}, "hardware": {}}
    assert [section.attributes["id"] for section in read(html.render([html.Page(name="one", results=results)])).all("section")] == [
        "shows", "table", "utility", "origin",
    ]  # fmt: skip
    results |= {"rows": [], "bounds": []}
    for key in ("judge", "seconds", "hardware", "verdict", "pictures"):
        del results[key]
    results["recipe"] = {}
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "results.json").write_text(json.dumps(results))
    assert [section.attributes["id"] for section in read(page_of(tmp_path / "bare")).all("section")] == ["shows", "table", "origin"]


def test_report_names_the_files_that_are_there_and_no_others(run, tmp_path, capsys):
    content, _, folder = run
    content["data"]["title"] = "made-up cells"
    results.save(folder / "results.json", content)
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "results.json", tmp_path / "bare" / "results.json")
    told = []
    for place in (folder, tmp_path / "bare"):
        report_again([place])
        told.append([word.rstrip(",;") for word in capsys.readouterr().out.split()])
        named = [word for word in told[-1] if word.startswith(str(tmp_path))]
        assert len(named) > 2 and all(Path(word).exists() for word in named)
    assert str(folder / "record.jsonl") in told[0] and str(folder / "pictures/partition.png") in told[0]
    assert "record" not in told[1] and str(tmp_path / "bare/pictures/tradeoff.png") in told[1]


def test_points_of_the_plots_are_the_strongest_attacks(run):
    content, _, folder = run
    plots = list(read(page_of(folder)).one("section", id="utility").all("svg"))
    assert len(plots) == 2
    for plot, key, unit in zip(plots, ("psnr_db", "attacker_accuracy"), (1, 100), strict=True):
        found = [(float(point.attributes["data-x"]), float(point.attributes["data-y"])) for point in plot.all("g", class_="point")]
        means = [(row["defence"], row[key]["mean"] if isinstance(row[key], dict) else row[key]) for row in content["rows"]]
        assert found == [(90.0, unit * max(mean for name, mean in means if name == defence)) for defence in ("plain", "learned")]
    assert "[89.00, 92.00]" in next(plots[0].all("g", class_="point")).one("title").text, "across: from the worst to the best seed"
    assert [level.text for level in plots[0].all("text", class_="quiet")] == ["class mean"]


def test_points_and_levels_are_drawn_where_their_numbers_say(run):
    plot = next(read(page_of(run[2])).one("section", id="utility").all("svg"))
    ticks = {float(text.text): float(text.attributes["y"]) - 4 for text in plot.all("text", text_anchor="end")}
    slope, start = np.polyfit(list(ticks), list(ticks.values()), 1)
    for point in plot.all("g", class_="point"):
        drawn = float(point.one("path").attributes["transform"].partition(",")[2][:-1])
        assert abs(drawn - (start + slope * float(point.attributes["data-y"]))) < 0.2
    level = plot.one("line", class_="level")
    assert abs(float(level.attributes["y1"]) - (start + slope * 19.0)) < 0.2 and slope < 0, "the class mean's PSNR"


def test_the_strongest_attack_is_the_one_whose_interval_ends_highest(make_row):
    rows = [make_row("x", "a", "A0", 20.0, 0.1), make_row("x", "b", "A3", 19.0, 2.0), make_row("x", "c", "A12", 40.0), make_row("x", "d", "A11", 90.0)]
    rows[0]["attacker_accuracy"] = 0.9
    assert strongest(rows)["attack"] == "b" and strongest(rows, "attacker_accuracy")["attack"] == "a"
    assert strongest(rows[2:]) is None and strongest([]) is None
    rows[1]["psnr_db"] = None
    assert strongest(rows)["attack"] == "a"
    rows[0]["attacker_accuracy"] = None
    assert strongest(rows[:1], "attacker_accuracy") is None
    tied = [make_row("x", "a", "A0", 20.0, 2.0), make_row("x", "b", "A3", 21.0, 1.0)]
    assert strongest(tied)["attack"] == strongest(tied[::-1])["attack"] == "b"


def private(results, make_row):
    """Results with differentially private rows, one of them without noise: JSON's null beside a delta is an infinite epsilon."""
    for name, epsilon, unit in (("dp 8", 8.004, "image"), ("dp 3", 3.0, "client"), ("clipped", None, "image")):
        results["rows"].append(make_row(name, "naive", "A0", 9.0, epsilon=epsilon, delta=1e-5, privacy_unit=unit))
    results["rows"][0] |= {"epsilon": None, "delta": None}
    return results


def test_epsilon_and_delta_have_columns_where_a_training_was_private(results, make_row, tmp_path):
    content = copy.deepcopy(results)
    make_run(tmp_path / "one", private(results, make_row))
    tree = read(page_of(tmp_path / "one"))
    table = tree.one("table", id="rows")
    heads = [head.text for head in table.one("thead").all("th")]
    cells = {row.attributes["data-defence"]: [row.children[heads.index(name)] for name in ("epsilon", "delta")] for row in table.one("tbody").all("tr")}
    shown = {name: [(cell.text, cell.attributes.get("data-value")) for cell in both] for name, both in cells.items()}
    assert shown["dp 8"] == [("8.00", "8.004"), ("1e-05", "1e-05")] and shown["dp 3"][0] == ("3.00", "3.0")
    assert shown["clipped"] == [("inf", "Infinity"), ("1e-05", "1e-05")]
    assert shown["plain"] == shown["class mean"] == [("–", None)] * 2
    assert "presence of one image or client" in tree.one("section", id="table").text
    make_run(tmp_path / "two", content)
    assert "psilon" not in read(page_of(tmp_path / "two")).one("section", id="table").text


def drawn(results, make_row, given):
    """(title → point, the joined points of each line, by name) of the PSNR plot, for defences name → (JSON, PSNR, client accuracy)."""
    results["recipe"]["defences"] |= {name: spec for name, (spec, _, _) in given.items()}
    for name, (_, value, accuracy) in given.items():
        results["rows"].append(make_row(name, "joint", "A3", value, accuracy=accuracy))
    plot = next(read(html.render([html.Page(name="one", results=results)])).one("section", id="utility").all("svg"))
    points = {point.one("title").text.partition(" (")[0]: point for point in plot.all("g", class_="point")}
    places = {re.search(r"\((.*)\)", point.one("path").attributes["transform"])[1]: name for name, point in points.items()}
    return points, [[places[spot] for spot in line.attributes["points"].split()] for line in plot.all("polyline")]


def style(point):
    return point.attributes["fill"], point.one("path").attributes["d"]


def test_strengths_of_one_kind_of_defence_are_joined(results, make_row):
    dp = {"type": "DPSGD", "clip": 1.0}
    given = {
        "weak": (dp | {"noise_multiplier": 0.5}, 18.0, 0.8), "strong": (dp | {"noise_multiplier": 2.0}, 12.0, 0.6),
        "both": ([dp | {"noise_multiplier": 0.5}, {"type": "BiDO"}], 9.0, 0.5),
    }  # fmt: skip
    points, lines = drawn(results, make_row, given)
    assert style(points["weak"]) == style(points["strong"]) and points["plain"].attributes["fill"] == "currentColor"
    assert len({style(points[name]) for name in ("plain", "learned", "weak", "both")}) == 4
    assert lines == [["strong", "weak"]], "from the lower accuracy to the higher"


def matched(field, **defence):
    return {"type": "Matched", "defence": defence, "field": field, "low": 0.1, "high": 10.0}


def test_defences_at_a_matched_accuracy_are_of_their_own_kind_and_no_search_joins_them(results, make_row):
    given = {
        "dp": (matched("noise_multiplier", type="DPSGD", noise_multiplier=1.0, target_epsilon=None), 18.0, 0.8),
        "dp 8": ({"type": "DPSGD", "noise_multiplier": None, "target_epsilon": 8.0}, 10.0, 0.5),
        "bido": (matched("x_weight", type="BiDO", x_weight=0.05), 17.0, 0.81), "iso": (matched("std", type="IsotropicNoise", std=1.0), 16.0, 0.82),
        "iso 4": ({"type": "IsotropicNoise", "std": 4.0}, 12.0, 0.7),
        "ours": (matched("dependence_weight", type="LearnedPerturbation"), 15.0, 0.83),
        "pair": (matched("std", type="nothing") | {"defence": [{"type": "IsotropicNoise", "std": 1.0}, {"type": "Pruning", "share": 0.9}]}, 14.0, 0.84),
    }  # fmt: skip
    results["tuned"] = {"iso": {"field": "std", "value": 2.5}}
    points, lines = drawn(results, make_row, given)
    assert style(points["dp"]) == style(points["dp 8"]) and style(points["iso"]) == style(points["iso 4"]) and style(points["ours"]) == style(points["learned"])
    assert len({style(points[name]) for name in ("plain", "dp", "bido", "iso", "ours", "pair")}) == 6
    assert lines == [["iso 4", "iso"]], "the strength that the search found, 2.5, and the stated one; two ways to state noise are two fields"


def test_what_differs_in_more_than_a_strength_is_of_the_family_without_the_line(results, make_row):
    base = {"type": "LearnedPerturbation", "dependence": "pearson2", "dependence_weight": 1.0, "strength": 1.0, "decoder_width": 1.0, "cut": None}
    given = {
        "full": (base, 12.0, 0.70), "weight 5": (base | {"dependence_weight": 5.0}, 11.0, 0.60), "weight 0": (base | {"dependence_weight": 0.0}, 14.0, 0.75),
        "kappa 2": (base | {"strength": 2.0}, 10.0, 0.65), "decoder": (base | {"decoder_width": 4.0}, 12.5, 0.71),
        "measure": (base | {"dependence": "cka"}, 12.6, 0.72), "place": (base | {"cut": "blocks.0"}, 12.7, 0.73),
        "mine 1": ({"type": "mine:Noise", "power": 1}, 9.0, 0.55), "mine 2": ({"type": "mine:Noise", "power": 2}, 8.0, 0.5),
    }  # fmt: skip
    points, lines = drawn(results, make_row, given)
    assert len({style(points[name]) for name in given if not name.startswith("mine")}) == 1
    assert sorted(lines) == [["kappa 2", "full"], ["mine 2", "mine 1"], ["weight 5", "full", "weight 0"]]


def test_victims_show_every_attack_and_come_most_leaked_first(run):
    content, _, folder = run
    tree = read(page_of(folder))
    faces = list(tree.one("ul", class_="faces").all("a"))
    assert [face.attributes["data-victim"] for face in faces] == [f"v0-{victim}" for victim in VICTIMS]
    for client, victim in enumerate(VICTIMS):
        detail = tree.one("article", id=f"v0-{victim}")
        assert f"#{victim}, client {client % 2}" in detail.one("h4").text
        found = [float(figure.attributes["data-psnr"]) for figure in detail.all("figure") if "data-psnr" in figure.attributes]
        rows = sorted(content["rows"], key=lambda row: ["plain", "learned"].index(row["defence"]))
        assert found == [psnr(victim, row["defence"], row["attack"], 0) for row in rows]
        first = psnr(victim, "plain", "naive", 0)
        told = next(figure.text for figure in detail.all("figure") if "data-psnr" in figure.attributes)
        assert told == f"naive{first:.1f} dBSSIM 0.25seeds {first:.1f} to {first + 0.25:.1f} dB"
    dots = [float(dot.attributes["data-value"]) for dot in tree.one("section", id="victims").all("path", data_victim="v0-7")]
    assert sorted(dots) == sorted(psnr(7, row["defence"], row["attack"], 0) for row in content["rows"])
    best = max(psnr(7, row["defence"], row["attack"], 0) for row in content["rows"])
    assert faces[0].one("span", class_="interval").text == f"up to {best:.1f} dB"


def test_victims_without_saved_images_show_their_numbers_alone(run):
    (run[2] / "pictures" / "reconstructions-untrained.safetensors").unlink()
    tree = read(page_of(run[2]))
    assert [face.children[0].text for face in tree.one("ul", class_="faces").all("a")] == [f"image #{victim}" for victim in VICTIMS]
    assert not list(tree.one("section", id="victims").all("img")) and "no picture" in tree.one("article", id="v0-40").text


def test_too_many_pictures_are_left_out_and_the_page_says_so(run, monkeypatch):
    monkeypatch.setattr(html, "_MOST_IMAGES", 10)  # five per victim
    tree = read(page_of(run[2]))
    assert "pictures of the first 2 victims are embedded" in tree.one("section", id="victims").text
    assert [len(list(detail.all("img"))) for detail in tree.all("article")] == [5, 5, 0]


def test_clients_show_their_accuracy_and_what_the_strongest_attack_takes(run):
    content, _, folder = run
    accuracy, leaks = list(read(page_of(folder)).one("section", id="clients").all("svg"))
    accuracies = [100 * value for run in content["training"] for value in run["client_accuracies"]]
    assert [float(dot.attributes["data-value"]) for dot in accuracy.all("path", class_="dot")] == accuracies
    found = [float(dot.attributes["data-value"]) for dot in leaks.all("path", class_="dot")]
    expected = []
    for defence, attack in (("plain", "naive"), ("learned", "joint")):
        for client in (0, 1):
            values = [psnr(victim, defence, attack, seed) for seed in (0, 1) for number, victim in enumerate(VICTIMS) if number % 2 == client]
            expected.append(np.mean(values))
    assert np.allclose(found, expected, rtol=0, atol=1e-12)


def test_learning_curves_cost_and_origin_are_as_recorded(run):
    content, _, folder = run
    tree = read(page_of(folder))
    curves = list(tree.one("section", id="learning").all("polyline"))
    assert [len(curve.attributes["points"].split()) for curve in curves] == [5, 5]
    assert curves[0].attributes["stroke"] != curves[1].attributes["stroke"]
    cost = next(tree.one("section", id="cost").all("tbody"))
    for row, training in zip(cost.all("tr"), content["training"], strict=True):
        assert {cell.attributes["data-key"]: float(cell.attributes["data-value"]) for cell in row.all("td") if "data-key" in cell.attributes} == {
            key: training[key] for key in ("rounds", "seconds", "seconds_per_round", "bytes_per_round", "peak_gib")
        }  # fmt: skip
    assert "2.40" in cost.text and "without keys, shares and framing" in tree.one("section", id="cost").text
    facts = dict(zip((name.text for name in tree.all("dt")), (value.text for value in tree.all("dd")), strict=True))
    assert facts["md5"] == "00" and facts["source"] == "a file" and facts["seeds"] == "0, 1, 2" and facts["python"] == "3.11" and facts["cpu"] == "x86"
    assert facts["weights plain/0 (SHA-256)"] == "ab" and json.loads(tree.one("pre").text) == content["recipe"]


@pytest.mark.parametrize(("of", "head"), [("training", "process peak gib"), ("process", "process peak so far gib"), (None, "process peak so far gib")])
def test_a_peak_that_earlier_trainings_are_part_of_is_called_so_far(results, tmp_path, of, head):
    for run in results["training"]:
        run |= {"process_peak_gib": 1.25} | ({"process_peak_of": of} if of else {})
    make_run(tmp_path / "one", results)
    cost = next(read(page_of(tmp_path / "one")).one("section", id="cost").all("table"))
    assert [one.text for one in cost.one("thead").all("th")] == ["defence", "seed", "rounds", head]
    assert [[cell.text for cell in row.all("td")][-1] for row in cost.one("tbody").all("tr")] == ["1.25"] * 2


def crowd(defences, *, seeds=3, last=30):
    """Learning curves by seed that all end within a few points, their styles and their defences."""
    families = {f"defence {defence}, seed {seed}": f"defence {defence}" for defence in range(defences) for seed in range(seeds)}
    series = {label: [(step, 20.0 + 2 * step + 0.03 * place) for step in range(1, last + 1)] for place, label in enumerate(families)}
    return series, {label: (1 + place // seeds, place % seeds) for place, label in enumerate(families)}, families


def names_of(drawn, label="defence"):
    """(name, its middle's height) of the curves, and the plot's height."""
    plot = read(drawn).one("svg")
    texts = [(text.text, float(text.attributes["y"]) - 4) for text in plot.all("text") if text.text.startswith(label)]
    return texts, float(plot.attributes["viewbox"].split()[-1])


@pytest.mark.parametrize("defences", [1, 6, 7, 14, 24])
@pytest.mark.parametrize("together", [False, True])
def test_names_of_many_curves_stay_in_their_plot_and_apart(defences, together):
    series, styles, families = crowd(defences)
    drawn = svg.curves(series, styles, name="n", xlabel="round", ylabel="y", level=("chance", 12.5), families=families if together else None)
    names, height = names_of(drawn)
    merged = together and 3 * defences > 18
    assert sorted(name for name, _ in names) == sorted(set(families.values()) if merged else series)
    places = sorted(y for _, y in names)
    assert all(later - place >= 13.9 for place, later in zip(places, places[1:], strict=False)) and places[0] >= 7 and places[-1] <= height - 5
    tree = read(drawn)
    assert len(list(tree.all("polyline"))) == len(series) and [title.text for title in tree.all("title")] == list(series)
    order = [name for name, _ in sorted(names, key=lambda one: -one[1])]
    assert order == list(dict.fromkeys(families.values()) if merged else series), "from the bottom in the order of their ends"
    assert height < 700 or not merged, "a sheet of paper holds it"
    for line in tree.all("line", class_="leader"):  # from an end to the name's side
        assert float(line.attributes["y2"]) in [round(y, 1) for y in places] and float(line.attributes["x1"]) < float(line.attributes["x2"])


def test_a_crowd_of_names_at_the_bottom_moves_no_name_at_the_top():
    series = {f"defence {place}": [(1, 10.0), (2, 10.0 + 0.01 * place)] for place in range(9)} | {"defence high": [(1, 10.0), (2, 90.0)]}
    names, height = names_of(svg.curves(series, dict.fromkeys(series, (1, 0)), name="n", xlabel="x", ylabel="y"))
    places = dict(names)
    assert 7 <= places["defence high"] <= 40 and max(places.values()) <= height - 5


def test_the_page_names_each_of_many_defences_once_beside_its_seeds(results, tmp_path):
    content = complete(results)
    make_run(tmp_path / "one", content)
    with Record.open(tmp_path / "one" / "record.jsonl", keep=lambda line: True) as record:
        for defence in ("plain", "learned"):
            for seed in range(1, 10):
                record.append("round", defence=defence, seed=seed, round=1, val_accuracy=0.5)
    plot = read(page_of(tmp_path / "one")).one("section", id="learning").one("svg")
    expected = {f"{defence}, seed {seed}" for defence in ("plain", "learned") for seed in range(10)}
    assert len(list(plot.all("polyline"))) == 20 and {title.text for title in plot.all("title")} == expected
    assert [text.text for text in plot.all("text") if text.text in ("plain", "learned") or "seed" in text.text] == ["plain", "learned"]


def test_dots_beyond_the_end_are_drawn_at_the_edge_and_keep_their_value():
    tree = read(svg.strips([("a", 0, [("k", "far", 100.0), ("k", "edge", 50.0), ("k", "near", 10.0)])], name="x", xlabel="y", most=50))
    far, edge, near = tree.all("path")
    assert far.attributes["transform"] == edge.attributes["transform"] != near.attributes["transform"]
    assert far.attributes["data-value"] == "100.0" and "100.0" in far.text


@pytest.mark.parametrize("values", [[0.0], [5.0], [-3.0, -3.0], [1e-9, 2e-9], [1.0, 1e6], [0.1, 0.30000000000000004]])
def test_axes_cover_any_values_with_a_few_round_ticks(values):
    at, ticks = svg._axis(values, 0, 100)
    assert all(0 <= at(value) <= 100 for value in [*values, *ticks]) and 1 <= len(ticks) <= 8
    assert at(max(values) + 1e-12 * abs(max(values))) >= at(min(values))


@pytest.mark.parametrize("seed", range(40))
def test_names_of_crowded_points_cover_neither_each_other_nor_bars_and_levels(seed):
    draw = np.random.default_rng(seed)
    points = [
        svg.Point(label=f"defence {number}", x=x, y=y, x_ends=(x - 0.4, x + 0.4), y_ends=(y - 0.9, y + 0.9)) for number, (x, y) in enumerate(draw.uniform(0, 8, (5, 2)))
    ]
    tree = read(svg.scatter(points, [("the class mean of this run", 4.0), ("chance", 3.0)], name="x", xlabel="y", ylabel="z"))
    texts = [text for group in tree.all("g") for text in group.all("text")] + list(tree.all("text", class_="quiet"))
    places = [(float(text.attributes["x"]), float(text.attributes["y"]), 6.4 * len(text.text)) for text in texts]
    boxes = [(x, y - 10, x + width, y) for x, y, width in places]
    lines = [[float(line.attributes[name]) for name in ("x1", "y1", "x2", "y2")] for kind in ("bar", "level") for line in tree.all("line", class_=kind)]
    assert len(boxes) == 7 and len(lines) == 12
    others = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in lines]
    for number, box in enumerate(boxes):
        assert box[0] >= 0 and box[2] <= 640
        for other in boxes[:number] + others:
            assert min(box[2], other[2]) <= max(box[0], other[0]) or min(box[3], other[3]) < max(box[1], other[1])


def test_the_packages_data_holds_style_and_script():
    root = Path(html.__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["gidef.report"]
    listed = {path for pattern in patterns for path in (root / "gidef" / "report").glob(pattern)}
    assert {path.name for path in listed} == {"style.css", "script.js"}


# --- in a real browser ---------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install chromium, or google-chrome")


class Browser:
    """Chromium without a window, driven over its debugging pipe (messages of JSON, each ended by a zero byte)."""

    def __init__(self, folder):
        (theirs, self.ours), (self.answers, written) = os.pipe(), os.pipe()
        command = [CHROMIUM, "--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder}"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        ends = "import os, sys; from fcntl import F_DUPFD, fcntl; a, b = (fcntl(int(one), F_DUPFD, 10) for one in sys.argv[1:3]); "
        ends += "os.dup2(a, 3); os.dup2(b, 4); os.execv(sys.argv[3], sys.argv[3:])"  # the pipe's ends must be files 3 and 4
        self.process = subprocess.Popen([sys.executable, "-c", ends, str(theirs), str(written), *command], pass_fds=(theirs, written), **quiet)
        os.close(theirs)
        os.close(written)
        self.number, self.rest, self.events, self.session = 0, b"", [], None

    def begin(self):
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.do(f"{domain}.enable")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.answers)

    def _message(self):
        end = time.monotonic() + 60
        while b"\0" not in self.rest:
            if not select.select([self.answers], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            read = os.read(self.answers, 1 << 20)
            if not read:
                raise ConnectionError("Chromium has ended")
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def do(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.ours, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path):
        self.events.clear()
        self.do("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def js(self, expression):
        answer = self.do("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def point(self, element, *, click=False):
        """Move the mouse to the middle of an element (an expression), and click there."""
        self.js(f"{element}.scrollIntoView({{block: 'center', inline: 'center'}})")
        x, y = self.js(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({element}.getBoundingClientRect())")
        kinds = ("mouseMoved", "mousePressed", "mouseReleased") if click else ("mouseMoved",)
        for kind in kinds:
            self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="none" if kind == "mouseMoved" else "left", clickCount=int(kind != "mouseMoved"))

    def press(self, key, code, text=""):
        for kind in ("keyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **({"text": text} if kind == "keyDown" and text else {}))

    def wide(self, width, height=800):
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def complaints(self):
        """What reached the console, errors, and requests of anything but the file and its embedded pictures."""
        found = [event for event in self.events if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")]
        asked = [event["params"]["request"]["url"][:80] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return found + [url for url in asked if not url.startswith(("file:", "data:"))]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    try:
        found.begin()
        yield found
    finally:
        found.close()


ORDER = "[...document.querySelectorAll('#rows tbody tr')].map((row) => [row.dataset.defence, row.dataset.attack])"
SEEN = "[...document.querySelectorAll('#rows tbody tr')].filter((row) => row.offsetParent).map((row) => row.dataset.defence + '/' + row.dataset.attack)"
SORTS = "[...document.querySelectorAll('#rows thead th')].map((head) => head.getAttribute('aria-sort'))"
ACTIVE = """[[...document.querySelectorAll('.detail')].filter((one) => one.offsetParent).map((one) => one.id),
             [...document.querySelectorAll('.faces a')].filter((one) => one.getAttribute('aria-current') === 'true').map((one) => one.dataset.victim),
             [...new Set([...document.querySelectorAll('.dot.active')].map((one) => one.dataset.victim))]]"""


def entries_of(content):
    return [((row["defence"], row["attack"]), row) for row in content["rows"]] + [((bound["name"], "none"), bound) for bound in content["bounds"]]


@in_chromium
def test_a_click_and_the_enter_key_sort_the_table(browser, run):
    content, _, folder = run
    content["rows"][1]["ssim"] = None
    results.save(folder / "results.json", content)
    browser.open(html.write([folder]))
    heads = browser.js("[...document.querySelectorAll('#rows thead th')].map((head) => head.textContent)")
    assert set(browser.js(SORTS)) == {"none"}
    psnr_head = f"document.querySelectorAll('#rows thead button')[{heads.index('PSNR dB')}]"
    browser.point(psnr_head, click=True)
    falling = [list(name) for name, _ in sorted(entries_of(content), key=lambda entry: -entry[1]["psnr_db"]["mean"])]
    assert browser.js(ORDER) == falling and browser.js(SORTS)[heads.index("PSNR dB")] == "descending"
    browser.point(psnr_head, click=True)
    assert browser.js(ORDER) == falling[::-1] and browser.js(SORTS)[heads.index("PSNR dB")] == "ascending"
    browser.js(f"{psnr_head}.focus()")
    while browser.js("document.activeElement.textContent") != "SSIM":
        browser.press("Tab", 9)
    browser.press("Enter", 13, "\r")
    value = {name: bound["ssim"]["mean"] if isinstance(bound["ssim"], dict) else bound["ssim"] for name, bound in entries_of(content)}
    order = browser.js(ORDER)
    found = [value[tuple(name)] for name in order]
    assert found[-1] is None and found[:-1] == sorted(found[:-1], reverse=True), "what has no value comes last"
    assert [sort for sort in browser.js(SORTS) if sort != "none"] == ["descending"] and browser.js(SORTS)[heads.index("SSIM")] == "descending"
    browser.point(f"document.querySelectorAll('#rows thead button')[{heads.index('defence')}]", click=True)
    assert [name[0] for name in browser.js(ORDER)] == sorted(name[0] for name, _ in entries_of(content))
    assert browser.complaints() == []


@in_chromium
def test_epsilons_sort_as_numbers_with_infinity_last_of_all(browser, results, make_row, tmp_path):
    make_run(tmp_path / "one", private(results, make_row))
    browser.open(html.write([tmp_path / "one"]))
    column = next(place for place, text in enumerate(browser.js("[...document.querySelectorAll('#rows thead th')].map((head) => head.textContent)")) if text == "epsilon")
    order = []
    for _ in range(2):
        browser.js(f"document.querySelectorAll('#rows thead th')[{column}].querySelector('button').click()")
        order.append([name for name, _ in browser.js(ORDER)[:3]])
    assert order == [["clipped", "dp 8", "dp 3"], ["dp 3", "dp 8", "clipped"]] and browser.complaints() == []


@in_chromium
def test_the_table_is_filtered_by_words_and_by_name(browser, run):
    content, _, folder = run
    browser.open(html.write([folder]))
    bounds = [f"{bound['name']}/none" for bound in content["bounds"]]
    assert browser.js(SEEN) == ["plain/naive", "learned/naive", "learned/joint", *bounds] and "3 of 3" in browser.js("shown.textContent")
    browser.point("document.getElementById('find')", click=True)
    browser.do("Input.insertText", text="LEARNED joi")
    assert browser.js(SEEN) == ["learned/joint", *bounds] and "1 of 3" in browser.js("shown.textContent")
    browser.point("document.getElementById('bounds')", click=True)
    assert browser.js(SEEN) == ["learned/joint"]
    browser.point("document.getElementById('all')", click=True)
    assert len(browser.js(SEEN)) == 3 + len(bounds)
    browser.js("document.getElementById('by-defence').focus()")
    browser.press("ArrowDown", 40)
    browser.press("ArrowDown", 40)
    assert browser.js("document.getElementById('by-defence').value") == "learned" and browser.js(SEEN) == ["learned/naive", "learned/joint", *bounds]
    browser.js("document.getElementById('by-attack').focus()")
    browser.press("ArrowDown", 40)
    assert browser.js(SEEN) == ["learned/naive", *bounds]
    assert browser.complaints() == []


@in_chromium
def test_what_was_not_run_is_found_and_hidden_as_attacks_are_and_not_counted(browser, results, tmp_path):
    results["not_applicable"] = [IDLE, IDLE | {"defence": "learned"}]
    make_run(tmp_path / "one", results)
    browser.open(html.write([tmp_path / "one"]))
    assert "plain/zeroed" in browser.js(SEEN) and browser.js("shown.textContent") == "3 of 3 attacks shown"
    browser.point("document.getElementById('bounds')", click=True)
    browser.point("document.getElementById('find')", click=True)
    browser.do("Input.insertText", text="zeroed plain")
    assert browser.js(SEEN) == ["plain/zeroed"] and browser.js("shown.textContent") == "0 of 3 attacks shown"
    assert browser.complaints() == []


@in_chromium
def test_pointing_at_a_victim_or_moving_to_it_shows_it_alone(browser, run):
    browser.wide(1280)
    browser.open(html.write([run[2]]))
    first, second, third = (f"v0-{victim}" for victim in VICTIMS)
    assert browser.js(ACTIVE) == [[first]] * 3
    browser.point("document.querySelectorAll('.faces a')[2]")
    assert browser.js(ACTIVE) == [[third]] * 3
    browser.js("document.querySelectorAll('.faces a')[0].focus()")
    assert browser.js(ACTIVE) == [[first]] * 3
    browser.press("Tab", 9)
    assert browser.js(ACTIVE) == [[second]] * 3
    browser.press("ArrowRight", 39)
    assert browser.js(ACTIVE) == [[third]] * 3
    browser.point("document.querySelector('.dot[data-victim=\"v0-3\"]')")
    assert browser.js(ACTIVE)[0] == [second]
    browser.point("document.querySelectorAll('.faces a')[0]", click=True)
    assert browser.js(ACTIVE) == [[first]] * 3 and browser.js("location.hash") == ""
    assert browser.js("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert browser.complaints() == []


@in_chromium
def test_hostile_names_run_nothing_and_can_be_chosen(browser, run, tmp_path):
    bad = hostile(run[0])
    bad["verdict"].pop()
    make_run(tmp_path / "bad", bad, labels=("<img src=x onerror=alert(4)>", "b", "c"), error="<script>alert(5)</script>")
    browser.open(html.write([tmp_path / "bad"]))
    assert browser.js("[...document.getElementById('by-defence').options].map((option) => option.text)") == ["all", HOSTILE, '"><img src=x onerror=alert(1)>']
    browser.js("document.getElementById('by-defence').focus()")
    browser.press("ArrowDown", 40)
    assert browser.js(SEEN)[0] == f"{HOSTILE}/<b>naive</b> & 'co'" and len(browser.js(SEEN)) == 1 + len(bad["bounds"])
    assert browser.js("document.scripts.length") == 2 and browser.js("document.querySelectorAll('[onerror], marquee, h6, iframe').length") == 0
    assert not [event for event in browser.events if event["method"] == "Page.javascriptDialogOpening"] and browser.complaints() == []


@in_chromium
@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_the_page_never_scrolls_sideways(browser, run, width):
    browser.wide(width)
    browser.open(html.write([run[2]]))
    assert browser.js("document.documentElement.scrollWidth") <= width
    table = browser.js("((box) => [box.scrollWidth, box.clientWidth, getComputedStyle(box).overflowX])(document.getElementById('rows').parentElement)")
    assert table[2] == "auto" and (table[0] > table[1] or width > 375), "the table scrolls in its own box"


@in_chromium
def test_paper_shows_the_whole_table_and_no_controls(browser, run):
    browser.wide(1280)
    browser.open(html.write([run[2]]))
    browser.do("Emulation.setEmulatedMedia", media="print")
    shown = "[...document.querySelectorAll('nav, form, #rows, .faces')].map((part) => part.offsetParent !== null)"
    overflow = browser.js("getComputedStyle(document.getElementById('rows').parentElement).overflowX")
    found = browser.js(shown)
    browser.do("Emulation.setEmulatedMedia", media="")
    assert found == [False, False, True, True] and overflow == "visible"
    assert base64.b64decode(browser.do("Page.printToPDF")["data"]).startswith(b"%PDF")


@in_chromium
def test_paper_holds_every_column_of_several_runs(browser, results, make_row, tmp_path):
    """As many columns as there are, long names without a space, and long words in every cell."""
    every = {
        "share_policy": "head", "certified_bits": 31.3, "lifetime_bits": None, "fano": 0.012345, "uncertified_lifetime": "the noise stays", "epsilon": 8.0,
        "delta": 1e-5, "oracle_restart_psnr_db": 12.3, "restarts": 4, "nmse": {"mean": 7.11, "low": 6.67, "high": 7.55}, "note": "what priors draw by themselves, " * 4,
    }  # fmt: skip
    results["rows"][0]["threat"]["name"] = "honest but curious server; untrained checkpoint; gradient of one batch of 1; knows the labels; no BatchNorm"
    make_run(tmp_path / "one", results)
    other = copy.deepcopy(results)
    other["recipe_name"] = "heterogeneity_of_a_federation_with_a_long_name"
    other["rows"] = [row | every for row in other["rows"]] + [make_row("a_defence_with_a_long_name_of_one_word", "shuffled gradient", "control", 9.0, **every)]
    make_run(tmp_path / "2026-11-27-073418", other)
    browser.open(html.write([tmp_path / "one", tmp_path / "2026-11-27-073418"]))
    browser.wide(1032)  # A4 across, less its margins, at 96 px per inch
    browser.do("Emulation.setEmulatedMedia", media="print")
    heads, right, beyond = browser.js("""(() => {
        const right = (one) => one.getBoundingClientRect().right, parts = [...document.querySelectorAll("main *")];
        return [document.querySelectorAll("#rows thead th").length, right(document.querySelector("#rows thead th:last-child")),
                parts.filter((one) => right(one) > 1032).map((one) => one.outerHTML.slice(0, 80))];
    })()""")
    browser.do("Emulation.setEmulatedMedia", media="")
    assert heads == 22 and right > 900 and beyond == []


@in_chromium
def test_without_javascript_everything_can_be_read(browser, run):
    browser.wide(1280)
    browser.do("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(html.write([run[2]]))
        assert len(browser.js(SEEN)) == 7 and browser.js("document.getElementById('filters').offsetParent") is None
        assert browser.js("document.querySelectorAll('#rows button').length") == 0
        assert browser.js("[...document.querySelectorAll('.detail')].filter((one) => one.offsetParent).length") == len(VICTIMS)
        assert browser.js("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    finally:
        browser.do("Emulation.setScriptExecutionDisabled", value=False)


def test_observations_are_counted_where_they_are_of_several_victims(run, results, tmp_path):
    folder = run[2]
    assert "Means over victims with 95 % intervals. " in read(page_of(folder)).one("section", id="table").text
    for row in results["rows"]:
        row["observations"] = 16
    make_run(tmp_path / "batches", complete(results))
    text = read(page_of(tmp_path / "batches")).one("section", id="table").text
    assert "with 95 % intervals, which are over observations (16 batches of 4 images). " in text
    text = read(page_of(folder, tmp_path / "batches")).one("section", id="table").text
    assert "observations (quickstart batches: 16 batches of 4 images). " in text


def test_an_attack_that_failed_is_nobodys_strongest(results, tmp_path):
    make_run(tmp_path / "failed", complete(results), error="out of memory")
    faces = list(read(page_of(tmp_path / "failed")).one("ul", class_="faces").all("a"))
    assert [face.one("span", class_="interval").text for face in faces] == ["up to –"] * len(VICTIMS)


def test_two_dozen_defences_differ_in_marker_or_colour():
    points = [svg.Point(label=f"defence {number}", x=number, y=number, family=number) for number in range(24)]
    drawn = str(svg.scatter(points, [], name="plot", xlabel="x", ylabel="y"))
    looks = re.findall(r'class="point" fill="([^"]+)".*?<path d="([^"]+)"', drawn, re.DOTALL)
    assert len(looks) == len(set(looks)) == 24
