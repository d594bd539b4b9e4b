"""Privacy against utility: each defence under its strongest attack, over the accuracy that it leaves the clients, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gidef.report import svg
from gidef.report.kinds import family, settings, strengths
from gidef.report.markup import Html, join, tag
from gidef.report.results import bound_named, interval_of, mean_of
from gidef.report.verdict import is_undefended, strongest

Run = tuple[str, dict[str, Any]]
"""A run's name and its results in the layout of `gidef.report`."""
_MEASURES = (("psnr_db", 1, "strongest attack's PSNR (dB)"), ("attacker_accuracy", 100, "highest attacker accuracy (%)"))
_SAID = """Lower right is better. Each point is a defence under the attack that reaches highest (upper end of its interval; attackers of another threat model,
bounds and ensembles are left out). Upright bars are 95 % intervals over victims, level ones the range over seeds. Lines join defences of one kind that
differ in one strength alone. Client accuracy is the final model's, whatever the checkpoint."""


def plots(runs: Sequence[Run]) -> Html | None:
    """Two plots, PSNR and attacker accuracy over client accuracy, for each data set, share policy, checkpoint and release; None without a point."""
    facets: dict[tuple[str, ...], list[tuple[str, dict[str, Any]]]] = {}
    for name, results in runs:
        for row in results["rows"]:
            facets.setdefault(_where(results, row), []).append((name, row))
    figures = []
    for where, rows in facets.items():
        told = [text for number, text in enumerate(where) if number == 3 or len({other[number] for other in facets}) > 1]
        for measure, unit, label in _MEASURES:
            points = _points(runs, rows, measure, unit)
            if points:
                title = f"{label[0].upper()}{label[1:]} over client accuracy, {', '.join(told)}"
                drawn = svg.scatter(points, _levels(runs, rows, measure, unit), name=title, xlabel="client accuracy (%)", ylabel=label)
                figures.append(tag("figure", tag("figcaption", title), tag("div", drawn, class_="scroll")))
    return join(tag("p", _SAID), tag("div", figures, class_="figures")) if figures else None


def _where(results: dict[str, Any], row: dict[str, Any]) -> tuple[str, ...]:
    """What must be the same for two rows to stand in one plot."""
    data, seen = results["data"], row.get("threat") or {}
    release = f"{seen.get('release', 'release')} of {seen.get('batch_size', '?')}, {seen.get('local_steps', 1)} local step(s)"
    return data.get("title") or data["name"], f"share policy {row['share_policy']}", release, f"{row['checkpoint']} checkpoint"


def _points(runs: Sequence[Run], rows: list[tuple[str, dict[str, Any]]], measure: str, unit: float) -> list[svg.Point]:
    defended = [(results, row["defence"]) for _, results in runs for row in results["rows"] if not is_undefended(results, row["defence"])]
    families = list(dict.fromkeys(family(*one) for one in defended))  # of the whole page, so that colours stay
    points, shared = [], len({owner for owner, _ in rows}) > 1
    for name, results in runs:
        here = [row for owner, row in rows if owner == name]
        groups = strengths({defence: settings(results, defence) for defence in dict.fromkeys(row["defence"] for row in here)})
        for defence in dict.fromkeys(row["defence"] for row in here):
            row = strongest([row for row in here if row["defence"] == defence], measure)
            if row is None or mean_of(row.get("client_accuracy")) is None:
                continue
            seeds, up = row.get("client_accuracies") or [], interval_of(row[measure])
            across = interval_of(row["client_accuracy"]) or ((min(seeds), max(seeds)) if len(seeds) > 1 else None)
            plain = is_undefended(results, defence)
            points.append(svg.Point(
                label=f"{defence}, {name} ({row['attack']})" if shared else f"{defence} ({row['attack']})",
                x=100 * mean_of(row["client_accuracy"]), y=unit * mean_of(row[measure]),
                x_ends=across and (100 * across[0], 100 * across[1]), y_ends=up and (unit * up[0], unit * up[1]),
                family=0 if plain else 1 + families.index(family(results, defence)),
                lines=tuple(f"{name}/{number}" for number, group in enumerate(groups) if defence in group),
            ))  # fmt: skip
    return points


def _levels(runs: Sequence[Run], rows: list[tuple[str, dict[str, Any]]], measure: str, unit: float) -> list[tuple[str, float]]:
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
                found.setdefault((text, unit * value), []).append(name)
    alone = {text for text, _ in found if sum(other == text for other, _ in found) == 1}
    levels: dict[float, list[str]] = {}
    for (text, value), owners in found.items():
        levels.setdefault(value, []).append(text if text in alone else f"{text} ({', '.join(owners)})")
    return [(" = ".join(texts), value) for value, texts in levels.items()]
