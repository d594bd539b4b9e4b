"""The published claim, in both of its readings, beside what a run measured.

Source: Jiang, Firouzi, Chakrabarty, arXiv 2503.16542: up to 12.5 % less attacker accuracy and 12.4 % more MSE than the baselines, at about 90 % client
accuracy. The paper does not say whether 12.5 % are points or a share of the baseline's, so both are judged.
"""

from __future__ import annotations

from typing import Any

from gidef.report.kinds import defences, kinds
from gidef.report.results import mean_of

ATTACKER, MSE = -0.125, 0.124
MATCHED = 0.01
"""Client accuracies that differ by more do not compare like with like."""
BASELINES = ("DPSGD", "BiDO")

Row = dict[str, Any]


def claim(results: dict[str, Any]) -> list[str]:
    """A sentence for each learned perturbation, each baseline of the paper beside it and each checkpoint, under the naive attack of the run that leaks
    most; none where the recipe lacks either side. Several seeds count as the results pool them."""
    types = {name: kinds(spec) for name, spec in defences(results).items()}
    learned = [name for name, kind in types.items() if kind == ["LearnedPerturbation"]]
    baselines = [name for name, kind in types.items() if len(kind) == 1 and kind[0] in BASELINES]
    found = []
    for ours in learned:
        for other in baselines:
            for checkpoint in dict.fromkeys(row["checkpoint"] for row in results["rows"]):
                pair = [_naive(results, name, checkpoint) for name in (ours, other)]
                if None not in pair:
                    found.append(_sentence(*pair))
    return found


def _naive(results: dict[str, Any], defence: str, checkpoint: str) -> Row | None:
    rows = [row for row in results["rows"] if (row["defence"], row["checkpoint"], row["attack_id"]) == (defence, checkpoint, "A0")]
    rows = [row for row in rows if None not in map(mean_of, (row["psnr_db"], row["mse"], row["attacker_accuracy"]))]
    return max(rows, key=lambda row: mean_of(row["psnr_db"]), default=None)


def _sentence(ours: Row, other: Row) -> str:
    mine, theirs = (mean_of(row["attacker_accuracy"]) for row in (ours, other))
    relative = mine / theirs - 1 if theirs > 0 else None
    error = mean_of(ours["mse"]) / mean_of(other["mse"]) - 1 if mean_of(other["mse"]) > 0 else None
    utility = [mean_of(row.get("client_accuracy")) for row in (ours, other)]
    text = (
        f'The paper\'s claim, "{ours["defence"]}" against "{other["defence"]}" under the {ours["attack"]} attack at the {ours["checkpoint"]} checkpoint: '
        f"attacker accuracy {100 * mine:.1f} % against {100 * theirs:.1f} %, {_judged(relative, ATTACKER, '%', 'of the baseline')}, "
        f"{_judged(mine - theirs, ATTACKER, 'points', '')}; MSE {_judged(error, MSE, '%', '')}"
    )
    if None in utility:
        return text + "."
    text += f"; client accuracy {100 * utility[0]:.1f} % against {100 * utility[1]:.1f} %"
    return text + (", which do not match, so these do not compare like with like." if abs(utility[0] - utility[1]) > MATCHED else ".")


def _judged(value: float | None, wanted: float, unit: str, of: str) -> str:
    if value is None:
        return "not to be had (the baseline's is 0)"
    held = value <= wanted if wanted < 0 else value >= wanted
    said = " ".join(filter(None, (f"{100 * value:+.1f}", unit, of)))
    return f"{said} (claimed {100 * wanted:+.1f}: {'pass' if held else 'FAIL'})"
