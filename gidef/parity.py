"""The gate before attacks in low precision: the evaluator compares both precisions on images kept for tuning, never on the victims."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from gidef import attack as attacks
from gidef import config, methods, metrics, observe
from gidef.cells import Cell, mark
from gidef.report.files import write_atomically
from gidef.runs import Run

SHIFT_DB = 0.1
"""Largest shift of the mean PSNR that low precision may cause."""
ITERATIONS = 200
IMAGES = 8


def gated(run: Run, cell: Cell, *, mode: str, at_once: int, path: Path) -> str:
    """The precision to attack a cell in: as asked for, or float32 where the gate stays shut, which is told. All ranks call this together.

    path: of the file that keeps what was measured, for a resumed run: in this precision, for this seed, on this type of device.
    """
    asked = run.recipe.speed.attack_precision
    if asked == "float32":
        return asked
    if asked == "tf32" and run.world.device.type != "cuda":
        run.console.notice(f"{cell.label}: {run.world.device} has no TF32: float32 is used.")
        return "float32"
    found = None
    if run.leads:
        known = kept(path)
        key = _key(run, cell)
        if key not in known:
            try:
                known[key] = shift_db(run, cell, asked, mode=mode, at_once=at_once)
            except Exception as error:  # of the model's code or the device: the attack itself will say so, each in its row
                known[key] = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
            write_atomically(path, (json.dumps(known, indent=1) + "\n").encode())
        found = known[key]
    shift = run.world.broadcast_json(found)
    if shift is None:
        run.console.notice(f"{cell.label}: no images are kept for tuning (evaluation.num_tuning), so {asked} cannot be checked: float32 is used.")
        return "float32"
    if isinstance(shift, str):
        run.console.notice(f"{cell.label}: {asked} cannot be checked ({shift}): float32 is used.")
        return "float32"
    if abs(shift) >= SHIFT_DB:
        run.console.notice(f"{cell.label}: {asked} shifts the mean PSNR by {shift:+.2f} dB, {SHIFT_DB} is allowed: float32 is used.")
        return "float32"
    run.console.say(f"{cell.label}: {asked} shifts the mean PSNR by {shift:+.2f} dB: it is used.")
    return asked


def shift_db(run: Run, cell: Cell, precision: str, *, mode: str, at_once: int) -> float | None:
    """Mean PSNR in low precision less that in float32, of a short attack from the same starts; None without tuning images."""
    size = run.recipe.evaluation.batch_size
    rows = run.setting.roles.tuning[: max(size, IMAGES - IMAGES % size)]
    rows = rows[: len(rows) - len(rows) % size]
    if not len(rows):
        return None
    setting = dataclasses.replace(run.setting, roles=dataclasses.replace(run.setting.roles, victims=rows))
    tuning = dataclasses.replace(run, setting=setting)
    rounds = getattr(cell.attack, "rounds", 1)
    releases = [observe.release(tuning, cell.trained, cell.snapshot, seed=cell.seed, repeat=repeat) for repeat in range(rounds)]
    attack = cell.attack
    if getattr(attack, "decoder", "known") == "surrogate":  # the precision of the pass does not depend on whose decoder it is
        attack = dataclasses.replace(attack, decoder="known")
    if isinstance(attack, config.GenerativePrior):
        attack = config.JointMatching(**{spec.name: getattr(attack, spec.name) for spec in dataclasses.fields(config.JointMatching)})
    if isinstance(attack, config.GradInversion):
        attack = dataclasses.replace(attack, group=0.0)
    if isinstance(attack, config.NaiveMatching):
        attack = dataclasses.replace(attack, iterations=min(ITERATIONS, attack.iterations), restarts=1, halving=1)
    plan = methods.plan(methods.make_case(tuning, cell.trained, cell.snapshot, attack, releases, seed=cell.seed))
    means = []
    for one in ("float32", precision):
        found = attacks.run(
            plan.observations, plan.make_simulate, plan.matching, seed=cell.seed, mode=mode, at_once=at_once, precision=one, device=run.world.device
        )
        values = []
        for reconstruction, truth in zip(found, releases[0].images, strict=True):
            images = reconstruction.images.to(truth)
            values.append(metrics.psnr_db(images[metrics.pair(images, truth)], truth).mean())
        means.append(float(torch.stack(values).mean()))
    return means[1] - means[0]


def _key(run: Run, cell: Cell) -> str:
    """What a shift depends on: all that the attack's result does, the precision and the type of device. A control's is its attack's."""
    parts = [mark(run, dataclasses.replace(cell, control=False)), run.recipe.speed.attack_precision, run.world.device.type]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def kept(path: Path) -> dict[str, Any]:
    """What an earlier life of the run measured; nothing if the file is missing or cut off, since it can be measured again."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
