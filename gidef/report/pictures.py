"""Figures and contact sheets, as PNG, PDF or SVG by the file's ending. Each is replaced whole; threads may draw at once.

Colours are Okabe and Ito's (2008), told apart by the colour-blind, and lines differ in their dashes as well. The caller's
title says "synthetic" where the data are.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gidef.errors import InputError
from gidef.report import svg
from gidef.report.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
_DPI = 150
_CELL, _GAP, _LINE = 128, 14, 24  # px: side of a shown image at least, space between two, height of a text line at 10 pt
_ROWS = 24  # names in a column of a legend, of a few dozen curves
_LETTER = 12.5  # px: mean width of a letter at 10 pt, on the wide side


def grid(
    path: str | Path,
    columns: Sequence[tuple[str, Any]],
    row_labels: Sequence[str] | None = None,
    title: str | None = None,
    captions: Sequence[Sequence[str] | None] | None = None,
    max_rows: int = 16,
) -> Path:
    """A contact sheet: one column per kind of image (private, undefended, defended, ...), one row per victim, in the order given.

    Args:    columns: (title, images (N, C, H, W)); uint8, or float in [0, 1] (clamped; NaN is drawn mid-grey); C is 1 or 3.
             row_labels: N texts.  captions: per column None or N texts, such as "24.4 dB", written under the images.
             max_rows: further rows are left out, and a line below says so.
    Returns: the path. Images are enlarged by whole numbers of pixels, never smoothed.
    Raises:  InputError if columns differ in N, or for another shape or ending of the file.
    """
    pictures = [drawable(images, f"column {name!r}") for name, images in columns]
    sizes = {len(images) for images in pictures}
    if len(sizes) != 1:
        raise InputError(f"grid {path}: columns of {sorted(sizes)} images, expected as many in each: give every column the same victims.")
    for texts in (row_labels, *(captions or ())):
        if texts is not None and len(texts) != len(pictures[0]):
            raise InputError(f"grid {path}: {len(texts)} labels or captions for {len(pictures[0])} images, expected one each.")
    rows = min(max_rows, len(pictures[0]))
    below = f"The first {rows} of {len(pictures[0])}." if rows < len(pictures[0]) else None
    cells = [[images[row] for images in pictures] for row in range(rows)]
    texts = [[caption[row] if caption else "" for caption in captions] for row in range(rows)] if captions else None
    return _sheet(path, cells, titles=[name for name, _ in columns], row_labels=row_labels, title=title, captions=texts, below=below)


def preview(path: str | Path, images: Any, labels: Any, class_names: Sequence[str], per_class: int = 8, title: str | None = None) -> Path:
    """The first `per_class` images of each class, one row per class.

    Args:   images: (N, C, H, W) as in `grid`.  labels: (N,) in [0, len(class_names)).
    Raises: InputError as in `grid`. A class without images has an empty row.
    """
    labels = _array(labels)
    members = [np.flatnonzero(labels == number)[:per_class] for number in range(len(class_names))]
    images = _array(images)
    drawn = [list(drawable(images[chosen], "images")) if len(chosen) else [] for chosen in members]
    counts = [f"{name} ({int((labels == number).sum())})" for number, name in enumerate(class_names)]
    return _sheet(path, drawn, titles=None, row_labels=counts, title=title, captions=None, below=None, gap=4)


def partition_bars(path: str | Path, counts: Any, class_names: Sequence[str], title: str | None = None) -> Path:
    """Stacked bars of class counts. counts: (clients, classes) int; class_names: one per class (a colour bar from 13 on)."""
    counts = _array(counts)
    num_clients, num_classes = counts.shape
    if num_classes != len(class_names):
        raise InputError(f"partition_bars {path}: counts for {num_classes} classes and {len(class_names)} names: give one name per class.")
    named = num_classes <= 12
    figure, axes = _axes(title, "client", "training images", width=max(7.0, min(16.0, 2.5 + 0.3 * num_clients)))
    bottom = np.zeros(num_clients)
    for number, name in enumerate(class_names):
        if named:  # after eight colours the same ones come back hatched
            style = {"facecolor": OKABE_ITO[number % 8], "hatch": "///" if number >= 8 else None, "edgecolor": "white"}
        else:
            style = {"facecolor": _viridis(number / (num_classes - 1))}
        top = bottom + counts[:, number]
        if num_clients <= 60:
            width = 0.5 if named else 0
            axes.bar(np.arange(num_clients), top - bottom, bottom=bottom, width=0.85, linewidth=width, label=_literal(name), **style)
        else:  # one outline per class: a thousand clients would be thousands of bars
            axes.stairs(top, np.arange(num_clients + 1) - 0.5, baseline=bottom, fill=True, linewidth=0, label=_literal(name), **style)
        bottom = top
    axes.set_xlim(-0.6, num_clients - 0.4)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.margins(y=0.03)
    if named:
        handles, names = axes.get_legend_handles_labels()
        _legend(axes, handles[::-1], names[::-1])  # the order of the stack, top first
    else:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        figure.colorbar(ScalarMappable(Normalize(0, num_classes - 1), "viridis"), ax=axes, label="class")
    return _save(figure, path)


def learning_curves(
    path: str | Path,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    title: str | None = None,
    ylabel: str = "validation accuracy",
    chance: float | None = None,
    families: Mapping[str, str] | None = None,
) -> Path:
    """Accuracy in per cent over rounds.

    Args: curves: per label (round, accuracy in [0, 1] or None).  chance: a dotted level.
          families: label → name, such as the defence of several seeds; more than `svg.MOST_NAMED` curves are drawn thin, and alike and named once in each.
    """
    figure, axes = _axes(title, "round", f"{ylabel} (%)")
    together = families is not None and len(curves) > svg.MOST_NAMED
    names = [families[label] if together else label for label in curves]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    for place, (name, points) in enumerate(zip(names, curves.values(), strict=True)):
        kept = [(step, 100 * float(value)) for step, value in points if value is not None]
        style = _line(numbers[name]) | ({"linewidth": 0.9} if together else {"marker": "o" if len(kept) <= 20 else None, "markersize": 4})
        label = _literal(name) if name not in names[:place] else None
        axes.plot([step for step, _ in kept], [value for _, value in kept], label=label, **style)
    if chance is not None:
        axes.axhline(100 * chance, color="0.4", linewidth=1, linestyle=":", label="chance")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _legend(axes)
    return _save(figure, path)


def attack_curves(path: str | Path, losses: Mapping[str, Any], title: str | None = None, iterations: Mapping[str, int] | int | None = None) -> Path:
    """The attackers' own losses, so that a failed optimiser does not pass for a defence.

    Args: losses: per label (points,) or (attacks, points); of several the median is drawn, with the middle 80 % shaded.
          A curve that ends early, of an attack that stopped or failed, goes on at its last finite value. Those without a finite value are left out,
          and the legend counts them.
          iterations: the last point's iteration, for all or per label; None counts the points.
    A logarithmic axis is used where all losses are positive and span more than a factor of 30.
    """
    if isinstance(iterations, Mapping) and not losses.keys() <= iterations.keys():
        raise InputError(f"attack_curves {path}: no iterations given for {sorted(losses.keys() - iterations.keys())}: give them for each label.")
    figure, axes = _axes(title, "iteration" if iterations is not None else "point of the curve", "attacker's loss")
    smallest, largest = np.inf, -np.inf
    for number, (label, values) in enumerate(losses.items()):
        values = np.atleast_2d(_array(values).astype(float))
        attacks, kept = len(values), np.isfinite(values).any(axis=1)
        values = _carried(values[kept])
        if not values.size:
            axes.plot([], [], label=f"{_literal(label)} (no finite loss)", **_line(number))
            continue
        last = iterations[label] if isinstance(iterations, Mapping) else iterations
        steps = np.arange(values.shape[1]) if last is None else np.linspace(0, last, values.shape[1])
        begun = np.isfinite(values).any(axis=0)
        steps, values, style = steps[begun], values[:, begun], _line(number)
        lost = f" ({attacks - len(values)} of {attacks} without a finite loss)" if len(values) < attacks else ""
        axes.plot(steps, np.nanmedian(values, axis=0), label=_literal(label) + lost, **style)
        if len(values) > 1:
            low, high = np.nanquantile(values, [0.1, 0.9], axis=0)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        smallest, largest = min(smallest, np.nanmin(values)), max(largest, np.nanmax(values))
    if 0 < smallest < largest / 30:
        axes.set_yscale("log")
    _legend(axes)
    return _save(figure, path)


def _carried(curves: np.ndarray) -> np.ndarray:
    """(N, points): each curve's last finite value so far, NaN before its first."""
    places = np.maximum.accumulate(np.where(np.isfinite(curves), np.arange(curves.shape[1]), -1), axis=1)
    return np.where(places < 0, np.nan, np.take_along_axis(curves, places.clip(0), axis=1))


def progress_curves(path: str | Path, psnr_db: Mapping[str, Any], iterations: Mapping[str, int], title: str | None = None) -> Path:
    """The evaluator's PSNR of the attackers' best candidates on the way, which no attacker sees.

    Args: psnr_db: per label (attacks, points), at equally spaced iterations, the last at iterations[label]. The mean is drawn.
    """
    figure, axes = _axes(title, "iteration", "PSNR (dB)")
    for number, (label, values) in enumerate(psnr_db.items()):
        values = np.atleast_2d(_array(values).astype(float)).mean(axis=0)
        steps = iterations[label] * np.arange(1, len(values) + 1) / len(values)
        axes.plot(steps, values, label=_literal(label), marker="o", markersize=3, **_line(number))
    _legend(axes)
    return _save(figure, path)


def scaling_curves(
    path: str | Path, ranks: Sequence[int], speedups: Mapping[str, Sequence[float]], *, ideal: Sequence[float], bound: Sequence[float],
    title: str | None = None, ylabel: str = "times as fast as one rank", longest: str = "client",
) -> Path:
    """Speed-up over ranks, both logarithmic, beside the ideal line and the bound Σt / max t of what cannot be divided.

    Args:    longest: what that is.  speedups: by what was measured or forecast, one value per number of ranks, above 0.
    """  # fmt: skip
    figure, axes = _axes(title, "ranks", ylabel)
    axes.plot(ranks, ideal, color="#777777", linewidth=1, label="ideal")
    axes.plot(ranks, bound, color="#000000", linewidth=1, linestyle=":", label=f"bound by the longest {longest}")
    for number, (name, values) in enumerate(speedups.items()):
        axes.plot(ranks, values, marker="o", markersize=3, label=name, **_line(number))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xticks(list(ranks), [str(one) for one in ranks])
    _legend(axes)
    return _save(figure, path)


def scatters(
    path: str | Path, facets: Sequence[tuple[str, str, Sequence[svg.Point], Sequence[tuple[str, float]]]], *, xlabel: str
) -> Path:
    """Plots side by side in pairs: points with their intervals and names, joined within their lines, over named levels.

    Args: facets: (title, name of the upright axis, points, levels) of each plot, at least one.
    """
    from matplotlib.figure import Figure

    columns = min(2, len(facets))
    rows = -(-len(facets) // columns)
    figure = Figure(figsize=(7.2 * columns, 4.8 * rows), dpi=_DPI, layout="constrained", facecolor="white")
    for number, (title, ylabel, points, levels) in enumerate(facets):
        axes = figure.add_subplot(rows, columns, number + 1)
        _dress(axes, title, xlabel, ylabel, letters=58)
        _scatter(axes, points, levels)
    figure.draw_without_rendering()  # settles the layout, without which a name has no place in pixels
    figure.set_layout_engine("none")
    for axes, (_, _, points, levels) in zip(figure.axes, facets, strict=True):
        _name_points(axes, points, levels)
    return _save(figure, path)


_MARKERS = ("s", "^", "D", "v", "P", "*", "X", "h")


def _scatter(axes: Axes, points: Sequence[svg.Point], levels: Sequence[tuple[str, float]]) -> None:
    for line in dict.fromkeys(line for point in points for line in point.lines):
        chain = sorted((point for point in points if line in point.lines), key=lambda point: point.x)
        axes.plot([point.x for point in chain], [point.y for point in chain], color=_colour(chain[0].family), linewidth=1.2)
    for point in points:
        across, up = ([[abs(end - middle)] for end in ends] if ends else None for ends, middle in ((point.x_ends, point.x), (point.y_ends, point.y)))
        marker = "o" if point.family == 0 else _MARKERS[(point.family - 1) % len(_MARKERS)]
        axes.errorbar([point.x], [point.y], xerr=across, yerr=up, color=_colour(point.family), marker=marker, markersize=6, elinewidth=1)
    for _, value in levels:
        axes.axhline(value, color="0.4", linewidth=1, linestyle=":")
    axes.margins(0.16, 0.1)


def _colour(family: int) -> str:
    return "black" if family == 0 else svg.COLOURS[(family - 1) % len(svg.COLOURS)]


def _name_points(axes: Axes, points: Sequence[svg.Point], levels: Sequence[tuple[str, float]]) -> None:
    """Names where they cover neither points, bars, levels nor each other, as far as there is room."""
    box, at = axes.get_window_extent(), axes.transData.transform
    letter, high = 7.5 * _DPI / 72 * 0.56, 7.5 * _DPI / 72 * 1.2
    taken = []
    for point in points:
        x, y = at((point.x, point.y))
        low, top = (at((point.x, end))[1] for end in point.y_ends or (point.y, point.y))
        left, right = (at((end, point.y))[0] for end in point.x_ends or (point.x, point.x))
        taken += [(x - 9, y - 9, x + 9, y + 9), (x - 2, low, x + 2, top), (left, y - 2, right, y + 2)]

    for line in axes.get_lines():
        if len(line.get_xdata()) > 1 and line.get_transform() == axes.transData:  # of a family, in steps of a letter or so
            ends = at(line.get_xydata())
            taken += [(x - 2, y - 2, x + 2, y + 2) for a, b in itertools.pairwise(ends) for x, y in np.linspace(a, b, 1 + int(np.abs(b - a).max() / 8))]

    def write(text: str, spots: Sequence[tuple[float, float]], **style: Any) -> svg.Box:
        width = letter * len(text)
        inside = [(x, y) for x, y in spots if box.x0 <= x <= box.x1 - width and box.y0 <= y <= box.y1 - high]
        place = svg.free(taken, inside or [(max(box.x0, min(spots[0][0], box.x1 - width)), spots[0][1])], width, high)
        taken.append(place)
        axes.text(*axes.transData.inverted().transform(place[:2]), _literal(text), fontsize=7.5, va="bottom", parse_math=False, **style)
        return place

    for text, value in levels:
        y = at((axes.get_xlim()[0], value))[1]
        steps = [box.x0 + 6 + number / 8 * (box.width - letter * len(text) - 12) for number in range(9)]
        write(text, [(x, y + rise) for x in steps for rise in (3, -high - 3)], color="0.4")
        taken.append((box.x0, y - 1, box.x1, y + 1))
    for point in points:
        text = point.label
        (x, y), width = at((point.x, point.y)), letter * len(text)
        rises = (-high / 2, *(high * step for number in range(7) for step in (number + 0.5, -number - 1.5)))
        named = write(text, [(x + side, y + rise) for rise in rises for side in (13, -13 - width, -width / 2)], color=_colour(point.family))
        end = svg.nearest(named, x, y)
        if abs(end[1] - y) > 1.5 * high:  # far away: a line says whose name it is
            ends = axes.transData.inverted().transform([(x, y), end])
            axes.plot(*ends.T, color=_colour(point.family), linewidth=0.5, scalex=False, scaley=False)


def _sheet(
    path: str | Path,
    cells: list[list[np.ndarray]],
    *,
    titles: list[str] | None,
    row_labels: Sequence[str] | None,
    title: str | None,
    captions: list[list[str]] | None,
    below: str | None,
    gap: int = _GAP,
) -> Path:
    """Images (H, W, 3) laid out to the pixel: rows of `cells`, which may differ in length."""
    from matplotlib.figure import Figure

    num_columns = max([len(row) for row in cells], default=0) or 1
    first = next((image for row in cells for image in row), np.zeros((1, 1, 3)))
    scale = max(1, -(-_CELL // max(first.shape[:2])))
    high, wide = first.shape[0] * scale, first.shape[1] * scale
    heads = [textwrap.wrap(text, max(6, int((wide + gap) / _LETTER))) or [""] for text in titles or []]
    labels = [textwrap.wrap(str(label), 16) for label in (row_labels or [])[: len(cells)]]
    left = _GAP + int(_LETTER * max([len(line) for label in labels for line in label], default=0)) + (_GAP if labels else 0)
    width = left + num_columns * (wide + gap) + _GAP
    width = max(width, 480)
    title_lines = textwrap.wrap(title, int((width - 2 * _GAP) / (1.15 * _LETTER))) if title else []
    top = _GAP + int(1.25 * _LINE) * len(title_lines) + (_GAP // 2 if title else 0)
    head = _LINE * max([len(lines) for lines in heads], default=0) + 6
    step = high + (_LINE + 4 if captions else 0) + gap
    height = top + head + step * len(cells) + (_LINE + 4 if below else 0) + _GAP
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / width, 1 - y / height, text, parse_math=False, **{"fontsize": 10, "va": "top"} | style)

    for number, line in enumerate(title_lines):
        write(_GAP, _GAP + 1.25 * _LINE * number, line, fontsize=12, weight="bold")
    for column, lines in enumerate(heads):
        for number, line in enumerate(lines):
            write(left + column * (wide + gap) + wide / 2, top + _LINE * (number + head // _LINE - len(lines)), line, ha="center")
    for row, images in enumerate(cells):
        y = top + head + row * step
        if row < len(labels):
            write(left - _GAP, y + high / 2, "\n".join(labels[row]), ha="right", va="center")
        for column, image in enumerate(images):
            x = left + column * (wide + gap)
            axes = figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))
            axes.imshow(image, interpolation="nearest", aspect="auto", vmin=0, vmax=1)
            axes.set_axis_off()
            if captions:
                write(x + wide / 2, y + high + 4, captions[row][column], ha="center", fontsize=9)
    if below:
        write(_GAP, height - _GAP - _LINE, below, fontsize=9, color="0.3")
    return _save(figure, path)


def _axes(title: str | None, xlabel: str, ylabel: str, width: float = 7.0) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.2), dpi=_DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    _dress(axes, title, xlabel, ylabel, letters=int(8.5 * width))
    return figure, axes


def _dress(axes: Axes, title: str | None, xlabel: str, ylabel: str, *, letters: int) -> None:
    """letters: of the title in a line."""
    if title:
        axes.set_title(textwrap.fill(title, letters), fontsize=12, fontweight="bold", loc="left", parse_math=False)
    axes.set_xlabel(xlabel, fontsize=11)
    axes.set_ylabel(ylabel, fontsize=11)
    axes.tick_params(labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _legend(axes: Axes, *entries: Any) -> None:
    """Beside the axes, where it hides nothing; the figure grows with it, so that the axes keep their room."""
    handles, names = entries or axes.get_legend_handles_labels()
    if not handles:
        return
    columns = -(-len(handles) // max(_ROWS, math.isqrt(6 * len(handles))))
    legend = axes.legend(handles, names, ncols=columns, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=10, handlelength=3)
    figure, box, lines = axes.get_figure(), legend.get_window_extent(), len(axes.get_title(loc="left").splitlines())
    width, height = figure.get_size_inches()
    figure.set_size_inches(max(width, 5.0 + box.width / figure.dpi), max(height, 0.4 + 0.25 * lines + box.height / figure.dpi))


def _line(number: int) -> dict[str, Any]:
    colours = [colour for colour in OKABE_ITO if colour != "#F0E442"]  # yellow lines vanish on white
    width = 3.0 if number // (len(colours) * len(_DASHES)) % 2 else 1.8  # once all pairs of colour and dashes are used
    return {"color": colours[number % len(colours)], "linestyle": _DASHES[number % len(_DASHES)], "linewidth": width}


def _viridis(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](share)


def _literal(text: str) -> str:
    """A legend entry as it stands: no mathematics between dollars, and not hidden by a leading underscore."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def drawable(images: Any, what: str) -> np.ndarray:
    """(N, C, H, W) to float (N, H, W, 3) in [0, 1]."""
    images = _array(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(f"{what}: shape {images.shape}, expected (N, C, H, W) with C of 1 or 3.")
    images = images / 255 if images.dtype == np.uint8 else np.clip(np.nan_to_num(images.astype(float), nan=0.5), 0, 1)
    return np.repeat(images.transpose(0, 2, 3, 1), 3 // images.shape[1], axis=3)


def _save(figure: Figure, path: str | Path) -> Path:
    path, page = Path(path), io.BytesIO()
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"picture {path}: ending {path.suffix!r}, expected .png, .pdf or .svg.")
    figure.savefig(page, format=path.suffix[1:], dpi=_DPI)
    return write_atomically(path, page.getvalue())
