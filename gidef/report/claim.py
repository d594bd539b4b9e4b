"""The published claim, in both of its readings, beside what a run measured.

Source: Jiang, Firouzi, Chakrabarty, arXiv 2503.16542: up to 12.5 % less attacker accuracy and 12.4 % more MSE than the baselines, at about 90 % client
accuracy. The paper does not say whether 12.5 % are points or a share of the baseline's, so both are judged.
"""

from __future__ import annotations

from typing import Any

from gidef.report.kinds import defences, kinds
from gidef.report.paired import BASELINES
from gidef.report.results import interval_of

ATTACKER, MSE = -0.125, 0.124
MATCHED = 0.01
"""Client accuracies that differ by more do not compare like with like."""

Compared = dict[str, Any]


def claim(results: dict[str, Any], compared: list[Compared]) -> list[str]:
    """Sentences for each learned perturbation, each baseline of the paper beside it and each checkpoint: under the naive attack, then each under its strongest
    one where attacks other than naive were run. A baseline whose release is undefended is told as such.

    Args: results: in the layout of `gidef.report`.  compared: of `paired.comparisons`. Several seeds count as the results pool them.
    """
    types = {name: kinds(spec) for name, spec in defences(results).items()}
    return [_sentence(one, _bare(results, types, one)) for one in compared if types[one["defences"][1]][0] in BASELINES and (one["under"] == "naive" or any(one["adaptive"]))]


def matched(one: Compared) -> bool | None:
    """Whether both sides' client accuracies are the same within `MATCHED`; None where one is not known."""
    utility = one["client_accuracies"]
    return None if None in utility else abs(utility[0] - utility[1]) <= MATCHED + 1e-9


def attacks(one: Compared) -> str:
    """The attacks of a comparison in words."""
    if one["under"] == "naive":
        return f"the {one['attacks'][0]} attack"
    return f"the strongest attack on each ({', '.join(dict.fromkeys(one['attacks']))})"


def _bare(results: dict[str, Any], types: dict[str, list[str]], one: Compared) -> str:
    """Where the other side's release is undefended, in words; "" where it is defended. Its rows say how many images a gradient is of."""
    other, checkpoint = one["defences"][1], one["checkpoint"]
    threats = [row.get("threat") or {} for row in results["rows"] if (row["defence"], row["checkpoint"]) == (other, checkpoint)]
    if types[other] != ["BiDO"] or not any(threat.get("batch_size") == threat.get("local_steps", 1) for threat in threats):
        return ""
    what = "local steps of one image each are" if any(threat.get("local_steps", 1) > 1 for threat in threats) else "release of one image at a time is"
    return f" (whose {what} undefended: the terms vanish in a batch of one)"


def _sentence(one: Compared, bare: str) -> str:
    (mine, theirs), (ours, other), utility = one["attacker_accuracy"], one["defences"], one["client_accuracies"]
    text = (
        f'The paper\'s claim, "{ours}" against "{other}"{bare} under {attacks(one)} at the {one["checkpoint"]} checkpoint: '
        f"attacker accuracy {100 * mine:.1f} % against {100 * theirs:.1f} %, {_judged(one['attacker_accuracy_change'], ATTACKER, '%', 'of the baseline')}, "
        f"{_judged(one['attacker_accuracy_difference'], ATTACKER, 'points', '')}; MSE {_judged(one['mse_change'], MSE, '%', '')}"
    )
    if matched(one) is None:
        return text + "."
    text += f"; client accuracy {100 * utility[0]:.1f} % against {100 * utility[1]:.1f} %"
    return text + ("." if matched(one) else ", which do not match, so these do not compare like with like.")


def _judged(value: dict[str, float | None], wanted: float, unit: str, of: str) -> str:
    """A change in hundredths, its interval over observations where there is one, and whether its mean is what was claimed."""
    if value["mean"] is None:
        return "not to be had (the baseline's is 0)"
    held = (value["mean"] - wanted) * (1 if wanted > 0 else -1) >= -1e-9  # what rounds to the figure itself is as much as was claimed
    ends = interval_of(value)
    interval = f"[{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]" if ends else ""
    said = " ".join(filter(None, (f"{100 * value['mean']:+.1f}", unit, interval, of)))
    return f"{said} (claimed {100 * wanted:+.1f}: {'pass' if held else 'FAIL'})"
