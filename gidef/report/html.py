"""One self-contained page from one or several runs: no network, no library, readable without JavaScript, in print and on a phone.

The numbers are those of results.json, unrounded in `data-value` and, whole, as JSON in the page; victims come from the record, their pictures from the
contact sheets' saved images. Every text of a run is escaped (`markup.tag`), and a Content-Security-Policy forbids all loading.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from gidef.report import results, svg, tables, tradeoff
from gidef.report.files import plain, write_atomically
from gidef.report.markup import Html, image_uri, join, json_script, png_uri, tag
from gidef.report.pictures import drawable
from gidef.report.record import Line, read
from gidef.report.results import MEASURED, bound_label, bound_named, interval_of, mean_of
from gidef.report.verdict import ENSEMBLE, MALICIOUS, ON_LATENT, is_undefended, strongest
from gidef.report.victims import Sheet, Victim, victims_of

NAME = "report.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_SIDE, _MOST_IMAGES = 64, 3000
"""Longest side in px of a victim's picture in the page (contact sheets are embedded whole), and how many such pictures a run may bring."""
_MOST_DB = 50
"""Where the plots of single images end: 100 dB, the cap of an exact copy, would squeeze everything else."""
_UNITS = {"client_accuracy": (100, 1), "attacker_accuracy": (100, 1), "mse": (1000, 2), "nmse": (1, 2), "psnr_db": (1, 1), "ssim": (1, 2)}
_HEADERS = {"client_accuracy": "client acc. %", "attacker_accuracy": "attacker acc. %", "mse": "MSE ×1000", "psnr_db": "PSNR dB", "ssim": "SSIM"}
_TAGS = {ON_LATENT: "bound: is given the latent", MALICIOUS: "malicious server", ENSEMBLE: "worst case per image", "control": "shuffled control"}
_SECTIONS = {
    "shows": "What this run shows", "table": "Every attack and bound", "utility": "Privacy against utility", "sheets": "Pictures", "victims": "Victims",
    "clients": "Clients", "learning": "Learning curves", "cost": "Cost", "origin": "Recipe and origin",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a page knows of one run. name: unique among the page's runs;  results: in the layout of `gidef.report`;  pictures: PNG files by path."""

    name: str
    results: dict[str, Any]
    lines: list[Line] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)


def write(folders: Sequence[str | Path], into: str | Path | None = None) -> Path:
    """Write report.html over these runs into a folder, the first one's by default; returns its path.

    Raises: InputError where results.json or the record cannot be read, or the page not be written.
    """
    pages = load(folders)
    return write_atomically(Path(into or folders[0]) / NAME, render(pages).encode(errors="replace"))


def load(folders: Sequence[str | Path]) -> list[Page]:
    """Runs as their folders hold them; a record, sheets or pictures may be missing."""
    found: list[Page] = []
    for folder in map(Path, folders):
        content = plain(results.load(folder / "results.json"))
        name = first = f"{content['recipe_name']} {folder.resolve().name}"
        while name in [page.name for page in found]:
            name = f"{first} #{len(found) + 1}" if name == first else f"{name}'"
        lines = read(folder / "record.jsonl") if (folder / "record.jsonl").exists() else []
        sheets = [Sheet.load(path) for path in sorted((folder / "pictures").glob("reconstructions-*.safetensors"))]
        pictures = {path: (folder / path).read_bytes() for path in content.get("pictures", []) if _is_png(folder, path)}
        found.append(Page(name=name, results=content, lines=lines, sheets=sheets, pictures=pictures))
    return found


def _is_png(folder: Path, path: str) -> bool:
    """Whether a path of results.json is a PNG inside the run's folder."""
    place = (folder / path).resolve()
    return place.suffix == ".png" and place.is_relative_to(folder.resolve()) and place.is_file()


def render(pages: Sequence[Page]) -> str:
    """The page as text."""
    several = len(pages) > 1
    title = f"{len(pages)} runs side by side" if several else _title(pages[0])
    victims = [victims_of(page.lines, page.sheets) for page in pages]
    each = list(zip(pages, victims, strict=True))
    contents = {
        "shows": [_verdict(page, several) for page in pages],
        "table": [_table(pages)],
        "utility": [tradeoff.plots([(page.name, page.results) for page in pages])],
        "sheets": [_pictures(page, several) for page in pages],
        "victims": [_victims(number, page, seen, several) for number, (page, seen) in enumerate(each)],
        "clients": [_clients(page, several) for page in pages],
        "learning": [_learning(page, several) for page in pages],
        "cost": [_cost(page, several) for page in pages],
        "origin": [_origin(page, several) for page in pages],
    }
    contents = {key: [part for part in parts if part] for key, parts in contents.items()}
    contents = {key: parts for key, parts in contents.items() if parts}
    data = {"format": results.FORMAT, "runs": [{"name": page.name, "results": page.results} for page in pages]}
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(_file("style.css"))),
    ]
    body = [
        tag("header", tag("h1", title), [_stamp(page, several) for page in pages]),
        tag("nav", [tag("a", _SECTIONS[key], href=f"#{key}") for key in contents], aria_label="Sections"),
        tag("main", [tag("section", tag("h2", _SECTIONS[key]), parts, id=key) for key, parts in contents.items()]),
        tag("footer", f"Written by gidef {pages[0].results['versions'].get('gidef', '')}. This page loads nothing and sends nothing."),
        json_script("data", data),
        tag("script", Html(_file("script.js"))),
    ]
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def _file(name: str) -> str:
    return files("gidef.report").joinpath("page", name).read_text(encoding="utf-8")


def _title(page: Page) -> str:
    data = page.results["data"]
    return f"{page.results['recipe_name']}: what the shared updates gave away, {data.get('title') or data['name']}"


def _stamp(page: Page, several: bool) -> Html:
    data = page.results["data"]
    counts = ", ".join(f"{value} {key}" for key, value in data.get("counts", {}).items())
    seeds = ", ".join(map(str, page.results["seeds"]))
    made_up = tag("strong", "SYNTHETIC data. ") if data["synthetic"] else None
    images = f"{data.get('title') or data['name']} ({counts})" if several else f"images {counts}"
    return tag("p", made_up, tag("b", page.name), f": {images}; seeds {seeds}")


def _run_head(page: Page, several: bool) -> Html | None:
    return tag("h3", page.name) if several else None


def _shown(name: str, drawn: Html, kind: str = "scroll", **attributes: Any) -> Html:
    """A figure with its caption, in a box that scrolls where it is too wide."""
    return tag("figure", tag("figcaption", name), tag("div", drawn, class_=kind, **attributes))


def _verdict(page: Page, several: bool) -> Html:
    loud = ("Warning", "SYNTHETIC", "A demonstration", "Not trained")
    said = [tag("li", text, class_="warning" if text.startswith(loud) else None) for text in page.results.get("verdict", [])]
    return join(_run_head(page, several), tag("ul", said, class_="verdict") if said else tag("p", "No verdict was recorded."))


# --- the table -----------------------------------------------------------------------------------------------------------


def _table(pages: Sequence[Page]) -> Html:
    several, rows = len(pages) > 1, [row for page in pages for row in page.results["rows"]]
    policies = len({row["share_policy"] for row in rows}) > 1
    oracle = any((row.get("restarts") or 1) > 1 and row.get("oracle_restart_psnr_db") is not None for row in rows)
    names = [*(["run"] if several else []), "defence", "attack", "checkpoint", *(["share policy"] if policies else []), *[*_HEADERS.values()][:-1]]
    certified, private = any(tables.asks(row) for row in rows), any(row.get("delta") is not None for row in rows)
    normed = any(row.get("nmse") is not None for row in rows)
    names += ["NMSE"] if normed else []
    names += ["worst image dB", _HEADERS["ssim"], *(["epsilon", "delta"] if private else []), *(["bits per release", "lifetime bits", "Fano %"] if certified else [])]
    names += [*(["oracle dB"] if oracle else []), "victims", "threat model", "note", "seconds"]
    texts = {"run", "defence", "attack", "checkpoint", "share policy", "threat model", "note"}
    head = [tag("th", name, scope="col", class_=None if name in texts else "number", data_kind="text" if name in texts else "number") for name in names]
    body = [
        _table_row(page, entry, what, several, policies, oracle, certified, private, normed)
        for page in pages
        for what, entries in (("attack", page.results["rows"]), ("idle", results.not_applicable(page.results)), ("bound", page.results["bounds"]))
        for entry in entries
    ]
    table = tag("table", tag("thead", tag("tr", head)), tag("tbody", body), id="rows")
    filters = tag(
        "form",
        tag("label", "Find ", tag("input", type="search", id="find", autocomplete="off")),
        tag("span", id="selects"),
        tag("label", tag("input", type="checkbox", id="bounds", checked=True), " bounds"),
        tag("button", "Show all", type="button", id="all"),
        tag("button", "Save the numbers (JSON)", type="button", id="save"),
        tag("output", id="shown", aria_live="polite"),
        id="filters", hidden=True,
    )  # fmt: skip
    seen = [(page.name, counted) for page in pages if (counted := results.batches(page.results))]
    over = f", which are over observations ({'; '.join(f'{name}: {counted}' if several else counted for name, counted in seen)})" if seen else ""
    said = f'Means over victims with 95 % intervals{over}. A row "bound" is what a guess without any gradient, or with a shuffled one, scores on the same victims. '
    units = " or ".join(dict.fromkeys(row.get("privacy_unit", "image") for row in rows if row.get("delta") is not None))
    said += f"Epsilon and delta: of the presence of one {units}, over all rounds of the training. " if private else ""
    said += "Bits: no attack learns more of an image beyond its label; Fano: bound on naming it among all training images. " if certified else ""
    said += "NMSE: the MSE over the variance of the public images, 1 for their mean image whatever the data set. " if normed else ""
    said += "The worst image is the most leaked one, of any seed. " + ("Oracle: the start that the truth would have chosen, which no attacker can." if oracle else "")
    box = tag("div", table, class_="scroll", tabindex=0, role="region", aria_label="Table")
    return join(tag("p", said), [_judge(page, several) for page in pages], filters, box, [part(page, several) for part in (_judges, _tuned) for page in pages])


def _table_row(
    page: Page, entry: dict[str, Any], what: str, several: bool, policies: bool, oracle: bool, certified: bool, private: bool, normed: bool
) -> Html:
    """what: an "attack", a "bound", or "idle", an attack that was not run for want of something to attack."""
    bound = what == "bound"
    defence, attack, checkpoint = (bound_label(entry), "none", entry.get("checkpoint", "")) if bound else (entry["defence"], entry["attack"], entry["checkpoint"])
    if not bound and not entry.get("seeds") and entry.get("seed") is not None:
        defence = f"{defence} (seed {entry['seed']})"
    kind = "bound" if bound else _TAGS.get(entry["attack_id"])
    badge = [" ", tag("span", kind, class_="tag")] if kind else None
    threat = ("none: the gradient is shuffled" if entry.get("of") else "none: a guess without any gradient") if bound else (entry.get("threat") or {}).get("name", "")
    notes = [entry.get("note") or "", f"{entry['failed']} failed, scored as mid-grey" if entry.get("failed") else ""]
    cells = [tag("td", page.name, class_="run")] if several else []
    cells += [tag("th", defence, badge if bound else None, scope="row"), tag("td", attack, None if bound else badge), tag("td", checkpoint)]
    cells += [tag("td", entry.get("share_policy", ""))] if policies else []
    cells += [_measure(entry.get(key), key) for key in (*MEASURED[:-1], *(["nmse"] if normed else []))]
    worst = entry["psnr_db"].get("worst") if isinstance(entry["psnr_db"], dict) else None
    cells += [_number(worst, 1, 1, "worst"), _measure(entry.get("ssim"), "ssim")]
    cells += _epsilon(entry) if private else []
    if certified:
        fano = entry.get("fano") if entry.get("lifetime_fano") is None else entry["lifetime_fano"]
        none = "no certificate" if entry.get("uncertified") else "–"
        cells += [_number(entry.get("certified_bits"), 1, 1, "bits", none=none), _number(entry.get("lifetime_bits"), 1, 1, "lifetime", none=none), _number(fano, 100, 0, "fano")]
    cells += [_number(entry.get("oracle_restart_psnr_db") if (entry.get("restarts") or 1) > 1 else None, 1, 1, "oracle")] if oracle else []
    cells += [_number(entry.get("victims"), 1, 0, "victims"), tag("td", threat, class_="long"), tag("td", "; ".join(filter(None, notes)), class_="long")]
    cells += [_number(entry.get("seconds"), 1, 1, "seconds")]
    known = {"data_run": page.name, "data_defence": defence, "data_attack": attack, "data_checkpoint": checkpoint}
    return tag("tr", cells, class_=None if what == "attack" else what, **known)


def _epsilon(entry: dict[str, Any]) -> list[Html]:
    """Cells of epsilon and delta; JSON's missing epsilon beside a delta is infinity, which sorts as such."""
    if entry.get("delta") is None:
        return [_number(None, 1, 2, "epsilon"), _number(None, 1, 0, "delta")]
    epsilon, delta = tables.privacy(entry)
    value = repr(entry["epsilon"]) if entry.get("epsilon") is not None else "Infinity"
    return [tag("td", text, class_="number", data_key=key, data_value=number) for text, key, number in ((epsilon, "epsilon", value), (delta, "delta", repr(entry["delta"])))]


def _measure(value: Any, key: str) -> Html:
    """A measured value's cell: the mean, and its interval on a second line."""
    scale, digits = _UNITS[key]
    ends = interval_of(value)
    interval = tag("span", "[" + ", ".join(f"{scale * end:.{digits}f}" for end in ends) + "]", class_="interval") if ends else None
    return _number(mean_of(value), scale, digits, key, [" ", interval] if ends else None, ends)


def _number(value: float | None, scale: float, digits: int, key: str, more: Any = None, ends: tuple[float, float] | None = None, none: str = "–") -> Html:
    shown = none if value is None else f"{scale * value:.{digits}f}"
    low, high = map(repr, ends) if ends else (None, None)
    return tag("td", shown, more, class_="number", data_key=key, data_value=None if value is None else repr(value), data_low=low, data_high=high)


def _judges(page: Page, several: bool) -> Html | None:
    """Attacker accuracy by each judge, where there are several."""
    head, *lines = tables.judged_cells(page.results) or [()]
    if not head:
        return None
    titles = tag("tr", [tag("th", text, scope="col", class_=None if place < 3 else "number") for place, text in enumerate(head)])
    rows = [tag("tr", [tag("td", text, class_=None if place < 3 else "number") for place, text in enumerate(line)]) for line in lines]
    return _shown(f"Attacker accuracy by judge, %{f', {page.name}' if several else ''}", tag("table", tag("thead", titles), tag("tbody", rows)), tabindex=0)


def _tuned(page: Page, several: bool) -> Html | None:
    """Strengths that a search found, and whether it met its target."""
    head, *lines = tables.tuned_cells(page.results) or [()]
    if not head:
        return None
    classes = ["number" if text in tables.TUNED_NUMBERS else None for text in head]
    titles = tag("tr", [tag("th", text, scope="col", class_=name) for text, name in zip(head, classes, strict=True)])
    rows = [tag("tr", [tag("td", text, class_=name) for text, name in zip(line, classes, strict=True)]) for line in lines]
    return _shown(f"Tuned: strengths found by a search{f', {page.name}' if several else ''}", tag("table", tag("thead", titles), tag("tbody", rows)), tabindex=0)


def _judge(page: Page, several: bool) -> Html | None:
    judge = page.results.get("judge") or {}
    known = [("on the true images (ceiling)", "accuracy_on_truth"), ("on test images", "accuracy_on_test"), ("by chance", "chance")]
    known = [f"{100 * judge[key]:.1f} % {name}" for name, key in known if judge.get(key) is not None]
    start = f"{page.name}: attacker" if several else "Attacker"
    return tag("p", f"{start} accuracy is a judge's on the reconstructions; the judge has {', '.join(known)}.") if known else None


# --- pictures and victims ------------------------------------------------------------------------------------------------------


def _pictures(page: Page, several: bool) -> Html | None:
    shown = []
    for path, data in page.pictures.items():
        if Path(path).stem not in ("learning", "partition", tradeoff.NAME):
            words = Path(path).stem.replace("-", " ").replace("psnr", "PSNR")
            shown.append(_shown(words, tag("img", src=png_uri(data), alt=f"{words}, {page.name}"), "scroll sheet", tabindex=0))
    return join(_run_head(page, several), shown) if shown else None


def _victims(number: int, page: Page, victims: list[Victim], several: bool) -> Html | None:
    if not victims:
        return None
    per_victim = max(1, max(sum(seen.image is not None for seen in victim.seen) + len(victim.guesses) + 1 for victim in victims))
    pictured = {victim.number for victim in victims[: _MOST_IMAGES // per_victim]}
    apart = {row["attack"] for row in page.results["rows"] if row["attack_id"] in _TAGS}
    chosen, details = [], []
    for victim in victims:
        key, small = f"v{number}-{victim.number}", victim.number in pictured
        best = victim.strongest(apart)
        strong = f"{best.psnr_db:.1f} dB" if best else "–"
        face = _image(victim.private, "") if small else None
        inner = [face, tag("span", victim.label), tag("span", f"up to {strong}", class_="interval")]
        chosen.append(tag("li", tag("a", inner, href=f"#{key}", data_victim=key)))
        details.append(_detail(key, victim, small))
    said = "Point at a victim, or move to it with Tab, to see what every attack made of it, and its dots in the plot below. "
    said += "Pictures are of the first seed" + ("." if len(pictured) == len(victims) else f"; pictures of the first {len(pictured)} victims are embedded.")
    panel = tag("div", tag("ul", chosen, class_="faces"), tag("div", details, class_="details"), class_="beside")
    strips = _strips(number, page, victims)
    return tag("div", _run_head(page, several), tag("p", said), panel, strips, class_="victims")


def _detail(key: str, victim: Victim, small: bool) -> Html:
    owner = f", client {victim.client}" if victim.client is not None else ""
    guesses = [_figure(victim.private if small else None, "private", "")]
    guesses += [_figure(image if small else None, f"no gradient: {name}", text) for name, image, text in victim.guesses]
    groups = [tag("div", guesses, class_="group")] if small and victim.private is not None else []
    for where in dict.fromkeys((seen.checkpoint, seen.defence) for seen in victim.seen):
        figures, failed = [], []
        for seen in victim.seen:
            if (seen.checkpoint, seen.defence) == where:
                failed += [tag("p", f"{seen.attack} {seen.failure}", class_="failure")] if seen.failure else []
                more = [f"SSIM {seen.ssim:.2f}"] if seen.ssim is not None else []
                more += [f"seeds {min(seen.seeds):.1f} to {max(seen.seeds):.1f} dB"] if len(seen.seeds) > 1 else []
                more += ["failed"] if seen.failure else []
                value = "no PSNR" if seen.psnr_db is None else f"{seen.psnr_db:.1f} dB"
                figures.append(_figure(seen.image if small else None, seen.attack, value, more, seen.psnr_db))
        groups.append(tag("div", tag("h5", f"{where[1]}, {where[0]} checkpoint"), tag("div", figures, class_="group"), failed))
    return tag("article", tag("h4", f"{victim.label}{owner}"), groups, id=key, class_="detail")


def _figure(image: np.ndarray | None, name: str, value: str, more: Sequence[str] = (), psnr_db: float | None = None) -> Html:
    drawn = _image(image, name) if image is not None else tag("span", "no picture", class_="blank")
    said = [tag("span", name), tag("b", value), [tag("span", text) for text in more]]
    return tag("figure", drawn, tag("figcaption", said), data_psnr=None if psnr_db is None else repr(psnr_db))


def _image(image: np.ndarray | None, alt: str) -> Html | None:
    return None if image is None else tag("img", src=image_uri(drawable(image[None], "victim")[0], _SIDE), alt=alt)


def _strips(number: int, page: Page, victims: list[Victim]) -> Html | None:
    """Every victim's PSNR under every attack."""
    rows: dict[tuple[str, str, str], list[tuple[str, str, float]]] = {}
    for victim in victims:
        for seen in victim.seen:
            if seen.psnr_db is not None:
                rows.setdefault((seen.checkpoint, seen.defence, seen.attack), []).append((f"v{number}-{victim.number}", victim.label, seen.psnr_db))
    if not rows:
        return None
    order = _defences(page)
    lines = [(f"{defence}, {attack}, {checkpoint}", order.get(defence, 0), dots) for (checkpoint, defence, attack), dots in rows.items()]
    name = "PSNR of every victim under every attack"
    xlabel = f"PSNR (dB), from {_MOST_DB} dB on at the edge"
    return _shown(name, svg.strips(lines, name=name, xlabel=xlabel, most=_MOST_DB, level=_class_mean(page)))


def _class_mean(page: Page) -> tuple[str, float] | None:
    value = mean_of(bound_named(page.results, "class mean").get("psnr_db"))
    return None if value is None else ("class mean", value)


# --- training and origin -----------------------------------------------------------------------------------------------------


def _defences(page: Page) -> dict[str, int]:
    """Colour and marker of each defence of a run: 0 for the undefended net."""
    names = dict.fromkeys([run["defence"] for run in page.results["training"]] + [row["defence"] for row in page.results["rows"]])
    defended = [name for name in names if not is_undefended(page.results, name)]
    return {name: 1 + defended.index(name) if name in defended else 0 for name in names}


def _clients(page: Page, several: bool) -> Html | None:
    """Per client: how well its images are classified, and how well its attacked images are reconstructed."""
    order, parts = _defences(page), []
    accuracy = []
    for run in page.results["training"]:
        dots = [(f"c{client}", f"client {client}", 100 * value) for client, value in enumerate(run.get("client_accuracies") or [])]
        accuracy += [(f"{run['defence']}, seed {run.get('seed', '–')}", order[run["defence"]], dots)] if dots else []
    if accuracy:
        name = "Test accuracy of every client"
        parts.append(_shown(name, svg.strips(accuracy, name=name, xlabel="accuracy (%)")))
    leaks = []
    for checkpoint, defence in dict.fromkeys((row["checkpoint"], row["defence"]) for row in page.results["rows"]):
        row = strongest([row for row in page.results["rows"] if (row["checkpoint"], row["defence"]) == (checkpoint, defence)])
        found = _per_client(page.lines, defence, row["attack"], checkpoint) if row else {}
        dots = [(f"c{client}", f"client {client}, {len(values)} reconstruction(s)", sum(values) / len(values)) for client, values in found.items()]
        leaks += [(f"{defence}, {row['attack']}, {checkpoint}", order[defence], dots)] if dots else []
    if leaks:
        name = "Mean PSNR of every client's attacked images, under the strongest attack"
        parts.append(_shown(name, svg.strips(leaks, name=name, xlabel="mean PSNR (dB)", level=_class_mean(page))))
    bars = next((data for path, data in page.pictures.items() if Path(path).stem == "partition"), None)
    if bars:
        parts.append(_shown("Training images per client", tag("img", src=png_uri(bars), alt="training images per client and class"), "scroll sheet"))
    return join(_run_head(page, several), tag("div", parts, class_="figures")) if parts else None


def _per_client(lines: Sequence[Line], defence: str, attack: str, checkpoint: str) -> dict[int, list[float]]:
    """PSNR of each reconstruction, over victims and seeds, by client."""
    found: dict[int, list[float]] = {}
    for line in lines:
        named = tuple(line.get(key) for key in ("kind", "defence", "attack", "checkpoint"))
        if named == ("attack", defence, attack, checkpoint) and line.get("client") is not None and line.get("psnr_db") is not None:
            found.setdefault(line["client"], []).append(line["psnr_db"])
    return dict(sorted(found.items()))


def _learning(page: Page, several: bool) -> Html | None:
    series: dict[str, list[tuple[float, float]]] = {}
    styles: dict[str, tuple[int, int]] = {}
    families: dict[str, str] = {}
    order, seeds = _defences(page), list(page.results["seeds"])
    for line in page.lines:
        if line["kind"] == "round" and line.get("val_accuracy") is not None:
            label = f"{line['defence']}, seed {line['seed']}"
            series.setdefault(label, []).append((line["round"], 100 * line["val_accuracy"]))
            styles[label] = order.get(line["defence"], 0), seeds.index(line["seed"]) if line["seed"] in seeds else 0
            families[label] = line["defence"]
    if not series:
        return None
    chance = (page.results.get("judge") or {}).get("chance")
    level = None if chance is None else ("chance", 100 * chance)
    name = "Validation accuracy per round"
    drawn = svg.curves(series, styles, name=name, xlabel="round", ylabel="validation accuracy (%)", level=level, families=families)
    return join(_run_head(page, several), _shown(name, drawn))


_COSTS = (
    ("rounds", "rounds", 1, 0), ("seconds", "training s", 1, 1), ("seconds_per_round", "s per round", 1, 2), ("bytes_per_round", "MB per round", 1e-6, 2),
    ("parameters_shared", "parameters shared", 1, 0),
)  # fmt: skip


def _cost(page: Page, several: bool) -> Html | None:
    """Training: seconds, bytes, and whatever peak of memory was recorded; attacks: seconds each."""
    training, seconds = [run for run in page.results["training"] if not run.get("trained_as")], page.results.get("seconds") or {}
    training = [_with_peaks_named(run) for run in training]
    peaks = list(dict.fromkeys(key for run in training for key, value in run.items() if "peak" in key and isinstance(value, (int, float))))
    costs = [cost for cost in _COSTS if any(run.get(cost[0]) is not None for run in training)]
    costs += [(key, "process peak so far gib" if key == _SO_FAR else key.replace("_", " "), 1, 2) for key in peaks]
    parts = [tag("p", f"{seconds['total']:.1f} s in all.")] if seconds.get("total") is not None else []
    if training:
        numbers = [[_number(run.get(key), scale, digits, key) for key, _, scale, digits in costs] for run in training]
        rows = [[tag("td", run.get("seed", "–"), class_="number"), *cells] for run, cells in zip(training, numbers, strict=True)]
        parts.append(_small_table(["defence", "seed", *(name for _, name, _, _ in costs)], [run["defence"] for run in training], rows))
        if any(key == "bytes_per_round" for key, *_ in costs):
            parts.append(tag("p", "MB per round: down to and up from a round's clients, each as the defence sends its update, without keys, shares and framing."))
    if attacks := seconds.get("attack"):
        table = _small_table(["attack", "seconds"], list(attacks), [[_number(value, 1, 1, "seconds")] for value in attacks.values()])
        parts.append(tag("details", tag("summary", f"Seconds of each of {len(attacks)} attacks"), table))
    return join(_run_head(page, several), parts) if parts else None


_SO_FAR = "process_peak_so_far_gib"


def _with_peaks_named(run: dict[str, Any]) -> dict[str, Any]:
    """A training whose process did not count its peak anew, as none did once, has it by a name that says so."""
    if run.get("process_peak_of") == "training":
        return run
    return {_SO_FAR if key == "process_peak_gib" else key: value for key, value in run.items()}


def _small_table(heads: Sequence[str], names: Sequence[str], rows: Sequence[list[Html]]) -> Html:
    """Named rows of numbers."""
    head = tag("tr", [tag("th", text, scope="col", class_="number" if number else None) for number, text in enumerate(heads)])
    body = [tag("tr", tag("th", name, scope="row"), cells) for name, cells in zip(names, rows, strict=True)]
    return tag("div", tag("table", tag("thead", head), tag("tbody", body)), class_="scroll", tabindex=0, role="region", aria_label=f"Cost by {heads[0]}")


def _net(net: dict[str, Any]) -> str:
    """What the attacks changed in a network, and whether its gradients stayed."""
    kept = f"not compared: {net['skipped']}" if net.get("parity") is None else f"gradients as the untouched network's to {net['parity']:.0e}"
    return "; ".join([kept, *net["changes"]])


def _origin(page: Page, several: bool) -> Html:
    found, data = page.results, page.results["data"]
    facts = [("data", data["name"]), ("source", data.get("source")), ("md5", data.get("md5") or "not recorded")]
    facts += [("synthetic", "yes" if data["synthetic"] else "no")]
    facts += [("seeds", ", ".join(map(str, found["seeds"]))), ("ranks", found.get("world_size")), ("threads", found.get("threads"))]
    facts += [(f"net of {', '.join(net['defences'])}", _net(net)) for net in found.get("nets", [])]
    facts += [*found.get("hardware", {}).items(), *found["versions"].items()]
    facts += [(f"weights {name} (SHA-256)", mark) for name, mark in found.get("weights_sha256", {}).items()]
    listed = tag("dl", [[tag("dt", name), tag("dd", str(value))] for name, value in facts if value is not None])
    recipe = tag("pre", json.dumps(found["recipe"], indent=2, ensure_ascii=False))
    return join(_run_head(page, several), listed, tag("details", tag("summary", f"The resolved recipe of {found['recipe_name']} (JSON)"), recipe))
