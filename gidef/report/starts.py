"""What restarts, and stopping the worse ones early, bought an attacker: forms of one attack that differ in nothing else, on the same victims."""

from __future__ import annotations

from typing import Any

from gidef.report.results import interval_of


def starts(results: dict[str, Any]) -> list[str]:
    """A sentence for each attack in each defence at each checkpoint, of `results["starts"]` (see `paired.starts`): every form beside the one of most
    restarts that all ran to their end."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for one in results.get("starts", []):
        found.setdefault((one["defences"][0], one["attacks"][1], one["checkpoint"], one["share_policy"]), []).append(one)
    return [_sentence(*place[:3], group) for place, group in found.items()]


def _sentence(defence: str, full: str, checkpoint: str, group: list[dict[str, Any]]) -> str:
    first = group[0]
    told = "; ".join(f'"{one["attacks"][0]}" {one["psnr_db"][0]:.1f} dB, {_beside(one)}{_seconds(one)}' for one in group)
    whole = f" in {first['seconds'][1]:.0f} s" if first["seconds"][1] else ""
    return f'Restarts on "{defence}" at the {checkpoint} checkpoint, beside "{full}" ({first["psnr_db"][1]:.1f} dB{whole}): {told}.'


def _beside(one: dict[str, Any]) -> str:
    apart = one["psnr_db_difference"]
    ends = interval_of(apart)
    return f"{apart['mean']:+.2f} dB" + (f" [{ends[0]:+.2f}, {ends[1]:+.2f}] over {_over(one)}" if ends else "")


def _over(one: dict[str, Any]) -> str:
    seen = one.get("observations", one["victims"])
    return f"{one['victims']} victims" + (f" in {seen} observations" if seen != one["victims"] else "")


def _seconds(one: dict[str, Any]) -> str:
    ours, other = one["seconds"]
    return f", in {ours:.0f} s, {100 * ours / other:.0f} % of its time" if ours and other else ""
