"""The strength at which a defence costs a wanted accuracy, found by training it a few times. Only validation accuracy is looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from typing import Any

from gidef import config
from gidef.errors import InputError
from gidef.report.files import write_atomically
from gidef.training import Run, Trained, train

FILE = "tuning.json"


def search(measure: Callable[[float], float], *, low: float, high: float, target: float, trials: int) -> list[tuple[float, float]]:
    """Bisection on a logarithmic scale for a value in [low, high] with measure(value) = target; measure falls where the value rises.

    Args:    measure: accuracy in [0, 1] at a strength.  low, high: above 0.  trials: at least 1.
    Returns: (value, measured) in the order tried; whoever calls takes the closest. The first two are high and then, if that falls
             short of the target, low; it stops early where an end is already on the near side of the target, or something is within 0.002 of it.
    """
    tried: list[tuple[float, float]] = []

    def at(value: float) -> float:
        tried.append((value, measure(value)))
        return tried[-1][1]

    if at(high) >= target or trials == 1 or at(low) <= target:
        return tried
    while len(tried) < trials and min(abs(found - target) for _, found in tried) > 0.002:
        middle = float(f"{math.sqrt(low * high):.4g}")
        low, high = (middle, high) if at(middle) > target else (low, middle)
    return tried


def closest(tried: list[tuple[float, float]], target: float) -> float:
    """The value whose accuracy is closest to the target; of equals, the strongest."""
    return min(tried, key=lambda one: (abs(one[1] - target), -one[0]))[0]


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


def train_all(run: Run, wanted: Collection[Place] | None = None) -> tuple[dict[Place, Trained], dict[str, Any]]:
    """Train every defence and seed of the recipe, or those wanted, one of `shares`; those without `Matched` first.

    An undefended net that a search measures itself by is trained too, though not returned where nobody wants it.

    Returns: what was trained, and what was tuned (see `resolved`). Every rank calls this together; a resumed run finds its trials again.
    """
    recipe = run.recipe
    order = [(key, seed) for key in recipe.chosen for seed in recipe.seeds]
    wanted = order if wanted is None else wanted
    trained = {(key, seed): train(run, key, recipe.chosen[key], seed) for key, seed in _to_train(recipe, wanted)}
    told: dict[str, Any] = {}
    for key, matched in recipe.chosen.items():
        if not isinstance(matched, config.Matched) or (key, recipe.seeds[0]) not in wanted:
            continue
        target = _target(run, key, matched, trained)
        run.console.say(f"{key}: looking for {matched.field} in [{matched.low:g}, {matched.high:g}] at {100 * target:.1f} % validation accuracy")

        def measure(value: float, key: str = key, matched: config.Matched = matched) -> float:
            one = train(run, f"{key} at {value:g}", matched.at(value), recipe.seeds[0])
            return float(one.summary["val_accuracy"])

        tried = search(measure, low=matched.low, high=matched.high, target=target, trials=matched.trials)
        value = closest(tried, target)
        told[key] = {"field": matched.field, "value": value, "target": target, "tried": [[one, found] for one, found in tried]}
        run.append("tuned", defence=key, **told[key])
        if run.leads:
            write_atomically(run.folder / FILE, (json.dumps(told, indent=1) + "\n").encode())
        run.console.say(f"{key}: {matched.field} = {value:g}")
        for seed in recipe.seeds:
            trained[key, seed] = train(run, key, matched.at(value), seed)
    run.world.barrier()
    return {place: trained[place] for place in order if place in wanted}, told


def _target(run: Run, key: str, matched: config.Matched, trained: dict[Place, Trained]) -> float:
    """The wanted validation accuracy: as given, or so many points below the undefended net of the same seed."""
    if matched.accuracy is not None:
        return matched.accuracy
    for (name, seed), one in trained.items():
        if isinstance(run.recipe.chosen[name], config.Undefended) and seed == run.recipe.seeds[0]:
            return float(one.summary["val_accuracy"]) - matched.points / 100
    raise InputError(f"defences.{key}: points={matched.points} are below the undefended net, which this recipe does not train: add Undefended(), or give accuracy.")


def resolved(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """The defences of a finished run with the strengths that its tuning found, and what was tuned.

    Raises:  InputError if the run's tuning.json is missing or lacks one of them.
    """
    path, chosen = run.folder / FILE, dict(run.recipe.chosen)
    wanted = [key for key, one in chosen.items() if isinstance(one, config.Matched)]
    if not wanted:
        return chosen, {}
    try:
        told = json.loads(path.read_text())
        return {key: one.at(float(told[key]["value"])) if key in wanted else one for key, one in chosen.items()}, told
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not say what strength {', '.join(wanted)} was trained at ({error!r}): finish the run with --resume first.") from error
