"""Whether a defence protects the images or merely hides the gradients from the attacker: warnings in plain words.

A defence that makes an attack's loss flat or noisy looks private until somebody descends another loss (Athalye et al. 2018, for
adversarial examples; Carlini et al. 2019, arXiv:1902.06705). The signs, of each defence at each checkpoint:
  - the attack's distance of updates hardly fell: its end is above `FLAT` of its start;
  - it ended high, above `HIGH`, and the image is no better than a guess: the optimiser failed, which is no defence;
  - the image is no better than what the same attack draws from a shuffled gradient (the control) + `MARGIN_DB`;
  - an attack that knows of the defence beats the naive one by more than `APART_DB`.
And a sentence of its own: an attack that searches the noise on the latent explains the update, ending below `EXPLAINED`, with images worse than a class
mean. Many pairs of image and noise do so, and this search ends at a wrong one; who reads the noise, or sees several releases, has fewer to choose from.
"""

from __future__ import annotations

from typing import Any

from gidef.report.results import bound_named, mean_of

CONTROL = "control"
FLAT = 0.9
HIGH = 0.3
EXPLAINED = 0.01
MARGIN_DB = 0.5
APART_DB = 3.0
_NOT_MATCHING = ("A12", "A11", "A4", "A5", "A7", "standard", CONTROL)

Row = dict[str, Any]


def masking(results: dict[str, Any], *, is_undefended: Any) -> list[str]:
    """Sentences that begin with "Warning"; none where no sign is seen. results: in the layout of `gidef.report`."""
    said = []
    rows = [row for row in results["rows"] if mean_of(row["psnr_db"]) is not None]
    for defence, checkpoint in dict.fromkeys((row["defence"], row["checkpoint"]) for row in rows):
        here = [row for row in rows if (row["defence"], row["checkpoint"]) == (defence, checkpoint)]
        matching = [row for row in here if row["attack_id"] not in _NOT_MATCHING]
        if is_undefended(results, defence) or not matching:
            continue
        signs = [*_flat(matching), *_high(results, matching), *_like_the_control(here, matching), *_apart(matching)]
        said += [f'Warning, "{defence}" at the {checkpoint} checkpoint may only hide its gradients: {sign}.' for sign in signs]
        said += [f'Warning, "{defence}" at the {checkpoint} checkpoint is ambiguous to {sign}.' for sign in _ambiguous(results, matching)]
    return said


def _flat(rows: list[Row]) -> list[str]:
    stuck = [row for row in rows if row.get("fit") is not None and row.get("fit_first") and row["fit"] > FLAT * row["fit_first"]]
    return [f"the loss of {_named(stuck)} hardly fell, from {stuck[0]['fit_first']:.3g} to {stuck[0]['fit']:.3g}, so it is flat or noisy"] if stuck else []


def _high(results: dict[str, Any], rows: list[Row]) -> list[str]:
    guess = mean_of(bound_named(results, "class mean").get("psnr_db"))
    lost = [row for row in rows if row.get("fit") is not None and row["fit"] > HIGH and guess is not None and mean_of(row["psnr_db"]) <= guess + MARGIN_DB]
    return [f"{_named(lost)} ended at a distance of {lost[0]['fit']:.2f} from the update: a failed optimiser is no defence, try another attack"] if lost else []


def _ambiguous(results: dict[str, Any], rows: list[Row]) -> list[str]:
    guess = mean_of(bound_named(results, "class mean").get("psnr_db"))
    lost = [
        row for row in rows
        if row.get("noise") == "searched" and row.get("fit") is not None and row["fit"] < EXPLAINED and guess is not None and mean_of(row["psnr_db"]) < guess
    ]  # fmt: skip
    if not lost:
        return []
    reads = max((row for row in rows if row.get("noise") == "read"), key=lambda row: mean_of(row["psnr_db"]), default=None)
    further = [] if any(row["attack_id"] == "A9" for row in lost) else ["several releases (A9)"]
    if reads is not None:
        better = f"{reads['attack']}, which reads the noise, gets {mean_of(reads['psnr_db']):.1f} dB, see its row" + "".join(f", and {what} may do better too" for what in further)
    else:
        better = f"{' or '.join(['an attack that reads the noise (read-noise)', *further])} may do better"
    return [
        f"the search of {_named(lost)}, which explains the update almost exactly (distance {lost[0]['fit']:.1g}) with images worse than the class mean "
        f"({mean_of(lost[0]['psnr_db']):.1f} against {guess:.1f} dB): many pairs of image and noise do, so the search is underdetermined and shows no protection; {better}"
    ]


def _like_the_control(here: list[Row], rows: list[Row]) -> list[str]:
    control = [mean_of(row["psnr_db"]) for row in here if row["attack_id"] == CONTROL]
    shuffled = {row.get("of") for row in here if row["attack_id"] == CONTROL}
    naive = [row for row in rows if row["attack_id"] == "A0"] or [row for row in rows if row["attack"] in shuffled]
    if not control or not naive or max(mean_of(row["psnr_db"]) for row in naive) > max(control) + MARGIN_DB:
        return []
    return [f"{_named(naive)} draws no more from the update than from a shuffled one ({max(control):.1f} dB): what it shows are its priors"]


def _apart(rows: list[Row]) -> list[str]:
    naive = [mean_of(row["psnr_db"]) for row in rows if row["attack_id"] == "A0"]
    others = [row for row in rows if row["attack_id"] != "A0"]
    if not naive or not others:
        return []
    best = max(others, key=lambda row: mean_of(row["psnr_db"]))
    gain = mean_of(best["psnr_db"]) - max(naive)
    return [f"{best['attack']}, which knows of it, gets {gain:.1f} dB more than the naive attack"] if gain > APART_DB else []


def _named(rows: list[Row]) -> str:
    return " and ".join(dict.fromkeys(row["attack"] for row in rows))
