"""Two rows image by image: differences on the same victims, with intervals over the observations that these were seen in. The learned perturbation
beside what it is to beat, and the forms of an attack that differ in their restarts alone (`starts`).

Compared of defences are the paper's baselines (`BASELINES`), each of the recipe, and of each control (`CONTROLS`) the defence whose client accuracy is nearest;
under the naive attack, the same on both sides, and each under its own strongest one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gidef.report.kinds import defences, kinds
from gidef.report.results import mean_of, observations_of

BASELINES = ("DPSGD", "BiDO")
CONTROLS = ("IsotropicNoise", "CVB")
NAIVE = "A0"
MEASURES = ("psnr_db", "attacker_accuracy", "mse")

Row = dict[str, Any]
Values = dict[tuple[str, str, str], dict[int, dict[str, float]]]
"""Of (defence, attack, checkpoint): each victim's measures, averaged over seeds, and the number of its batch."""


def comparisons(results: dict[str, Any], lines: Sequence[dict[str, Any]], *, strongest: Callable[[list[Row]], Row | None]) -> list[dict[str, Any]]:
    """What `results.json` keeps of each pair (see `gidef.report`).

    Args:    results: in the layout of `gidef.report`; not modified.  lines: the run's record; where it lacks a victim of either side there are no intervals.
             strongest: picks of the rows of one defence the strongest attack's.
    """
    values, found = _values(lines), []
    for ours, other in _pairs(results):
        for checkpoint, policy in dict.fromkeys((row["checkpoint"], row["share_policy"]) for row in results["rows"]):
            here = [row for row in results["rows"] if (row["checkpoint"], row["share_policy"]) == (checkpoint, policy)]
            sides = [[row for row in here if row["defence"] == name and _measured(row)] for name in (ours, other)]
            adaptive = [any(row["attack_id"] != NAIVE and strongest([row]) is not None for row in rows) for rows in sides]
            for under, pair in (("naive", _naive(*sides)), ("strongest", tuple(map(strongest, sides)))):
                if None not in pair:
                    found.append({"under": under, "checkpoint": checkpoint, "share_policy": policy, "adaptive": adaptive, **_compared(*pair, values)})
    return found


def starts(results: dict[str, Any], lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each form of an attack beside the one of most restarts that all run to their end, of attacks that differ in restarts and halving alone.

    Args:    as `comparisons`.
    Returns: what `results.json` keeps of each pair, the full form second.
    """
    values, found = _values(lines), []
    for names in _forms(results):
        for defence, checkpoint, policy in dict.fromkeys((row["defence"], row["checkpoint"], row["share_policy"]) for row in results["rows"]):
            place = {"defence": defence, "checkpoint": checkpoint, "share_policy": policy}
            rows = {row["attack"]: row for row in results["rows"] if place.items() <= row.items() and row["attack"] in names and _measured(row)}
            if names[0] in rows:
                full = rows.pop(names[0])
                found += [
                    {"checkpoint": checkpoint, "share_policy": policy, "seconds": [row.get("seconds"), full.get("seconds")], **_compared(row, full, values)}
                    for row in rows.values()
                ]
    return found


def _forms(results: dict[str, Any]) -> list[list[str]]:
    """Names of attacks that differ in restarts and halving alone; first the one of most restarts that all run to their end."""
    alike: dict[str, list[str]] = {}
    attacks = {name: spec for name, spec in (results["recipe"].get("attacks") or {}).items() if isinstance(spec, dict) and {"restarts", "halving"} <= spec.keys()}
    for name, spec in attacks.items():
        alike.setdefault(repr(sorted((key, repr(value)) for key, value in spec.items() if key not in ("restarts", "halving"))), []).append(name)
    found = []
    for names in alike.values():
        full = max((name for name in names if attacks[name]["halving"] == 1), key=lambda name: attacks[name]["restarts"], default=None)
        if full is not None and len(names) > 1:
            found.append([full, *(name for name in names if name != full)])
    return found


def _measured(row: Row) -> bool:
    return all(mean_of(row.get(key)) is not None for key in MEASURES)


def _pairs(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(the learned perturbation, what it is compared with), by their names in the recipe."""
    types = {name: kinds(spec) for name, spec in defences(results).items()}
    accuracy = {row["defence"]: mean_of(row.get("client_accuracy")) for row in results["rows"]}

    def apart(ours: str, other: str) -> float:
        known = accuracy.get(ours), accuracy.get(other)
        return float("inf") if None in known else abs(known[0] - known[1])

    found = []
    for ours in (name for name, kind in types.items() if kind == ["LearnedPerturbation"] and name in accuracy):
        found += [(ours, other) for other, kind in types.items() if len(kind) == 1 and kind[0] in BASELINES]
        for control in CONTROLS:
            others = [other for other, kind in types.items() if kind == [control] and other in accuracy]
            found += [(ours, min(others, key=lambda other, ours=ours: apart(ours, other)))] if others else []
    return found


def _naive(ours: list[Row], other: list[Row]) -> tuple[Row | None, Row | None]:
    """Rows of one and the same naive attack: of those that both sides have, the one that reaches the highest PSNR on both together."""
    sides = [{row["attack"]: row for row in rows if row["attack_id"] == NAIVE} for rows in (ours, other)]
    both = [name for name in sides[0] if name in sides[1]]
    best = max(both, key=lambda name: sum(mean_of(side[name]["psnr_db"]) for side in sides), default=None)
    return sides[0].get(best), sides[1].get(best)


def _values(lines: Sequence[dict[str, Any]]) -> Values:
    seeds: dict[tuple[str, str, str], dict[int, dict[Any, dict[str, float]]]] = {}
    batch: dict[tuple[str, str, str], dict[int, int]] = {}
    for line in lines:
        if line["kind"] == "attack" and all(line.get(key) is not None for key in MEASURES):
            place = line["defence"], line["attack"], line["checkpoint"]
            seeds.setdefault(place, {}).setdefault(line["victim"], {})[line.get("seed")] = {key: line[key] for key in MEASURES}
            batch.setdefault(place, {})[line["victim"]] = line.get("batch", line["victim"])
    return {
        place: {
            victim: {"batch": batch[place][victim], **{key: sum(one[key] for one in each.values()) / len(each) for key in MEASURES}}
            for victim, each in victims.items()
        }
        for place, victims in seeds.items()
    }


def _compared(ours: Row, other: Row, values: Values) -> dict[str, Any]:
    """Both sides' means, and differences ours − other or ours / other − 1 as {mean, low, high}; mean None for a change of what is 0."""
    seen = [values.get((row["defence"], row["attack"], row["checkpoint"]), {}) for row in (ours, other)]
    batches = _batches(*seen) if len(seen[0]) == ours["victims"] == other["victims"] and observations_of(ours) == observations_of(other) else []
    batches = batches if len(batches) == observations_of(ours) else []
    victims, size = [victim for batch in batches for victim in batch], len(batches[0]) if batches else 1
    columns = {key: [[side[victim][key] for victim in victims] for side in seen] for key in MEASURES}
    means = {key: [mean_of(row[key]) for row in (ours, other)] for key in MEASURES}
    sides = {
        "defences": [ours["defence"], other["defence"]], "attacks": [ours["attack"], other["attack"]], "attack_ids": [ours["attack_id"], other["attack_id"]],
        "client_accuracies": [mean_of(row.get("client_accuracy")) for row in (ours, other)], "victims": len(victims), "observations": len(batches),
    }  # fmt: skip
    return {
        **sides, **means, **{f"{key}_difference": _difference(*means[key], *columns[key], size) for key in ("psnr_db", "attacker_accuracy")},
        **{f"{key}_change": _change(*means[key], *columns[key], size) for key in ("attacker_accuracy", "mse")},
    }  # fmt: skip


def _batches(ours: dict[int, dict[str, float]], other: dict[int, dict[str, float]]) -> list[list[int]]:
    """The victims of each observation; none where the two sides differ in them, or observations in their size."""
    if ours.keys() != other.keys() or any(ours[victim]["batch"] != other[victim]["batch"] for victim in ours):
        return []
    found: dict[float, list[int]] = {}
    for victim in sorted(ours):
        found.setdefault(ours[victim]["batch"], []).append(victim)
    return list(found.values()) if len({len(batch) for batch in found.values()}) == 1 else []


def _difference(mine: float, theirs: float, ours: list[float], other: list[float], size: int) -> dict[str, float | None]:
    from gidef.metrics import bootstrap_interval  # torch, which a page does not need

    apart = [one - two for one, two in zip(ours, other, strict=True)]
    low, high = (bootstrap_interval(apart, seed=0, batch=size) if apart else None) or (None, None)
    return {"mean": mine - theirs, "low": low, "high": high}


def _change(mine: float, theirs: float, ours: list[float], other: list[float], size: int) -> dict[str, float | None]:
    from gidef.metrics import bootstrap_change

    low, high = (bootstrap_change(ours, other, seed=0, batch=size) if ours else None) or (None, None)
    return {"mean": mine / theirs - 1 if theirs > 0 else None, "low": low, "high": high}
