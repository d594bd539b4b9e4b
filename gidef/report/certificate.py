"""The criterion of noise with a certificate, beside what a run measured under share policy `head`.

A defence meets it if the strongest attack stays within `WITHIN_DB` of the class-mean image, the upper end of its interval included, and the defence
costs at most `POINTS` points of test accuracy. All attacks of the run's threat model compete, and with them the decoder that is handed the
latent (A12), which bounds them; without it and an attack by the latent (A5) nothing is judged, nor of one observation of several
images, which has no interval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gidef.report.results import alone, bound_named, interval_of, mean_of

WITHIN_DB = 1.0
POINTS = 2.0
NEEDED = ("A5", "A12")
_APART = ("A11", "standard", "control")
"""Malicious servers, worst cases over attacks that the truth picks, and what is no attack."""

Row = dict[str, Any]


def certificates(results: dict[str, Any], *, is_undefended: Callable[[dict[str, Any], str], bool]) -> list[str]:
    """A sentence for each defence with certified bits and each checkpoint, and for each defence that was refused them, with the reason.

    Args: results: in the layout of `gidef.report`.
    """
    refused = {(row["defence"], row["uncertified"]): None for row in results["rows"] if row.get("uncertified")}
    return _judged_rows(results, is_undefended) + [f'There is no certificate for "{name}": {reason}' for name, reason in refused]


def _judged_rows(results: dict[str, Any], is_undefended: Callable[[dict[str, Any], str], bool]) -> list[str]:
    rows = [row for row in results["rows"] if row["share_policy"] == "head" and row["attack_id"] not in _APART and mean_of(row["psnr_db"]) is not None]
    certified = [row for row in rows if row.get("certified_bits") is not None]
    return [
        _sentence(results, [row for row in rows if (row["defence"], row["checkpoint"]) == place], is_undefended)
        for place in dict.fromkeys((row["defence"], row["checkpoint"]) for row in certified)
    ]


def _sentence(results: dict[str, Any], rows: list[Row], is_undefended: Callable[[dict[str, Any], str], bool]) -> str:
    above = [(row, *_above(results, row)) for row in rows]
    row, mean, low, high = max(above, key=lambda one: one[3] if one[3] is not None else float("-inf"))
    text = f'The certificate of "{row["defence"]}" at the {row["checkpoint"]} checkpoint: {_bits(rows)}. '
    missing = [name for name in NEEDED if name not in {one["attack_id"] for one in rows}]
    if mean is None:
        return f"{text}Not judged: there is no class-mean bound to compare with."
    near = high <= WITHIN_DB
    text += f"The strongest attack, {row['attack']} ({row['attack_id']}), is {mean:+.1f} dB"
    text += f"{'' if alone(row) else f' [{low:+.1f}, {high:+.1f}]'} from the class mean"
    text += f" (allowed {WITHIN_DB:+.1f}: {_judged(near)}{', by the upper end' if mean <= WITHIN_DB < high else ''})"
    points = _points(results, row["defence"], is_undefended)
    text += "; " + ("no undefended net was trained" if points is None else f"accuracy {points:+.1f} points (allowed {-POINTS:+.1f}: {_judged(points >= -POINTS)})")
    if points is None or missing or alone(row):
        lacking = [*([f"no attack {' and '.join(missing)}"] if missing else []), *(["no undefended net"] if points is None else [])]
        lacking += ["one observation alone"] if alone(row) else []
        return f"{text}. Not judged: {', '.join(lacking)}."
    return f"{text}. Within {WITHIN_DB:g} dB of the class mean at no more than {POINTS:g} points: {_judged(near and points >= -POINTS)}."


def _judged(held: bool) -> str:
    return "pass" if held else "FAIL"


def _bits(rows: list[Row]) -> str:
    """Bits of the row that grants most."""
    row = max((row for row in rows if row.get("certified_bits") is not None), key=lambda row: row["certified_bits"])
    text = f"at most {row['certified_bits']:.1f} bits of an image beyond its label a release"
    if row.get("lifetime_bits") is None:
        return f"{text}, no bound on the whole training"
    return f"{text}, {row['lifetime_bits']:.1f} in the whole training"


def _above(results: dict[str, Any], row: Row) -> tuple[float | None, float | None, float | None]:
    """Mean and interval of the PSNR above the class mean's: paired where the row has it, else the row's own interval less the class mean's PSNR."""
    paired = row.get("above_class_mean_db")
    if paired is not None:
        return (mean_of(paired), *(interval_of(paired) or (mean_of(paired),) * 2))
    guess = mean_of(bound_named(results, "class mean").get("psnr_db"))
    if guess is None:
        return None, None, None
    mean = mean_of(row["psnr_db"])
    low, high = interval_of(row["psnr_db"]) or (mean, mean)
    return mean - guess, low - guess, high - guess


def _points(results: dict[str, Any], defence: str, is_undefended: Callable[[dict[str, Any], str], bool]) -> float | None:
    """Test accuracy against the undefended net's, in points, over all seeds of both."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for run in results["training"]:
        accuracy = mean_of(run.get("test_accuracy"))
        if accuracy is not None and (run["defence"] == defence or is_undefended(results, run["defence"])):
            found[run["defence"] == defence].append(accuracy)
    if not all(found.values()):
        return None
    ours, plain = (sum(values) / len(values) for values in (found[True], found[False]))
    return round(100 * (ours - plain), 9)
