"""Whether learning the noise pays: the learned perturbation beside isotropic noise of the same accuracy, and beside a variational bottleneck (CVB).

If it does not beat isotropic noise under the strongest attack, the method is plain feature noise. It *beats* a control if under the strongest attack on
each its PSNR is lower by more than chance (the paired 95 % interval of the difference, over observations, lies below 0), and the judge does not name
more classes by more than chance. Nothing is concluded where client accuracies differ by more than `claim.MATCHED`, or naive attacks alone were run on one side.
"""

from __future__ import annotations

from typing import Any

from gidef.report.claim import MATCHED, attacks, matched
from gidef.report.kinds import defences, kinds
from gidef.report.paired import CONTROLS
from gidef.report.results import interval_of

_NAMES = {"IsotropicNoise": "isotropic noise", "CVB": "the variational bottleneck (CVB)"}

Compared = dict[str, Any]


def controls(results: dict[str, Any], compared: list[Compared]) -> list[str]:
    """A sentence for each learned perturbation, control and checkpoint. compared: of `paired.comparisons`."""
    types = {name: kinds(spec) for name, spec in defences(results).items()}
    found: dict[tuple[str, ...], dict[str, Compared]] = {}
    for one in compared:
        if types[one["defences"][1]][0] in CONTROLS:
            found.setdefault((*one["defences"], one["checkpoint"], one["share_policy"]), {})[one["under"]] = one
    return [_sentence(_NAMES[types[place[1]][0]], pair) for place, pair in found.items()]


def _sentence(control: str, pair: dict[str, Compared]) -> str:
    """pair: "naive" and "strongest", one of which may be missing."""
    one = next(iter(pair.values()))
    (ours, other), utility = one["defences"], one["client_accuracies"]
    start = f'Learned perturbation against {control} at the {one["checkpoint"]} checkpoint, "{ours}" against "{other}"'
    if matched(one) is None:
        return f"{start}: client accuracies are not known, so they are not compared."
    start += f", client accuracy {100 * utility[0]:.1f} % against {100 * utility[1]:.1f} %"
    if not matched(one):
        return f"{start}: these are not matched within {100 * MATCHED:g} point, so they are not compared."
    strong = pair.get("strongest") if all(one["adaptive"]) else None
    told = [f"under {attacks(each)} {_differences(each)}" for each in (pair.get("naive"), strong) if each is not None]
    return f"{start}: {'; '.join(told)}. {_conclusion(control, strong)}"


def _differences(one: Compared) -> str:
    psnr, accuracy = one["psnr_db_difference"], one["attacker_accuracy_difference"]
    return f"PSNR {psnr['mean']:+.1f} dB{_ends(psnr, 1)}, attacker accuracy {100 * accuracy['mean']:+.1f} points{_ends(accuracy, 100)}"


def _ends(value: dict[str, float | None], unit: float) -> str:
    ends = interval_of(value)
    return f" [{unit * ends[0]:+.1f}, {unit * ends[1]:+.1f}]" if ends else ""


def _conclusion(control: str, strong: Compared | None) -> str:
    if strong is None:
        return "Only naive attackers, who overlook the noise, were tried on both, so nothing is concluded."
    psnr, accuracy = interval_of(strong["psnr_db_difference"]), interval_of(strong["attacker_accuracy_difference"])
    if psnr is None or accuracy is None:
        return "Without the record of the single victims, or with one observation of them all, there is no paired interval, so nothing is concluded."
    plain = control == _NAMES["IsotropicNoise"]
    if psnr[0] > 0:
        return f"It leaks MORE than {control} of the same accuracy" + (": learning the noise does harm." if plain else ".")
    if psnr[1] < 0 and accuracy[0] <= 0:
        return f"It leaks less than {control} of the same accuracy" + (": learning the noise pays." if plain else ".")
    return f"It does NOT beat {control} of the same accuracy" + (": the method is plain feature noise here." if plain else ".")
