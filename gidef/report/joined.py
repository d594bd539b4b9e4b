"""Several runs side by side: one page, one table and one picture of privacy against utility over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gidef.report import html, tables, tradeoff
from gidef.report.files import write_atomically


def write(folders: Sequence[str | Path], into: str | Path | None = None) -> list[Path]:
    """Write report.html, the table of all runs as CSV and LaTeX, tradeoff.png and tradeoff.csv into a folder, the first run's by default.

    The tables are called table.csv and table.tex, and joined-table.csv and joined-table.tex in the folder of a run, which has tables of its own.

    Returns: the paths, the page first; no tradeoff where no defence has both an accuracy and an attack.
    Raises:  as `html.write`.
    """
    place = Path(into or folders[0])
    runs = [(page.name, page.results) for page in html.load(folders)]
    stem = "joined-table" if (place / "results.json").exists() else "table"
    paths = [html.write(folders, into=place)]
    paths += [write_atomically(place / f"{stem}.{ending}", text.encode()) for ending, text in (("csv", tables.joined_csv(runs)), ("tex", tables.joined_latex(runs)))]
    return paths + tradeoff.save(runs, place)
