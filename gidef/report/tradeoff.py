"""Privacy against utility: each defence under its strongest attack, over the accuracy that it leaves the clients; as inline SVG, PNG and CSV."""

from __future__ import annotations

import csv as csv_format
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gidef.report import pictures, svg
from gidef.report.files import write_atomically
from gidef.report.kinds import family, settings, strengths
from gidef.report.markup import Html, join, tag
from gidef.report.results import bound_named, interval_of, mean_of
from gidef.report.verdict import is_undefended, strongest

Run = tuple[str, dict[str, Any]]
"""A run's name and its results in the layout of `gidef.report`."""
NAME = "tradeoff"
_MEASURES = (("psnr_db", 1, "strongest attack's PSNR (dB)"), ("attacker_accuracy", 100, "highest attacker accuracy (%)"))
_SAID = """Lower right is better. Each point is a defence under the attack that reaches highest (upper end of its interval; attackers of another threat model,
bounds and ensembles are left out). Upright bars are the 95 % intervals of the table, level ones the range over seeds. Lines join defences of one kind
that differ in one strength alone. Client accuracy is the final model's, whatever the checkpoint."""
_WHERE = ("data", "share_policy", "release", "checkpoint")
_COLUMNS = (*_WHERE, "measure", "run", "defence", "family", "attack", "client_accuracy", "client_accuracy_low", "client_accuracy_high", "value", "low", "high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A defence in a plot, in the units of results.json. family, lines: as in `svg.Point`."""

    run: str
    defence: str
    kind: str
    attack: str
    accuracy: float
    accuracy_ends: tuple[float, float] | None
    value: float
    ends: tuple[float, float] | None
    family: int
    lines: tuple[str, ...]

    def point(self, unit: float, shared: bool) -> svg.Point:
        """As it is drawn. shared: several runs stand in the plot."""
        return svg.Point(
            label=f"{self.defence}, {self.run} ({self.attack})" if shared else f"{self.defence} ({self.attack})",
            x=100 * self.accuracy, y=unit * self.value, x_ends=self.accuracy_ends and (100 * self.accuracy_ends[0], 100 * self.accuracy_ends[1]),
            y_ends=self.ends and (unit * self.ends[0], unit * self.ends[1]), family=self.family, lines=self.lines,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Facet:
    """What may stand in one plot: equal data, share policy, release and checkpoint. unit: factor from results.json to the axis `label`; levels: named values."""

    title: str
    where: tuple[str, ...]
    measure: str
    unit: float
    label: str
    entries: list[Entry]
    levels: list[tuple[str, float]]

    @property
    def points(self) -> list[svg.Point]:
        shared = len({entry.run for entry in self.entries}) > 1
        return [entry.point(self.unit, shared) for entry in self.entries]

    @property
    def drawn_levels(self) -> list[tuple[str, float]]:
        return [(name, self.unit * value) for name, value in self.levels]


def plots(runs: Sequence[Run]) -> Html | None:
    """A plot of PSNR and one of attacker accuracy for each data set, share policy, checkpoint and release; None without a point."""
    figures = []
    for facet in facets(runs):
        drawn = svg.scatter(facet.points, facet.drawn_levels, name=facet.title, xlabel="client accuracy (%)", ylabel=facet.label)
        figures.append(tag("figure", tag("figcaption", facet.title), tag("div", drawn, class_="scroll")))
    return join(tag("p", _SAID), tag("div", figures, class_="figures")) if figures else None


def save(runs: Sequence[Run], folder: str | Path) -> list[Path]:
    """Write the same plots as tradeoff.png and their numbers as tradeoff.csv; returns the paths, none without a point."""
    found = facets(runs)
    if not found:
        return []
    titles = [facet.title if facet.where[0] in facet.title else f"{facet.where[0]}: {facet.title}" for facet in found]
    drawn = [(title, facet.label, facet.points, facet.drawn_levels) for title, facet in zip(titles, found, strict=True)]
    path = pictures.scatters(Path(folder) / f"{NAME}.png", drawn, xlabel="client accuracy (%)")
    return [path, write_atomically(Path(folder) / f"{NAME}.csv", _csv(found).encode())]


def _csv(found: Sequence[Facet]) -> str:
    """One line per point, at full precision, accuracies in [0, 1]; then the levels, of family "level"."""
    page = io.StringIO()
    writer = csv_format.writer(page, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for facet in found:
        place = (*facet.where, facet.measure)
        for one in facet.entries:
            across, up = one.accuracy_ends or ("", ""), one.ends or ("", "")
            writer.writerow([*place, one.run, one.defence, one.kind, one.attack, one.accuracy, *across, one.value, *up])
        for name, value in facet.levels:
            writer.writerow([*place, "", name, "level", "", "", "", "", value, "", ""])
    return page.getvalue()


def facets(runs: Sequence[Run]) -> list[Facet]:
    """Of every place (`_where`) and measure that has a point, in the order of the rows."""
    places: dict[tuple[str, ...], list[tuple[str, dict[str, Any]]]] = {}
    for name, results in runs:
        for row in results["rows"]:
            places.setdefault(_where(results, row), []).append((name, row))
    found = []
    for where, rows in places.items():
        words = (where[0], f"share policy {where[1]}", where[2], f"{where[3]} checkpoint")
        told = [text for number, text in enumerate(words) if number == 3 or len({other[number] for other in places}) > 1]
        for measure, unit, label in _MEASURES:
            entries = _entries(runs, rows, measure)
            if entries:
                title = f"{label[0].upper()}{label[1:]} over client accuracy, {', '.join(told)}"
                found.append(Facet(title=title, where=where, measure=measure, unit=unit, label=label, entries=entries, levels=_levels(runs, rows, measure)))
    return found


def _where(results: dict[str, Any], row: dict[str, Any]) -> tuple[str, ...]:
    """What must be the same for two rows to stand in one plot."""
    data, seen = results["data"], row.get("threat") or {}
    release = f"{seen.get('release', 'release')} of {seen.get('batch_size', '?')}, {seen.get('local_training') or str(seen.get('local_steps', 1)) + ' local step(s)'}"
    title = data.get("title") or data["name"]
    title += " (SYNTHETIC)" if data["synthetic"] and "synthetic" not in title.lower() else ""
    return title, row["share_policy"], release, row["checkpoint"]


def _entries(runs: Sequence[Run], rows: list[tuple[str, dict[str, Any]]], measure: str) -> list[Entry]:
    defended = [(results, row["defence"]) for _, results in runs for row in results["rows"] if not is_undefended(results, row["defence"])]
    families = list(dict.fromkeys(family(*one) for one in defended))  # of the whole page, so that colours stay
    found = []
    for name, results in runs:
        here = [row for owner, row in rows if owner == name]
        groups = strengths({defence: settings(results, defence) for defence in dict.fromkeys(row["defence"] for row in here)})
        for defence in dict.fromkeys(row["defence"] for row in here):
            row = strongest([row for row in here if row["defence"] == defence], measure)
            if row is None or mean_of(row.get("client_accuracy")) is None:
                continue
            seeds, kind = row.get("client_accuracies") or [], family(results, defence)
            found.append(Entry(
                run=name, defence=defence, kind=kind, attack=row["attack"], accuracy=mean_of(row["client_accuracy"]), value=mean_of(row[measure]),
                accuracy_ends=interval_of(row["client_accuracy"]) or ((min(seeds), max(seeds)) if len(seeds) > 1 else None), ends=interval_of(row[measure]),
                family=0 if is_undefended(results, defence) else 1 + families.index(kind),
                lines=tuple(f"{name}/{number}" for number, group in enumerate(groups) if defence in group),
            ))  # fmt: skip
    return found


def _levels(runs: Sequence[Run], rows: list[tuple[str, dict[str, Any]]], measure: str) -> list[tuple[str, float]]:
    """The class mean of each run; for accuracies the judge's chance and ceiling too. A level is named once where runs share it."""
    found: dict[tuple[str, float], list[str]] = {}
    for name, results in runs:
        if not any(owner == name for owner, _ in rows):
            continue
        judge, known = results.get("judge") or {}, [("class mean", mean_of(bound_named(results, "class mean").get(measure)))]
        if measure == "attacker_accuracy":
            known += [("chance", judge.get("chance")), ("judge on the true images", judge.get("accuracy_on_truth"))]
        for text, value in known:
            if value is not None:
                found.setdefault((text, value), []).append(name)
    alone = {text for text, _ in found if sum(other == text for other, _ in found) == 1}
    levels: dict[float, list[str]] = {}
    for (text, value), owners in found.items():
        levels.setdefault(value, []).append(text if text in alone else f"{text} ({', '.join(owners)})")
    return [(" = ".join(texts), value) for value, texts in levels.items()]
