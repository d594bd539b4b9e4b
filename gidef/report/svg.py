"""Plots as inline SVG, drawn without a library: points with intervals, curves, and one dot per image or client.

Text is in the page's own colour, so that it can be read on a light and on a dark ground. Series differ in colour (Okabe and Ito 2008) and in marker
or dashes, and carry their names beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gidef.report.markup import Html, tag

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = (None, "7 3", "2 3", "8 3 2 3", "12 4")
_MARKERS = (
    "M-5,-5H5V5H-5Z", "M0,-6L6,5H-6Z", "M0,-7L7,0L0,7L-7,0Z", "M0,6L6,-5H-6Z", "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    "M0,-7L2,-2L7,-2L3,1L4,6L0,3L-4,6L-3,1L-7,-2L-2,-2Z", "M-6,-4L-4,-6L0,-2L4,-6L6,-4L2,0L6,4L4,6L0,2L-4,6L-6,4L-2,0Z",
)  # fmt: skip
"""As many as have no divisor in common with the colours' number, so that pairs of both recur late."""
_CIRCLE = "M-5,0A5,5 0 1 1 5,0A5,5 0 1 1 -5,0Z"
MOST_NAMED = 18
"""Curves of a picture that all have a name; of more, those of a family share one."""
_WIDTH, _LETTER = 640, 6.4  # px: of a plot, and the mean width of a letter at 12 px


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A defence in a plot. x_ends, y_ends: (low, high) of an interval.  family: of colour and marker, 0 for the page's own.  lines: points that share one
    are joined."""

    label: str
    x: float
    y: float
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None
    family: int = 0
    lines: tuple[str, ...] = ()


def scatter(points: Sequence[Point], levels: Sequence[tuple[str, float]], *, name: str, xlabel: str, ylabel: str) -> Html:
    """Points with their intervals, joined along x within a line; levels: named horizontal lines."""
    height, left, right, top, bottom = 400, 56, 20, 16, 48
    xs = [value for point in points for value in (point.x, *(point.x_ends or ()))]
    ys = [value for point in points for value in (point.y, *(point.y_ends or ()))] + [value for _, value in levels]
    at_x, xticks = _axis(xs, left, _WIDTH - right, share=0.12)
    at_y, yticks = _axis(ys, height - bottom, top)
    marks = [_ticks(xticks, yticks, at_x, at_y, left, _WIDTH - right, height - bottom, xlabel, ylabel)]
    taken = [(at_x(point.x) - 7, at_y(point.y) - 7, at_x(point.x) + 7, at_y(point.y) + 7) for point in points]
    for point in points:
        x, y = at_x(point.x), at_y(point.y)
        taken += [(x - 2, at_y(point.y_ends[1]), x + 2, at_y(point.y_ends[0]))] if point.y_ends else []
        taken += [(at_x(point.x_ends[0]), y - 2, at_x(point.x_ends[1]), y + 2)] if point.x_ends else []
    for text, value in levels:
        y, width = at_y(value), _LETTER * len(text)
        marks.append(tag("line", x1=left, x2=_WIDTH - right, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="level"))
        steps = [left + 4 + number / 8 * (_WIDTH - right - width - left - 4) for number in range(9)]
        box = free(taken, [(x, y + rise) for x in steps for rise in (-15, 2)], width, 13)
        marks.append(_text(box[0], box[1] + 11, text, class_="quiet"))
        taken += [box, (left, y - 1, _WIDTH - right, y + 1)]
    for line in dict.fromkeys(line for point in points for line in point.lines):
        chain = sorted((point for point in points if line in point.lines), key=lambda point: point.x)
        where = " ".join(f"{at_x(point.x):.1f},{at_y(point.y):.1f}" for point in chain)
        style = {"stroke": colour(chain[0].family), "stroke_width": 1.5, "stroke_dasharray": dashes(chain[0].family)}
        marks.append(tag("polyline", points=where, fill="none", **style))
    for point in points:
        x, y = at_x(point.x), at_y(point.y)
        bars = [((x, at_y(point.y_ends[0])), (x, at_y(point.y_ends[1])))] if point.y_ends else []
        bars += [((at_x(point.x_ends[0]), y), (at_x(point.x_ends[1]), y))] if point.x_ends else []
        drawn = [tag("line", x1=f"{a:.1f}", y1=f"{b:.1f}", x2=f"{c:.1f}", y2=f"{d:.1f}", class_="bar") for (a, b), (c, d) in bars]
        shown = f"{point.label}: {ylabel} {point.y:.2f}{_between(point.y_ends)}, {xlabel} {point.x:.2f}{_between(point.x_ends)}"
        drawn.append(tag("path", d=_marker(point.family), transform=f"translate({x:.1f},{y:.1f})"))
        text, width = _short(point.label), _LETTER * len(_short(point.label))
        beside = [(x + 10, y - 7), (x - 10 - width, y - 7)]
        spots = beside + [(x + side, y + rise) for rise in (-22, 8, -37, 23, -52, 38, -67, 53, -82, 68, -97, 83) for side in (10, -10 - width, -width / 2)]
        inside = [spot for spot in spots if left <= spot[0] <= _WIDTH - width and top - 8 <= spot[1] <= height - bottom - 13]
        box = free(taken, inside or [(max(left, _WIDTH - width), y - 22)], width, 13)
        taken.append(box)
        end = nearest(box, x, y)
        if abs(end[1] - y) > 20:  # far away: a line says whose name it is
            drawn.append(tag("line", x1=f"{x:.1f}", y1=f"{y:.1f}", x2=f"{end[0]:.1f}", y2=f"{end[1]:.1f}", class_="leader"))
        drawn += [_text(box[0], box[1] + 11, text), tag("title", shown)]
        marks.append(tag("g", *drawn, class_="point", fill=colour(point.family), stroke=colour(point.family), data_x=repr(point.x), data_y=repr(point.y)))
    return _svg(height, name, marks)


def curves(series: Mapping[str, Sequence[tuple[float, float]]], styles: Mapping[str, tuple[int, int]], *, name: str, xlabel: str, ylabel: str,
           level: tuple[str, float] | None = None, families: Mapping[str, str] | None = None) -> Html:  # fmt: skip
    """Lines with their names at the right end, below one another in a plot as high as they need. styles: per name the indices of colour and dashes; level:
    a named horizontal line; families: per name another, which of more than MOST_NAMED lines is written once, at the end of its longest."""
    together = families is not None and len(series) > MOST_NAMED
    at: dict[str, str] = {}  # a name → the line that it stands at
    for label, points in series.items():
        text = families[label] if together else label
        if text not in at or points[-1][0] > series[at[text]][-1][0]:
            at[text] = label
    shown = {label: text for text, label in at.items()}
    left, top, bottom = 56, 12, 44
    height = max(320, 18 + 14 * len(shown))
    at_y, yticks = _axis([y for points in series.values() for _, y in points] + ([level[1]] if level else []), height - bottom, top)
    ends = {label: at_y(series[label][-1][1]) for label in shown}
    written = dict(zip(sorted(ends, key=ends.get), _apart(sorted(ends.values()), 14, height - 6), strict=True))
    moved = max(abs(written[label] - ends[label]) for label in shown) > 7
    gap = 30 if moved else 8  # room for a line from each end to its name
    right = 8 + gap + min(220, _LETTER * max(len(_short(text)) for text in shown.values()))
    at_x, xticks = _axis([x for points in series.values() for x, _ in points], left, _WIDTH - right, share=0.0, whole=True)
    marks = [_ticks(xticks, yticks, at_x, at_y, left, _WIDTH - right, height - bottom, xlabel, ylabel)]
    if level:
        y = at_y(level[1])
        marks += [tag("line", x1=left, x2=_WIDTH - right, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="level"), _text(left + 4, y - 4, level[0], class_="quiet")]
    for label, points in series.items():
        number, dash = styles[label]
        where = [f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points]
        style = {"stroke": colour(number), "stroke_width": 1 if together else 2, "fill": "none", "stroke_dasharray": dashes(dash)}
        drawn = [tag("polyline", points=" ".join(where), **style)]
        if len(points) <= 30:
            drawn += [tag("path", d=_marker(number), transform=f"translate({spot}) scale(.6)", fill=colour(number)) for spot in where]
        if label in shown:
            x, y = at_x(points[-1][0]), written[label]
            if moved:
                drawn.append(tag("line", x1=f"{x + 4:.1f}", y1=f"{ends[label]:.1f}", x2=f"{x + gap - 3:.1f}", y2=f"{y:.1f}", class_="leader", stroke=colour(number)))
            drawn.append(_text(x + gap, y + 4, _short(shown[label])))
        marks.append(tag("g", *drawn, tag("title", label)))
    return _svg(height, name, marks)


def _apart(places: Sequence[float], step: float, last: float) -> list[float]:
    """Rising places, moved where they must to stand a step apart, none beyond the last."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + step) if found else place)
    for number in reversed(range(len(found))):
        last = found[number] = min(found[number], last)
        last -= step
    return found


def strips(rows: Sequence[tuple[str, int, Sequence[tuple[str, str, float]]]], *, name: str, xlabel: str, level: tuple[str, float] | None = None,
           most: float = math.inf) -> Html:  # fmt: skip
    """One line of dots per row: (label, colour and marker, dots); a dot is (key, what it is, value). The short upright stroke is the mean.
    A value above `most` is drawn there."""
    left, step, top = 24 + min(330, _LETTER * max(len(_short(label)) for label, _, _ in rows)), 22, 22
    height = top + step * len(rows) + 44
    values = [min(value, most) for _, _, dots in rows for _, _, value in dots] + ([level[1]] if level else [])
    at_x, xticks = _axis(values, left, _WIDTH - 16)
    marks = [_ticks(xticks, [], at_x, None, left, _WIDTH - 16, height - 44, xlabel, "")]
    if level:
        x = at_x(level[1])
        marks += [tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=top - 4, y2=height - 44, class_="level")]
        width = _LETTER * len(level[0])
        marks += [_text(min(max(left, x - width / 2), _WIDTH - width), top - 8, level[0], class_="quiet")]
    for number, (label, family, dots) in enumerate(rows):
        y = top + step * (number + 0.5)
        drawn = [_text(left - 10, y + 4, _short(label), text_anchor="end"), tag("line", x1=left, x2=_WIDTH - 16, y1=y, y2=y, class_="rule")]
        for key, what, value in dots:
            place = f"translate({at_x(min(value, most)):.1f},{y}) scale(.8)"
            told = tag("title", f"{label}: {what}, {value:.1f}")
            drawn.append(tag("path", told, d=_marker(family), transform=place, class_="dot", data_victim=key, data_value=repr(value)))
        if dots:
            x = at_x(min(most, sum(value for _, _, value in dots) / len(dots)))
            drawn.append(tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=y - 9, y2=y + 9, class_="mean"))
        marks.append(tag("g", *drawn, fill=colour(family)))
    return _svg(height, name, marks)


def colour(family: int) -> str:
    return "currentColor" if family == 0 else COLOURS[(family - 1) % len(COLOURS)]


def dashes(number: int) -> str | None:
    return _DASHES[number % len(_DASHES)]


def _marker(family: int) -> str:
    return _CIRCLE if family == 0 else _MARKERS[(family - 1) % len(_MARKERS)]


def _axis(values: Sequence[float], start: float, end: float, *, share: float = 0.07, whole: bool = False) -> tuple[Any, list[float]]:
    """(value → pixel, ticks) with a margin of a share of the values' span on either side."""
    low, high = min(values), max(values)
    margin = share * (high - low) or (0.0 if whole and high > low else max(abs(high) * 0.05, 0.5))
    low, high = low - margin, high + margin
    size = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (size * factor) <= 6)
    step = max(1.0, step) if whole else step
    ticks = [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return (lambda value: start + (value - low) / (high - low) * (end - start)), ticks


def _ticks(xticks: list[float], yticks: list[float], at_x: Any, at_y: Any, left: float, right: float, floor: float, xlabel: str, ylabel: str) -> list[Any]:
    """The floor, ticks below it and lines across, with their numbers, and the names of the axes."""
    marks = [tag("line", x1=left, x2=right, y1=floor, y2=floor, class_="axis")]
    for value in xticks:
        x = f"{at_x(value):.1f}"
        marks += [tag("line", x1=x, x2=x, y1=floor, y2=floor + 5, class_="axis"), _text(at_x(value), floor + 18, f"{value:.6g}", text_anchor="middle")]
    for value in yticks:
        y = f"{at_y(value):.1f}"
        marks += [tag("line", x1=left, x2=right, y1=y, y2=y, class_="rule"), _text(left - 8, at_y(value) + 4, f"{value:.6g}", text_anchor="end")]
    marks.append(_text((left + right) / 2, floor + 36, xlabel, text_anchor="middle", class_="name"))
    if ylabel:
        marks.append(_text(0, 0, ylabel, text_anchor="middle", class_="name", transform=f"translate(14,{floor / 2:.1f}) rotate(-90)"))
    return marks


Box = tuple[float, float, float, float]
"""Left, top, right and bottom in px."""


def free(taken: Sequence[Box], spots: Sequence[tuple[float, float]], width: float, height: float) -> Box:
    """The first spot whose box covers nothing, else the one that covers least."""

    def covered(box: Box) -> float:
        return sum(max(0.0, min(box[2], b[2]) - max(box[0], b[0])) * max(0.0, min(box[3], b[3]) - max(box[1], b[1])) for b in taken)

    return min(((x, y, x + width, y + height) for x, y in spots), key=covered)


def nearest(box: Box, x: float, y: float) -> tuple[float, float]:
    """The point of a box that is nearest to (x, y)."""
    return min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])


def _text(x: float, y: float, text: str, **attributes: Any) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", **attributes)


def _short(label: str, most: int = 44) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"


def _between(ends: tuple[float, float] | None) -> str:
    return f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else ""


def _svg(height: float, name: str, marks: list[Any]) -> Html:
    return tag("svg", *marks, viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label=name)
