"""The strength at which a defence costs a wanted accuracy, found by training it a few times. Only validation accuracy is looked at."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from gidef import config
from gidef.errors import Diverged, InputError
from gidef.report.claim import MATCHED
from gidef.report.files import write_atomically
from gidef.runs import Run, Trained
from gidef.training import train

FILE, FAILED = "tuning.json", "failed.json"
CLOSE = 0.002
"""Accuracy this near to the target ends the search."""


def search(measure: Callable[[float], float], *, low: float, high: float, target: float, trials: int, step: int = 0) -> list[tuple[float, float]]:
    """Bisection on a logarithmic scale for a value in [low, high] with measure(value) = target, whether measure falls or rises with the value.

    Args:    measure: accuracy in [0, 1] at a strength.  low, high: above 0.  trials: at least 1.  step: values are low, low + step, ... up to high, as
             whole numbers are; 0 for any of four digits.
    Returns: (value, measured) in the order tried, no value twice. The first two are high and low, whose accuracies tell the direction; one alone where high
             is on the target (at most 0.002 above it) or trials is 1. It stops there if both are on one side of the target (what lies between them is
             not looked at), else as soon as something is within 0.002 of it, or nothing is left between the nearest on both sides. Where measure is not
             monotone, one of its crossings is closed in on.
    """
    tried: list[tuple[float, float]] = []

    def at(value: float) -> float:
        tried.append((value, measure(value)))
        return tried[-1][1]

    top = at(high)
    if trials == 1 or 0 <= top - target <= CLOSE:
        return tried
    bottom = at(low)
    if not (bottom > target > top or top > target > bottom):
        return tried
    above, below = (low, high) if bottom > target else (high, low)
    while len(tried) < trials and min(abs(found - target) for _, found in tried) > CLOSE:
        if (middle := _between(*sorted((above, below)), step)) is None:
            break
        above, below = (middle, below) if at(middle) > target else (above, middle)
    return tried


def _between(low: float, high: float, step: int) -> float | None:
    """The value nearest to the middle on a logarithmic scale, None where none lies between."""
    middle = math.sqrt(low * high)
    if not step:
        value = float(f"{middle:.4g}")
        return value if low < value < high else None
    inside = (high - low - 1) // step
    return low + step * min(max(round((middle - low) / step), 1), inside) if inside else None


def closest(tried: list[tuple[float, float]], target: float, *, private: Literal["low", "high"] | None = "high") -> float:
    """The value to take of those tried: with the accuracy closest to the target; of equals, the strongest.

    private: the end of the range at which the defence protects most, None where that is not known: then the highest of equals (`undecided`). Where accuracy
    is above the target at both ends, the defence costs too little everywhere, and this end is taken, whichever is nearer: the two may differ by chance.
    """
    far = -1 if private == "low" else 1
    if private and min(found for _, found in tried) > target + CLOSE:
        return max(tried, key=lambda one: far * one[0])[0]
    return min(tried, key=lambda one: (abs(one[1] - target), -far * one[0]))[0]


def undecided(tried: list[tuple[float, float]], target: float) -> bool:
    """Whether `closest` would have asked which end of the range protects most: accuracy is above the target throughout, or equally close at several values."""
    off = [abs(found - target) for _, found in tried]
    return len(tried) > 1 and (min(found for _, found in tried) > target + CLOSE or off.count(min(off)) > 1)


def outcome(tried: list[tuple[float, float]], value: float, *, low: float, high: float, target: float) -> dict[str, Any]:
    """How a search ended.

    Returns: accuracy: at the value that was taken.  reached: whether it is within a point (`claim.MATCHED`) of the target.  end: "low" or "high" where the
             value is that end of the range, else None.  direction: of accuracy from low to high, "falling", "rising" or "flat"; None after one trial.
             monotone: whether no trial goes against it by more than 0.002.
    """
    accuracy, ordered = dict(tried)[value], [found for _, found in sorted(tried)]
    change = ordered[-1] - ordered[0]
    steps = [later - earlier for earlier, later in itertools.pairwise(ordered)]
    return {
        "accuracy": accuracy, "reached": abs(accuracy - target) <= MATCHED + 1e-9, "end": {low: "low", high: "high"}.get(value),
        "direction": None if len(tried) == 1 else "flat" if change == 0 else "falling" if change < 0 else "rising",
        "monotone": max(steps, default=0.0) <= CLOSE or min(steps, default=0.0) >= -CLOSE,
    }  # fmt: skip


def missed(one: dict[str, Any]) -> str:
    """What a row says of a defence whose target was not reached, "" of one that reached it. one: an entry of `tuned` (an older one says nothing)."""
    if one.get("reached", True):
        return ""
    said = f"target not reached: nearest is {one['field']} = {one['value']:g} at {100 * one['accuracy']:.1f} % validation accuracy, {100 * one['target']:.1f} % wanted"
    said += f", at the {ENDS[one['end']]} end of the range" if one["end"] else ""
    return said + (f", and it is not known at which end {one['field']} protects most" if one.get("undecided") else "")


def noted(rows: list[dict[str, Any]], tuned: dict[str, Any], failed: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """The rows, with a note those of defences that missed their target, or that were not trained under every seed.

    failed: of `train_all`, by the names of rows.
    """
    said = {key: [missed(one)] for key, one in tuned.items()}
    for one in failed:
        said.setdefault(one["defence"], []).append(f"without seed {one['seed']}, whose training diverged")
    return [row | {"note": "; ".join(notes)} if (notes := [*filter(None, (row.get("note"), *said.get(row["defence"], ())))]) else row for row in rows]


ENDS = {"low": "lower", "high": "upper"}


def _tell(run: Run, key: str, one: dict[str, Any], trials: int) -> None:
    """What a search found, on the console."""
    run.console.say(f"{key}: {one['field']} = {one['value']:g}")
    found = [accuracy for _, accuracy in one["tried"]]
    if not one["reached"]:
        if min(found) > one["target"]:
            why = "whatever was tried costs less than wanted: accuracies are not matched. Look further out, or take it as a defence that costs nothing"
        elif max(found) < one["target"]:
            why = "whatever was tried costs more than wanted: accuracies are not matched. Look further out, or take it as a defence that always costs"
        else:
            why = f"{len(found)} of {trials} trials lie on both sides of it: accuracies are not matched. More trials may come nearer, unless accuracy jumps there"
        run.console.notice(f"{key}: {missed(one)}; {why}.")
    elif not one["monotone"]:
        run.console.notice(f"{key}: accuracy does not go one way with {one['field']}, so that other values may reach the target as well.")
    if one.get("undecided"):
        run.console.notice(
            f"{key}: it is not known at which end of its range {one['field']} protects most, so that {one['value']:g} was taken by accuracy alone, and another "
            "value may protect more at no higher cost. Search a field that says how strong the defence is, or compare both ends."
        )


Place = tuple[str, int]
"""A defence and a seed."""


def shares(recipe: config.Recipe, count: int) -> list[list[Place]]:
    """The recipe's defences and seeds cut into so many shares of about the same work, in the recipe's order; some are empty where there are more than defences.

    A search is one piece with all its seeds, as they take the strength that it finds; anything else is cut by seeds as well. Work is counted in
    trainings, each with as much again for its attacks, and what is left of it with most goes where there is least: the same in every process.
    """
    pieces = []
    for key, one in recipe.chosen.items():
        places = [(key, seed) for seed in recipe.seeds]
        pieces += [(places, 2 * len(places) + one.trials)] if isinstance(one, config.Matched) else [([place], 2) for place in places]
    found: list[list[Place]] = [[] for _ in range(count)]
    loads = [0] * count
    for places, work in sorted(pieces, key=lambda piece: -piece[1]):
        least = loads.index(min(loads))
        found[least] += places
        loads[least] += work
    order = [(key, seed) for key in recipe.chosen for seed in recipe.seeds]
    return [sorted(share, key=order.index) for share in found]


def _to_train(recipe: config.Recipe, wanted: Collection[Place]) -> list[Place]:
    """Of the defences that need no search: those wanted, and the undefended net that a wanted search measures itself by."""
    searched = [one for key, one in recipe.chosen.items() if isinstance(one, config.Matched) and one.accuracy is None and (key, recipe.seeds[0]) in wanted]
    reference = [(key, recipe.seeds[0]) for key, one in recipe.chosen.items() if searched and isinstance(one, config.Undefended)][:1]
    plain = [(key, seed) for key, one in recipe.chosen.items() if not isinstance(one, config.Matched) for seed in recipe.seeds]
    return [place for place in plain if place in wanted or place in reference]


def train_all(run: Run, wanted: Collection[Place] | None = None) -> tuple[dict[Place, Trained], dict[str, Any], list[dict[str, Any]]]:
    """Train every defence and seed of the recipe, or those wanted, one of `shares`; those without `Matched` first.

    An undefended net that a search measures itself by is trained too, though not returned where nobody wants it. A training that diverges is told and left
    out, and the others go on. A trial of a search that diverges counts as accuracy 0, below any target, and its value is not taken where another was tried.

    Returns: what was trained; what was tuned (see `resolved`), with `diverged`: values, where trials did; [{defence, seed, error}] of what diverged, or has no
             undefended net to be measured by for that reason, in the recipe's order. Every rank calls this together; a resumed run finds its trials
             again, and tries again what diverged.
    Raises:  InputError, once the undefended net is trained, where a search's target is chance or less.
    """
    recipe, trained, errors = run.recipe, {}, {}
    order = [(key, seed) for key in recipe.chosen for seed in recipe.seeds]
    wanted = order if wanted is None else wanted

    def fail(key: str, seed: int, error: str) -> None:
        errors[key, seed] = error
        run.append("failed", defence=key, seed=seed, error=error)
        run.console.notice(f"{key}, seed {seed} is left out: {error}")

    def attempt(key: str, chosen: Any, seed: int) -> None:
        try:
            trained[key, seed] = train(run, key, chosen, seed)
        except Diverged as error:
            fail(key, seed, str(error))

    searched = {key: one for key, one in recipe.chosen.items() if isinstance(one, config.Matched) and (key, recipe.seeds[0]) in wanted}
    for key, seed in _to_train(recipe, wanted):
        attempt(key, recipe.chosen[key], seed)
        if isinstance(recipe.chosen[key], config.Undefended) and (key, seed) in trained:
            for name, matched in searched.items():  # a target at chance is told now, not once all else is trained
                _target(run, name, matched, trained)
    told: dict[str, Any] = {}
    for key, matched in searched.items():
        target = _target(run, key, matched, trained)
        if target is None:
            for seed in recipe.seeds:
                fail(key, seed, f"its target is {matched.points:g} points below the undefended net, whose training diverged.")
            continue
        run.console.say(f"{key}: looking for {matched.field} in [{matched.low:g}, {matched.high:g}] at {100 * target:.1f} % validation accuracy")

        diverged: list[float] = []

        def measure(value: float, key: str = key, matched: config.Matched = matched, diverged: list[float] = diverged) -> float:
            try:
                one = train(run, f"{key} at {value:g}", matched.at(value), recipe.seeds[0])
            except Diverged as error:
                diverged.append(value)
                run.console.notice(f"{key}: the training at {matched.field} = {value:g} counts as accuracy 0: {error}")
                return 0.0
            return float(one.summary["val_accuracy"])

        low, high = matched.value(matched.low), matched.value(matched.high)
        tried = search(measure, low=low, high=high, target=target, trials=matched.trials, step=matched.step)
        sound = [one for one in tried if one[0] not in diverged] or tried
        value = closest(sound, target, private=matched.private_end)
        told[key] = {
            "field": matched.field, "value": value, "target": target, **outcome(tried, value, low=low, high=high, target=target),
            "trials": len(tried), "tried": [[one, found] for one, found in tried], **({"diverged": diverged} if diverged else {}),
            **({"undecided": True} if matched.private_end is None and undecided(sound, target) else {}),
        }  # fmt: skip
        run.append("tuned", defence=key, **told[key])
        if run.leads:
            write_atomically(run.folder / FILE, (json.dumps(told, indent=1) + "\n").encode())
        _tell(run, key, told[key], matched.trials)
        for seed in recipe.seeds:
            attempt(key, matched.at(value), seed)
    failed = [{"defence": key, "seed": seed, "error": errors[key, seed]} for key, seed in order if (key, seed) in errors and (key, seed) in wanted]
    if run.leads:
        save_failed(run.folder, failed)
    run.world.barrier()
    return {place: trained[place] for place in order if place in wanted and place in trained}, told, failed


def _target(run: Run, key: str, matched: config.Matched, trained: dict[Place, Trained]) -> float | None:
    """The wanted validation accuracy: as given, or so many points below the first undefended net of the same seed; None where that one diverged.

    Raises:  InputError where so many points below it are chance or less.
    """
    if matched.accuracy is not None:
        return matched.accuracy
    for name, one in run.recipe.chosen.items():
        if isinstance(one, config.Undefended):
            found, chance = trained.get((name, run.recipe.seeds[0])), 1 / run.setting.dataset.num_classes
            if found is None:
                return None
            plain = float(found.summary["val_accuracy"])
            if plain - matched.points / 100 <= chance + 1e-9:
                raise InputError(
                    f"defences.{key}: points={matched.points:g} below the undefended net's {100 * plain:.1f} % validation accuracy are {100 * plain - matched.points:.1f} %, and "
                    f"guessing one of {run.setting.dataset.num_classes} classes gets {100 * chance:.1f} %: there is no accuracy left to match. Lower points, or train longer."
                )
            return plain - matched.points / 100
    raise InputError(f"defences.{key}: points={matched.points} are below the undefended net, which this recipe does not train: add Undefended(), or give accuracy.")


def save_failed(folder: Path, failed: list[dict[str, Any]]) -> None:
    """Keep what was not trained in a run's folder, for `resolved`; no file where all was."""
    if failed:
        write_atomically(folder / FAILED, (json.dumps(failed, indent=1) + "\n").encode())
    else:
        (folder / FAILED).unlink(missing_ok=True)


def resolved(run: Run) -> tuple[dict[Place, Any], dict[str, Any], list[dict[str, Any]]]:
    """What a finished run trained: its defences and seeds, with the strengths that its tuning found; what was tuned; what failed, as `train_all` returns it.

    Raises:  InputError if the run's tuning.json is missing or lacks one of them, or if its failed.json cannot be read.
    """
    path, chosen, failed = run.folder / FILE, run.recipe.chosen, _failed(run)
    lost = {(one["defence"], one["seed"]) for one in failed}
    places = [(key, seed) for key in chosen for seed in run.recipe.seeds if (key, seed) not in lost]
    wanted = list(dict.fromkeys(key for key, _ in places if isinstance(chosen[key], config.Matched)))
    if not wanted:
        return {(key, seed): chosen[key] for key, seed in places}, {}, failed
    try:
        told = json.loads(path.read_text())
        found = {key: chosen[key].at(told[key]["value"]) for key in wanted}
        return {(key, seed): found.get(key, chosen[key]) for key, seed in places}, told, failed
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not say what strength {', '.join(wanted)} was trained at ({error!r}): finish the run with --resume first.") from error


def _failed(run: Run) -> list[dict[str, Any]]:
    """What of the run's defences was not trained."""
    path = run.folder / FAILED
    if not path.exists():
        return []
    try:
        failed = [{"defence": one["defence"], "seed": one["seed"], "error": one["error"]} for one in json.loads(path.read_text())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not say which trainings failed ({error!r}): finish the run with --resume first.") from error
    return [one for one in failed if one["defence"] in run.recipe.chosen and one["seed"] in run.recipe.seeds]
