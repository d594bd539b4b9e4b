"""What a recipe's JSON says of its defences: of what kind each is, and which differ in their strength alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gidef.report.results import recipe_name

STRENGTHS = (
    "strength", "dependence_weight", "kl_weight", "bits_weight", "std", "std_init", "std_floor", "x_weight", "y_weight", "share", "bound", "bits", "clip",
    "noise_multiplier", "target_epsilon", "noisy", "mixing", "mixed", "largest", "concealed", "blend",
)  # fmt: skip
"""Numbers of gidef's defences that say how strong one is; the others are sizes, budgets and schedules. Of a defence of your own every number may be one."""

EITHER = {"noise_multiplier": "target_epsilon", "target_epsilon": "noise_multiplier"}
"""Fields of which one follows from the other: where one was searched, the other is null."""

Settings = dict[tuple[str, ...], Any]
"""Every value of a defence by its place: the member of a combination, its type, the names of fields."""


def kinds(spec: Any) -> list[str]:
    """Types of a defence in a recipe's JSON, those within a search or a combination."""
    if isinstance(spec, list):
        return [kind for part in spec for kind in kinds(part)]
    if not isinstance(spec, dict):
        return []
    return kinds(spec.get("defence")) if spec.get("type") == "Matched" else [str(spec.get("type"))]


def defences(results: dict[str, Any]) -> dict[str, Any]:
    """The recipe's defences as JSON, by name."""
    return results["recipe"].get("defences") or {}


def family(results: dict[str, Any], defence: str) -> str:
    """The type of a defence, of a combination all types; its name where the recipe does not tell."""
    name = recipe_name(results, defence)
    return " + ".join(kinds(defences(results).get(name))) or name


def settings(results: dict[str, Any], defence: str) -> Settings:
    """A defence as it was trained, and how strong its noise was when it was evaluated: one that was searched has the value that was found, None where
    the results do not say."""
    name, found = recipe_name(results, defence), None
    spec = defences(results).get(name)
    if isinstance(spec, dict) and spec.get("type") == "Matched":
        found = {spec.get("field"): ((results.get("tuned") or {}).get(name) or {}).get("value")}
        if other := EITHER.get(spec.get("field")):
            found[other] = None
        spec = spec.get("defence")
    values: Settings = {}
    for number, part in enumerate(spec if isinstance(spec, list) else [spec]):
        if isinstance(part, dict):
            _flatten(part | {key: value for key, value in (found or {}).items() if key in part}, (str(number), str(part.get("type"))), values)
    if spec is not None:
        values["", "evaluation", "strength"] = next((run["strength"] for run in results.get("training") or [] if run["defence"] == defence and "strength" in run), 1.0)
    return values


def _flatten(value: Any, place: tuple[str, ...], into: Settings) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, (*place, key), into)
    else:
        into[place] = tuple(value) if isinstance(value, list) else value


def strengths(chosen: Mapping[str, Settings]) -> list[list[str]]:
    """Names of defences in groups of two or more that differ in one strength alone, by rising strength. One may belong to several groups."""
    groups: list[list[str]] = []
    for place in dict.fromkeys(place for values in chosen.values() for place in values if _is_strength(place)):
        alike: dict[Any, dict[float, str]] = {}
        for name, values in chosen.items():
            value = values.get(place)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = tuple(sorted((key, repr(item)) for key, item in values.items() if key != place))
                alike.setdefault(rest, {}).setdefault(value, name)
        groups += [[names[value] for value in sorted(names)] for names in alike.values() if len(names) > 1]
    return groups


def _is_strength(place: tuple[str, ...]) -> bool:
    _, kind, *fields = place
    return fields[-1] in STRENGTHS or ":" in kind
