"""Settings of attacks, chosen on images kept for tuning: every point of a grid attacks these, the best is used on the victims, who are not looked at.

The evaluator chooses, by the truth: the tuning images are the attacker's own to know, and held out from the victims and from the judge.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gidef import config, metrics
from gidef.cells import Cell, make_cells
from gidef.releases import Releases
from gidef.report.files import write_atomically
from gidef.runs import Run, Trained

FILE = "tuned_attacks.json"
SAME_DB = 0.01
"""Mean PSNR this near to the best counts as equal, so that rounding does not choose; of equals the grid's first is taken."""

Chosen = dict[tuple[str, str, str], dict[str, Any]]
"""What was chosen, by (defence, checkpoint, attack): defence, checkpoint, attack, setting {field: value}, psnr_db there, images, seconds, tried: [{setting, psnr_db,
failed: images without a reconstruction, scored as mid-grey}] in the grid's order."""


def choose(run: Run, trained: dict[tuple[str, int], Trained], *, folder: Path, attack: Callable[[Run, list[Cell], Path], Any]) -> Chosen:
    """Attack the tuning images with every point of every `config.Tuned`, and take each defence's and checkpoint's best by mean PSNR over images and seeds.

    attack(run, cells, folder) attacks cells with their releases and, on rank 0, collects their reconstructions; results are files under `folder`, so that a
    resumed run finds them again. Every rank calls this together and gets the same.
    """
    tuned = {name: one for name, one in run.recipe.attacks.items() if isinstance(one, config.Tuned)}
    if not tuned:
        return {}
    points = {f"{name} {called(point)}": (name, point) for name, one in tuned.items() for point in one.points()}
    held = held_out(run, {label: tuned[name].at(point) for label, (name, point) in points.items()})
    cells, releases = make_cells(held, trained, folder, tell=False), Releases(held, stream="tuning")
    for cell in cells:
        cell.releases = releases.of(cell)
    counted = ", ".join(f"{len(one.points())} settings of {name}" for name, one in tuned.items())
    run.console.say(f"attacks are tuned on {len(held.setting.roles.victims)} images kept for it: {counted}")
    attack(held, cells, folder)
    found: list[dict[str, Any]] = []
    if run.leads:
        for defence, checkpoint in dict.fromkeys((cell.defence, cell.checkpoint) for cell in cells):
            for name in tuned:
                here = [cell for cell in cells if (cell.defence, cell.checkpoint) == (defence, checkpoint) and points[cell.name][0] == name]
                if here:
                    best = _best(here, {label: point for label, (_, point) in points.items()}, images=len(held.setting.roles.victims))
                    found.append({"defence": defence, "checkpoint": checkpoint, "attack": name} | best)
        write_atomically(folder / FILE, (json.dumps(found, indent=1) + "\n").encode())
    found = run.world.broadcast_json(found)
    for one in found:
        run.append("tuned attack", **one)
        run.console.say(f"{one['defence']} / {one['attack']} / {one['checkpoint']}: {words(one)}")
    return {(one["defence"], one["checkpoint"], one["attack"]): one for one in found}


def held_out(run: Run, attacks: dict[str, Any]) -> Run:
    """The run with the tuning images in the victims' place, as many as fill batches, and other attacks. Its saved results are none of the run's own."""
    rows, size = run.setting.roles.tuning, run.recipe.evaluation.batch_size
    roles = dataclasses.replace(run.setting.roles, victims=rows[: len(rows) - len(rows) % size])
    recipe = dataclasses.replace(run.recipe, attacks=attacks, evaluation=dataclasses.replace(run.recipe.evaluation, control=False))
    return dataclasses.replace(run, setting=dataclasses.replace(run.setting, roles=roles, recipe=recipe), fingerprint=f"{run.fingerprint}|tuning")


def called(point: dict[str, Any]) -> str:
    """A point of a grid in the name of a folder."""
    return " ".join(f"{field}={value}" for field, value in point.items())


def words(one: dict[str, Any]) -> str:
    """What was chosen, and where it stands among what was tried, for the console and a row's note."""
    setting = ", ".join(f"{field} = {value:g}" if isinstance(value, float) else f"{field} = {value}" for field, value in one["setting"].items())
    values = [tried["psnr_db"] for tried in one["tried"]]
    said = f"tuned on {one['images']} held-out images: {setting} ({one['psnr_db']:.1f} dB there, {len(values)} settings from {min(values):.1f} to {max(values):.1f} dB)"
    return said + (f", {' and '.join(edges)} at the grid's edge" if (edges := _edges(one)) else "")


def _edges(one: dict[str, Any]) -> list[str]:
    """Fields whose chosen number is the least or the largest of three or more."""
    found = []
    for field, value in one["setting"].items():
        values = {tried["setting"][field] for tried in one["tried"]}
        if len(values) > 2 and all(isinstance(each, (int, float)) for each in values) and value in (min(values), max(values)):
            found.append(field)
    return found


def _best(cells: list[Cell], points: dict[str, dict[str, Any]], *, images: int) -> dict[str, Any]:
    """The best of the points that the cells of one attack, defence and checkpoint tried, pooled over seeds."""
    tried = []
    for name in dict.fromkeys(cell.name for cell in cells):
        group = [cell for cell in cells if cell.name == name]
        failed = sum(one.status == "failed" for cell in group for one in cell.reconstructions) * group[0].victims.rows.shape[1]
        tried.append({"setting": points[name], "psnr_db": sum(map(_psnr_db, group)) / len(group), "failed": failed})
    most = max(one["psnr_db"] for one in tried)
    best = next(one for one in tried if one["psnr_db"] >= most - SAME_DB)
    return {"setting": best["setting"], "psnr_db": best["psnr_db"], "images": images, "seconds": sum(cell.seconds for cell in cells), "tried": tried}


def _psnr_db(cell: Cell) -> float:
    """Mean PSNR of a cell's reconstructions, each batch paired with its truth."""
    values = []
    for found, truth in zip(cell.reconstructions, cell.victims.images, strict=True):
        images = found.images.to(truth)
        values.append(metrics.psnr_db(images[metrics.pair(images, truth)], truth).double().mean())
    return float(torch.stack(values).mean())
