"""The results as a table: on the console, as plain text, CSV, Markdown and LaTeX, all from the same cells."""

from __future__ import annotations

import csv as csv_format
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from gidef.report.claim import MATCHED
from gidef.report.kinds import defences
from gidef.report.results import EXPORTED, MEASURED, batches, bound_label, failed, interval_of, mean_of, not_applicable
from gidef.report.verdict import criteria

_HEADERS = ("defence", "attack", "checkpoint", "client acc. %", "attacker acc. %", "MSE x1000", "PSNR dB", "SSIM", "eps, delta", "bits per release", "lifetime bits", "Fano %", "oracle dB", "victims", "note")
_FOLDED = ("defence", "attack\ncheckpoint", "client\nacc. %", "attacker\nacc. %", "MSE\nx1000", "PSNR\ndB", "SSIM", "eps\ndelta", "bits\nlifetime\nFano %", "oracle\ndB", "victims")
"""Some columns appear only where they say something: eps where a training was differentially private, bits where noise has a certificate; oracle where an
attack had several starts, the PSNR of the one that the truth would have chosen."""
_FEWER_INTERVALS = (MEASURED, MEASURED[1:], MEASURED[2:], ("psnr_db",))
_SCALE_DIGITS = {"client_accuracy": (100, 1), "attacker_accuracy": (100, 1), "mse": (1000, 1), "psnr_db": (1, 1), "ssim": (1, 2)}
_BITS = ("certified_bits", "releases", "fano", "lifetime_bits", "lifetime_releases", "lifetime_fano")
_STATISTICS = ("mean", "low", "high", "worst", "worst_decile")


@dataclass(frozen=True, slots=True)
class _Line:
    """One row or bound, formatted. values: mean and interval ("" where there is none) of each of MEASURED.  privacy: (ε, δ), or nothing.
    bits: per release, lifetime and Fano's bound, or nothing."""

    names: tuple[str, str, str]
    values: tuple[tuple[str, str], ...]
    privacy: tuple[str, ...] = ()
    bits: tuple[str, str, str] = ("", "", "")
    oracle: str = ""
    victims: str = ""
    notes: str = ""

    def wide(self) -> tuple[str, ...]:
        return (*self.names, *(f"{mean} {interval}".rstrip() for mean, interval in self.values), ", ".join(self.privacy), *self.bits, self.oracle, self.victims, self.notes)

    def folded(self, intervals: tuple[str, ...]) -> tuple[str, ...]:
        defence, attack, checkpoint = (textwrap.fill(name, 16, break_long_words=False) for name in self.names)
        named = zip(MEASURED, self.values, strict=True)
        values = (f"{mean}\n{interval}" if key in intervals and interval else mean for key, (mean, interval) in named)
        return (f"{defence}\nnote {self.notes}" if self.notes else defence, f"{attack}\n{checkpoint}".rstrip(), *values, "\n".join(self.privacy), "\n".join(self.bits).strip(), self.oracle, self.victims)


def table(results: dict[str, Any], width: int = 120) -> Table:
    """Attacks, beneath them the bounds; the judge and the notes in the caption.

    Args:    results: in the layout of `gidef.report`.  width: columns at hand. Where they do not hold everything side by side, the
             95 % intervals move to a second line; where that is too wide still, only PSNR keeps its own. 80 columns will do.
    Returns: a rich Table.
    """
    rows, bounds, notes = _lines(results)
    shown = _shown(_HEADERS, rows, notes)
    found = _table(results, notes, _HEADERS, shown, [line.wide() for line in rows], [line.wide() for line in bounds])
    for intervals in _FEWER_INTERVALS:
        if RichConsole(file=io.StringIO(), width=1000).measure(found).maximum <= width:
            break
        shown = _shown(_FOLDED, rows, notes)
        found = _table(results, notes, _FOLDED, shown, [line.folded(intervals) for line in rows], [line.folded(intervals) for line in bounds])
    return found


def training_table(results: dict[str, Any]) -> Table:
    """One line per defence and seed: accuracies, the worst client, seconds and bytes per round: a cohort's, down as they are and up as the defence sends them,
    without keys, shares and framing."""
    keys = ("val_accuracy", "test_accuracy", "macro_f1", "auc", "client_accuracy_worst")
    found = _empty(_title(results, "training"), "MB: down to and up from a round's clients, each as the defence sends its update, without keys, shares and framing.")
    headers = ("defence", "seed", "rounds", "best\nround", "val\nacc. %", "test\nacc. %", "macro\nF1 %", "AUC\n%", "worst\nclient %")
    for header in (*headers, "s/\nround", "MB/\nround"):
        found.add_column(header, justify="left" if header == "defence" else "right")
    for run in results["training"]:
        shares = [_number(mean_of(run.get(key)), 100.0, 1) for key in keys]
        costs = [_number(run.get("seconds_per_round"), 1.0, 2), _number(run.get("bytes_per_round"), 1e-6, 2)]
        counts = [str(run.get(key, "-")) for key in ("seed", "rounds", "best_round")]
        found.add_row(*(Text(cell) for cell in (run["defence"], *counts, *shares, *costs)))
    return found


def judges_table(results: dict[str, Any]) -> Table | None:
    """Attacker accuracy by each judge, of every row and bound; None where there is but one judge."""
    head, *lines = judged_cells(results) or [()]
    if not head:
        return None
    found = _empty(_title(results, "attacker accuracy by judge"), "In %, with 95 % intervals.")
    for header in head:
        found.add_column(header, justify="left" if header in head[:3] else "right")
    for line in lines:
        found.add_row(*map(Text, line))
    return found


def tuned_table(results: dict[str, Any]) -> Table | None:
    """Strengths that a search over whole trainings found (`tuned_cells`); None where nothing was searched."""
    head, *lines = tuned_cells(results) or [()]
    if not head:
        return None
    found = _empty(_title(results, "strengths found by a search"), "Accuracies in % on validation images, of the first seed; trials: trainings of the search.")
    for header in head:
        found.add_column(header, justify="right" if header in TUNED_NUMBERS else "left")
    for line in lines:
        found.add_row(*map(Text, line))
    return found


TUNED_NUMBERS = ("value", "target acc. %", "reached acc. %", "trials")


def tuned_cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Header and lines: each searched defence, its field and value, target and what was reached, and how the search ended; nothing without any.

    Results may lack what later versions write: `reached`, and `accuracy`, which are then read off the trials: within a point (`claim.MATCHED`).
    """
    lines = []
    for name, entry in (results.get("tuned") or {}).items():
        tried, value, target = entry.get("tried") or [], entry.get("value"), entry.get("target")
        accuracy = entry.get("accuracy", next((found for one, found in tried if one == value), None))
        numbers = ["-" if value is None else f"{value:.4g}", _number(target, 100, 1), _number(accuracy, 100, 1), str(len(tried) or "-")]
        lines.append((name, str(entry.get("field", "-")), *numbers, _outcome(entry, defences(results).get(name), accuracy)))
    return [("defence", "field", *TUNED_NUMBERS, "outcome"), *lines] if lines else []


def _outcome(entry: dict[str, Any], spec: Any, accuracy: float | None) -> str:
    """Whether a search met its target, and where it ended if not."""
    value, target = entry.get("value"), entry.get("target")
    reached = entry.get("reached")
    if reached is None:
        reached = None if accuracy is None or target is None else abs(accuracy - target) <= MATCHED + 1e-9
    if reached is None:
        return "not recorded"
    spec = spec if isinstance(spec, dict) else {}
    ended = [end for end in ("low", "high") if value is not None and spec.get(end) == value]
    place = f"the {ended[0]} end of its range [{spec['low']:g}, {spec['high']:g}]" if ended else None
    gone = f"; diverged at {', '.join(f'{one:.4g}' for one in entry['diverged'])}" if entry.get("diverged") else ""
    if reached:
        return (f"reached, at {place}" if place else "reached") + gone
    return (f"NOT reached: the search ended at {place}" if place else "NOT reached: the nearest of its trials") + gone


def judge_names(results: dict[str, Any]) -> list[str]:
    """Of the further judges."""
    return list((results.get("judge") or {}).get("others") or {})


def judged_cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Header and lines: rows, bounds, and what the judges make of the true images; nothing without further judges."""
    names = judge_names(results)
    if not names:
        return []

    def shares(entry: dict[str, Any]) -> list[str]:
        values = [entry.get("attacker_accuracy"), *(entry.get("attacker_accuracy_by", {}).get(name) for name in names)]
        return [" ".join([_number(mean_of(value), 100, 1), *([f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"] if (ends := interval_of(value)) else [])]) for value in values]

    known = [results["judge"], *results["judge"]["others"].values()]
    lines = [(row["defence"], row["attack"], row["checkpoint"], *shares(row)) for row in results["rows"]]
    lines += [(bound_label(bound), "none", bound.get("checkpoint", ""), *shares(bound)) for bound in results["bounds"]]
    lines.append(("true images", "none", "", *(_number(one.get("accuracy_on_truth"), 100, 1) for one in known)))
    lines.append(("test images", "none", "", *(_number(one.get("accuracy_on_test"), 100, 1) for one in known)))
    return [("defence", "attack", "checkpoint", "judge", *names), *lines]


def text(results: dict[str, Any], width: int = 120) -> str:
    """`table`, and `tuned_table` where there is one, as aligned plain lines without escape codes, at most `width` columns wide."""
    page = io.StringIO()
    shown = filter(None, (table(results, width), tuned_table(results)))
    RichConsole(file=page, width=width, color_system=None, force_terminal=False, highlight=False).print(*shown, sep="\n")
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()).strip("\n") + "\n"


def csv(results: dict[str, Any]) -> str:
    """Every number of every row and bound at full precision, one column per statistic (`psnr_db_mean`, `psnr_db_low`, ...)."""
    names = ("defence", "attack", "attack_id", "checkpoint", "seed", "share_policy", "epsilon", "delta", "privacy_unit", *_BITS, "victims", "observations", "failed")
    judges = judge_names(results)
    tail = ("iterations", "restarts", "oracle_restart_psnr_db", "label_recovery", "seconds", "note")
    page = io.StringIO()
    writer = csv_format.writer(page, lineterminator="\n")
    writer.writerow(["kind", "data", "synthetic", *names, *(f"{key}_{part}" for key in EXPORTED for part in _STATISTICS), *tail, "threat", *(f"attacker_accuracy_by_{name}" for name in judges)])
    lines = [("attack", row) for row in results["rows"]] + [("not applicable", row) for row in not_applicable(results)] + [("not trained", {**one, "note": one["error"]}) for one in results.get("failed") or []] + [("bound", {"defence": bound_label(bound), **bound}) for bound in results["bounds"]]
    for kind, row in lines:
        seeds = " ".join(map(str, row["seeds"])) if row.get("seeds") else row.get("seed")
        measured = [value if isinstance(value, dict) else {"mean": value} for value in map(row.get, EXPORTED)]
        values = [value.get(part) for value in measured for part in _STATISTICS]
        head = [seeds if name == "seed" else row.get(name) for name in names]
        writer.writerow([kind, results["data"]["name"], results["data"]["synthetic"], *head, *values, *(row.get(name) for name in tail), _threat(row), *(mean_of(row.get("attacker_accuracy_by", {}).get(name)) for name in judges)])
    return page.getvalue()


def joined_csv(runs: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """`csv` of several runs by name, which is the first column; a column that a run has not stays empty in its lines."""
    lines = [{"run": name, **line} for name, results in runs for line in csv_format.DictReader(io.StringIO(csv(results)))]
    page = io.StringIO()
    writer = csv_format.DictWriter(page, list(dict.fromkeys(["run", *(key for line in lines for key in line)])), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return page.getvalue()


def markdown(results: dict[str, Any]) -> str:
    """The table in GitHub's Markdown, with title, judge, notes and what is judged with pass or FAIL."""

    special = {"\\": "\\\\", "|": "\\|", "<": "&lt;", "*": "\\*", "_": "\\_", "`": "\\`"}

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(_escape(cell, special) for cell in cells) + " |"

    rows, bounds, notes = _lines(results)
    shown = _shown(_HEADERS, rows, notes)
    rule = "| " + " | ".join("---:" if _is_number(_HEADERS[index]) else "---" for index in shown) + " |"
    cells = [tuple(row[index] for index in shown) for row in (_HEADERS, *(row.wide() for row in rows + bounds))]
    lines = [f"**{_title(results)}**", "", line(cells[0]), rule, *map(line, cells[1:]), ""]
    by = judged_cells(results)
    if by:
        lines += ["**Attacker accuracy by judge, %**", "", line(by[0]), "| --- | --- | --- |" + " ---: |" * (len(by[0]) - 3), *map(line, by[1:]), ""]
    tuned = tuned_cells(results)
    if tuned:
        rule = "| " + " | ".join("---:" if name in TUNED_NUMBERS else "---" for name in tuned[0]) + " |"
        lines += ["**Strengths found by a search**", "", line(tuned[0]), rule, *map(line, tuned[1:]), ""]
    judged = [f"- {_escape(text, special)}" for text in criteria(results)]
    return "\n".join([*lines, *(f"{part}  " for part in _caption(results, notes)), *(["", *judged] if judged else [])]).rstrip() + "\n"


def latex(results: dict[str, Any]) -> str:
    """The table as a LaTeX `table` environment; needs no package."""
    rows, bounds, notes = _lines(results)
    shown = _shown(_HEADERS, rows, notes)
    groups = [[tuple(line.wide()[index] for index in shown) for line in lines] for lines in (rows, bounds)]
    return _latex([_HEADERS[index] for index in shown], groups, [_title(results), *_caption(results, notes)])


def joined_latex(runs: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """`latex` of several runs by name, which is the first column; what the caption says of some of them names these."""
    notes: dict[str, int] = {}
    lines = [(name, results, *_lines(results, notes)[:2]) for name, results in runs]
    shown = _shown(_HEADERS, [line for _, _, rows, _ in lines for line in rows], list(notes))
    groups = [[(name, *(line.wide()[index] for index in shown)) for line in part] for name, _, *parts in lines for part in parts]
    said: dict[str, list[str]] = {}
    for name, results, _, _ in lines:
        for text in (_title(results), *_caption(results, [])):
            said.setdefault(text, []).append(name)
    caption = [text if len(names) == len(lines) else f"{', '.join(names)}: {text}" for text, names in said.items()]
    return _latex(["run", *(_HEADERS[index] for index in shown)], groups, caption + _numbered(list(notes)))


def _latex(headers: Sequence[str], groups: Sequence[Sequence[tuple[str, ...]]], caption: Sequence[str]) -> str:
    """Groups of rows, with rules between them."""
    special = {char: f"\\{char}" for char in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"<": r"\textless{}", ">": r"\textgreater{}"}

    def line(cells: Sequence[str]) -> str:
        # a cell that begins with "[" would be read as the argument of the \\ before it, so each row opens with {}
        return "    {}" + " & ".join(_escape(cell, special) for cell in cells) + r" \\"

    columns = "".join("r" if _is_number(header) else "l" for header in headers)
    caption = " ".join(f"{_escape(part, special)}" + ("" if part.endswith(".") else ".") for part in caption)
    body = [line(headers)]
    for group in filter(None, groups):
        body += [r"    \hline", *map(line, group)]
    head = [r"\begin{table}", r"  \centering", f"  \\caption{{{caption}}}", f"  \\begin{{tabular}}{{{columns}}}", r"    \hline"]
    return "\n".join([*head, *body, r"    \hline", r"  \end{tabular}", r"\end{table}"]) + "\n"


def _title(results: dict[str, Any], what: str = "what the shared updates gave away") -> str:
    data = results["data"]
    return f"{results['recipe_name']}: {what}, {data.get('title') or data['name']}" + (" (SYNTHETIC data)" if data["synthetic"] else "")


def _lines(results: dict[str, Any], notes: dict[str, int] | None = None) -> tuple[list[_Line], list[_Line], list[str]]:
    """The rows, the bounds, and the notes that the rows number, from those of other runs on, which are added to."""
    notes, common = {} if notes is None else notes, _common_threat(results)
    rows = []
    for row in results["rows"]:
        defence = row["defence"] if row.get("seeds") or row.get("seed") is None else f"{row['defence']} (seed {row['seed']})"
        said = [row["note"]] if row.get("note") else []
        said += [f"{row['failed']} failed, scored as mid-grey"] if row.get("failed") else []
        said += [f"share policy {row['share_policy']}"] if len(_policies(results)) > 1 else []
        said += filter(None, [_own_threat(row, common)]) if len(_threats(results)) > 1 else []
        marks = ", ".join(str(notes.setdefault(part, len(notes) + 1)) for part in said)
        several = (row.get("restarts") or 1) > 1 and row.get("oracle_restart_psnr_db") is not None
        oracle = _number(row["oracle_restart_psnr_db"], 1.0, 1) if several else ""
        rows.append(_Line((defence, row["attack"], row["checkpoint"]), _measured(row), privacy(row), _bits(row), oracle, str(row["victims"]), marks))
    for one in not_applicable(results):
        mark = str(notes.setdefault(one["note"], len(notes) + 1))
        rows.append(_Line((one["defence"], one["attack"], ""), _measured(one), victims="-", notes=mark))
    return rows, [_Line((bound_label(bound), "none", bound.get("checkpoint", "")), _measured(bound)) for bound in results["bounds"]], list(notes)


def privacy(row: dict[str, Any]) -> tuple[str, ...]:
    """ε and δ of a private row as text, nothing of others; a missing ε is JSON's infinity."""
    if row.get("delta") is None:
        return ()
    return "inf" if row.get("epsilon") is None else f"{row['epsilon']:.2f}", f"{row['delta']:.0e}"


def _bits(row: dict[str, Any]) -> tuple[str, str, str]:
    """Bits that noise on the latent lets through in a release and in the whole training, and Fano's bound after each."""
    if row.get("certified_bits") is None:
        return ("", "", "") if row.get("uncertified") is None else ("none", "none", "")
    whole, bound = row.get("lifetime_bits"), f"{100 * row['fano']:.0f}"
    if whole is None:
        return f"{row['certified_bits']:.1f}", "none", bound
    return f"{row['certified_bits']:.1f}", f"{whole:.1f}", f"{bound}; {100 * row['lifetime_fano']:.0f}"


def asks(row: dict[str, Any]) -> bool:
    """Whether a row has certified bits, or says why not."""
    return row.get("certified_bits") is not None or bool(row.get("uncertified"))


def _policies(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["share_policy"] for row in results["rows"]))


def _threat(row: dict[str, Any]) -> str:
    """The name of a row's threat model."""
    return (row.get("threat") or {}).get("name", "")


def _common_threat(results: dict[str, Any]) -> list[str]:
    """Clauses that the threat models of all rows have."""
    named = [name.split("; ") for name in _threats(results)]
    return [clause for clause in named[0] if all(clause in other for other in named)] if named else []


def _own_threat(row: dict[str, Any], common: list[str]) -> str:
    """The clauses of a row's threat model but for these, and the checkpoint, which has a column."""
    return "; ".join(clause for clause in _threat(row).split("; ") if clause not in common and clause != f"{row['checkpoint']} checkpoint")


def _threats(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(filter(None, map(_threat, results["rows"]))))


def _shown(headers: tuple[str, ...], rows: list[_Line], notes: list[str]) -> list[int]:
    """Columns that have something to show."""
    certified = any(any(row.bits) for row in rows)
    there = dict.fromkeys(("bits", "lifetime", "Fano"), certified)
    there |= {"oracle": any(row.oracle for row in rows), "eps": any(row.privacy for row in rows), "note": bool(notes)}
    return [index for index, header in enumerate(headers) if there.get(header.split()[0].rstrip(","), True)]


def _caption(results: dict[str, Any], notes: list[str]) -> list[str]:
    """What the numbers are, the judge's ceiling and chance, the notes."""
    judge = results.get("judge") or {}
    known = [("on the true images (ceiling)", "accuracy_on_truth"), ("on test images", "accuracy_on_test"), ("by chance", "chance")]
    known = [f"{_number(judge[key], 100.0, 1)} % {name}" for name, key in known if judge.get(key) is not None]
    policy = f"Share policy {_policies(results)[0]}; means" if len(_policies(results)) == 1 else "Means"
    over = f", which are over observations ({counted})" if (counted := batches(results)) else ""
    lines = [f'{policy} over victims with 95 % intervals{over}; attack "none": what a guess without any gradient, or with a shuffled one, scores.'] if results["rows"] else []
    if common := "; ".join(_common_threat(results)):
        lines.append(f"Threat model: {common}{'; what else, in the notes' if len(_threats(results)) > 1 else ''}.")
    if any((row.get("restarts") or 1) > 1 for row in results["rows"]):
        lines.append("Attackers choose among their starts by their own loss; oracle dB: what the truth would have chosen, which no attacker can.")
    units = list(dict.fromkeys(row.get("privacy_unit", "image") for row in results["rows"] if row.get("delta") is not None))
    if units:
        lines.append(
            f"Differentially private: (eps, delta) of the presence of one {' or '.join(units)}, over all rounds of the training"
            f"{'; of a client, against who sees sums of cohorts alone' if 'client' in units else ''}."
        )
    if any(row.get("certified_bits") is not None for row in results["rows"]):
        lines.append("Bits: of an image beyond its label no attack learns more, from a release and from the whole training; Fano %: bound on naming it among all training images after each.")
    if any(row.get("uncertified") for row in results["rows"]):
        lines.append("Bits none: no certificate, for the reason in the note.")
    lines += failed(results)
    lines += [f"Attacker accuracy is a judge's on the reconstructions; the judge has {', '.join(known)}."] if known else []
    return lines + _numbered(notes)


def _numbered(notes: list[str]) -> list[str]:
    return [f"Note {number}: {note}" for number, note in enumerate(notes, start=1)]


def _table(results: dict[str, Any], notes: list[str], headers: tuple[str, ...], shown: list[int], *parts: list[tuple[str, ...]]) -> Table:
    found = _empty(_title(results), "\n".join(_caption(results, notes)))
    for index in shown:
        number = _is_number(headers[index])
        found.add_column(headers[index], justify="right" if number else "left", no_wrap=number)
    for part in parts:
        for cells in part:
            found.add_row(*(Text(cells[index]) for index in shown))
        found.add_section()
    return found


def _empty(title: str, caption: str) -> Table:
    found = Table(title=Text(title), caption=Text(caption), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    found.title_justify = found.caption_justify = "left"
    found.title_style, found.caption_style = "bold", ""
    return found


def _is_number(header: str) -> bool:
    return not header.startswith(("run", "defence", "attack\n", "checkpoint", "note")) and header != "attack"


def _measured(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Mean and interval of each of MEASURED."""
    cells = []
    for key in MEASURED:
        scale, digits = _SCALE_DIGITS[key]
        ends = interval_of(row.get(key))
        interval = f"[{', '.join(_number(end, scale, digits) for end in ends)}]" if ends else ""
        cells.append((_number(mean_of(row.get(key)), scale, digits), interval))
    return tuple(cells)


def _number(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def _escape(text: str, special: dict[str, str]) -> str:
    return "".join(special.get(char, char) for char in text.replace("\n", " "))
