"""Which defence of a grid to take, from validation accuracies and from attacks on images kept for tuning; see `config.Choose`."""

from __future__ import annotations

from typing import Any

from gidef.report.results import mean_of

BOUNDS = ("A11", "A12", "standard", "control")
"""Ids of attacks that do not compete: another threat model, bounds, the worst case of others, none at all."""


def choice(results: dict[str, Any]) -> dict[str, Any] | None:
    """The defence to take, and the grid that it was taken from; None where the recipe does not choose, or no undefended net was trained.

    Returns: points, on, take, grid, see `gidef.report`. Seeds count by their means. A defence's PSNR is the highest mean of any attack and checkpoint; rows with
             failed reconstructions do not count, as mid-grey would flatter, and a defence without others is not taken. Nor do rows at other strengths than
             trained ones, whose defence is none of the grid. Of equals the more accurate is.
    """
    asked = results["recipe"].get("choose")
    if not asked:
        return None
    accuracies: dict[str, list[float]] = {}
    for run in results["training"]:
        if run.get("trained_as"):  # the same training, its noise at another strength
            continue
        accuracies.setdefault(run["defence"], []).append(run["val_accuracy"])
    means = {name: sum(values) / len(values) for name, values in accuracies.items()}
    specs = results["recipe"]["defences"]
    plain = {name for name in means if isinstance(specs.get(name), dict) and specs[name].get("type") == "Undefended"}
    if not plain:
        return None
    least = max(means[name] for name in plain) - asked["points"] / 100
    grid = []
    for name, accuracy in means.items():
        if name not in plain:
            rows = [row for row in results["rows"] if row["defence"] == name and row["attack_id"] not in BOUNDS and not row.get("failed")]
            leaks = [found for row in rows if (found := mean_of(row["psnr_db"])) is not None]
            grid.append({"defence": name, "val_accuracy": accuracy, "psnr_db": max(leaks, default=None), "within": accuracy >= least - 1e-9})
    fit = [one for one in grid if one["within"] and one["psnr_db"] is not None]
    best = min(fit, key=lambda one: (one["psnr_db"], -one["val_accuracy"]), default=None)
    images = max((row["victims"] for row in results["rows"]), default=0)
    return {"points": asked["points"], "on": images, "take": best and best["defence"], "grid": grid}


def chosen(results: dict[str, Any]) -> list[str]:
    """The sentence on it; none where nothing is chosen."""
    found = choice(results)
    if found is None:
        return []
    within = [one for one in found["grid"] if one["within"]]
    counted = f"{len(within)} of {len(found['grid'])} defences are within {found['points']:g} points of the undefended net's validation accuracy"
    if found["take"] is None:
        return [f"The defence to take: none. {counted}" + (", and no attack on them succeeded." if within else ".")]
    best = next(one for one in found["grid"] if one["defence"] == found["take"])
    return [
        f'The defence to take: "{best["defence"]}". {counted}; of these its strongest attack gets least of the {found["on"]} images kept for tuning, '
        f"{best['psnr_db']:.1f} dB, at {100 * best['val_accuracy']:.1f} % validation accuracy. Neither the victims nor the test split were looked at for this."
    ]
