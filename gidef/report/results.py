"""results.json: what came out of a run. The package docstring documents its layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gidef.errors import InputError
from gidef.report.files import plain, write_atomically

FORMAT = 1
BOUNDS = ("constant grey", "mean image", "class mean", "nearest public neighbour", "shuffled gradient")
MEASURED = ("client_accuracy", "attacker_accuracy", "mse", "psnr_db", "ssim")
EXPORTED = (*MEASURED, "nmse")
"""Measured values that the CSV holds; tables have a column for each of MEASURED, the page for `nmse` as well, where it was measured."""

_TOP = {"recipe": dict, "recipe_name": str, "data": dict, "versions": dict, "seeds": list, "training": list, "rows": list, "bounds": list}
_TOP_OPTIONAL = {"part": list, "hardware": dict, "seconds": dict, "weights_sha256": dict, "judge": dict, "pictures": list, "verdict": list, "nets": list, "not_applicable": list, "failed": list}
_ROW = {"defence": str, "attack": str, "attack_id": str, "checkpoint": str, "share_policy": str, "victims": int, "psnr_db": object}

_FAILED = {"defence": str, "seed": int, "error": str}
_IDLE = {"defence": str, "attack": str, "attack_id": str, "reason": str}


def save(path: str | Path, results: dict[str, Any]) -> Path:
    """Write results.json atomically, after `validate`; tensors become numbers, NaN and ±inf null. The input is not modified."""
    results = plain(results)
    validate(results)
    return write_atomically(path, (json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def load(path: str | Path) -> dict[str, Any]:
    """Read and `validate` a results.json. Raises: InputError if it is missing, no JSON, or not in this layout."""
    try:
        results = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Give the results.json of a finished run.") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}. Give the results.json of a finished run.") from error
    validate(results, str(path))
    return results


def validate(results: Any, where: str = "results") -> None:
    """A light check of the layout: the keys that tables and verdict rely on, and their types.

    Raises: InputError that names the place, what was found and what was expected.
    """
    if not isinstance(results, dict):
        raise InputError(f"{where}: found {type(results).__name__}, expected an object in the layout of gidef.report.")
    if results.get("format") != FORMAT:
        raise InputError(f"{where}: format {results.get('format')!r}, expected {FORMAT}: it was written by another version of gidef; use that one.")
    _check_keys(results, _TOP, where)
    _check_keys({key: value for key, value in results.items() if key in _TOP_OPTIONAL}, _TOP_OPTIONAL, where, missing=False)
    _check_keys(results["data"], {"name": str, "synthetic": bool}, f"{where}.data")
    for key, needed in (("training", {"defence": str}), ("rows", _ROW), ("not_applicable", _IDLE), ("failed", _FAILED), ("bounds", {"name": str, "psnr_db": object})):
        for index, entry in enumerate(results.get(key, [])):
            place = f"{where}.{key}[{index}]"
            if not isinstance(entry, dict):
                raise InputError(f"{place}: found {type(entry).__name__}, expected an object.")
            _check_keys(entry, needed, place)
            for name in EXPORTED:
                _check_measured(entry.get(name), f"{place}.{name}")
    unknown = {bound["name"] for bound in results["bounds"]} - set(BOUNDS)
    if unknown:
        raise InputError(f"{where}.bounds: unknown names {sorted(unknown)}, expected some of {list(BOUNDS)}.")


def mean_of(value: Any) -> float | None:
    """The mean of a measured value, which is a number, None or an interval."""
    return value.get("mean") if isinstance(value, dict) else value


def interval_of(value: Any) -> tuple[float, float] | None:
    """(low, high) of a measured value, or None where it has no interval."""
    if isinstance(value, dict) and value.get("low") is not None and value.get("high") is not None:
        return value["low"], value["high"]
    return None


def observations_of(row: dict[str, Any]) -> int:
    """Batches of victims that a row's adversary saw; of a file that does not count them, as many as the batch size makes of its victims."""
    return row.get("observations") or max(1, row["victims"] // ((row.get("threat") or {}).get("batch_size") or 1))


def alone(row: dict[str, Any]) -> bool:
    """Whether all of a row's images were seen in one observation, so that there is no interval: nothing says how another would differ."""
    return row["victims"] > 1 and row.get("observations") == 1


def batches(results: dict[str, Any]) -> str:
    """The observations that intervals are over, where one is of several victims, in words; "" elsewhere, and of a file that does not count them."""
    found = dict.fromkeys((row["observations"], row["victims"] // row["observations"]) for row in results["rows"] if row.get("observations"))
    return " and ".join(f"{count} batch{'es' * (count > 1)} of {size} images" for count, size in found if size > 1)


def bound_label(bound: dict[str, Any]) -> str:
    """A bound's name in a table, with the defence that it belongs to where there is one."""
    return f"{bound['name']} of {bound['of']}" if bound.get("of") else bound["name"]


def bound_named(results: dict[str, Any], name: str) -> dict[str, Any]:
    """The bound of that name, or an empty one."""
    return next((bound for bound in results["bounds"] if bound["name"] == name), {})


def recipe_name(results: dict[str, Any], defence: str) -> str:
    """The recipe's name of a defence: of one that was evaluated at another strength, the one that it was trained as."""
    return next((run["trained_as"] for run in results.get("training") or [] if run["defence"] == defence and run.get("trained_as")), defence)


def not_applicable(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows without a number for the attacks that have nothing to attack in a defence, or are not simulated there; the note says why."""
    empty = {"checkpoint": "", "psnr_db": None, "victims": None}
    return [{**one, **empty, "note": f"not applicable: {one['reason']}"} for one in results.get("not_applicable") or []]


def failed(results: dict[str, Any]) -> list[str]:
    """What was not trained, and why: a line for each defence and seed."""
    return [f"Not trained: {one['defence']}, seed {one['seed']}: {one['error']}" for one in results.get("failed") or []]


def _check_keys(entry: dict[str, Any], needed: dict[str, type], place: str, *, missing: bool = True) -> None:
    for key, kind in needed.items():
        if key not in entry:
            if missing:
                raise InputError(f"{place}: {key!r} is missing, expected {kind.__name__}; see the layout in gidef.report.")
        elif not isinstance(entry[key], kind) and kind is not object:
            raise InputError(f"{place}.{key}: found {entry[key]!r:.60}, expected {kind.__name__}.")


def _check_measured(value: Any, place: str) -> None:
    numbers = value if isinstance(value, dict) else {"mean": value}
    for name, number in numbers.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number)):
            raise InputError(f"{place}: found {name}={number!r:.60}, expected a finite number or null.")
