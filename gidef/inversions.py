"""The engine at work on an evaluation's cells: chunks as tasks with results in files, calibration, what is done already, what failed."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gidef import attack as attacks
from gidef import build, config, methods, observe, parity
from gidef.attack.ladder import climb
from gidef.attack.large import invert_large, on_module
from gidef.cells import Cell, Task, mark
from gidef.checkpoint import load_file, save_file
from gidef.clients.participate import DECODER
from gidef.clients.sharded import cut_up
from gidef.errors import InputError, StorageError
from gidef.models import SplitModel
from gidef.models.cuts import BEFORE
from gidef.report.files import write_atomically
from gidef.runs import Run
from gidef.types import Reconstruction, Tensors

REPORT_S = 0.5
"""Seconds of an attack after which it reports, if not before, and can be stopped."""
SHORT_S = 10.0
"""An attack that is over sooner than this is not calibrated: it runs eight at once as one program."""


class Unfit(Exception):
    """A network that an attack needs was not trained. The message says which, and why."""


def worded(error: Exception) -> str:
    """An error in one line, for a row; its kind, unless it was written to be read."""
    text = str(error) if isinstance(error, (InputError, Unfit)) else f"{type(error).__name__}: {error}"
    return (text.strip().splitlines() or [type(error).__name__])[0][:300]


def matching_tasks(run: Run, cells: Iterable[Cell], fitted: Callable[[Cell], dict[str, Any]], folder: Path) -> list[Task]:
    """One task per chunk of attacks that is not done yet. Every rank gets the same list, so all call this together."""
    tasks = []
    for cell in cells:
        plan = _planned(run, cell, fitted)
        tasks += [] if plan is None else _tasks_of(run, cell, plan, folder)
    return tasks


def _planned(run: Run, cell: Cell, fitted: Callable[[Cell], dict[str, Any]]) -> methods.Plan | None:
    """None for a cell that failed before it began, which is told once."""
    if cell.failure:
        return None
    try:
        plan = methods.plan(methods.make_case(run, cell.trained, cell.snapshot, cell.attack, cell.releases, seed=cell.seed, fitted=fitted(cell)))
        cell.read = plan.read
        if plan.note and plan.note not in cell.note:
            cell.note = "; ".join(filter(None, (cell.note, plan.note)))
        return plan
    except StorageError:
        raise
    except Exception as error:  # what it needs was not trained, or it cannot be planned: it failed, which is a result; the others go on
        cell.failure = worded(error)
        run.console.notice(f"{cell.label}: the attack failed: {cell.failure}")
        return None


def in_groups(run: Run, cells: Iterable[Cell], fitted: Callable[[Cell], dict[str, Any]]) -> None:
    """Where a client spans several ranks, so do attacks on the module itself: each group of ranks attacks every so manieth victim on one network in
    slices (FSDP2), into files as those of `matching_tasks`, to which all other attacks are left. All ranks call this together.

    The observed update and the weights lie whole on each rank; the network that is attacked, its gradients and what is moved are in slices. Images agree
    with those of one rank but for rounding. An InputError, which all ranks of a group meet before their first collective, fails that victim alone; any
    other error ends the run, as in training: it may be one rank's, and the others would wait for it inside of a collective.
    """
    mesh = run.world.mesh
    for cell in cells:
        plan = _planned(run, cell, fitted)
        if plan is None or not on_itself(run, cell, plan):
            continue
        starts, own = range(plan.matching.starts), mark(run, cell)
        done = {observation for observation, _ in run.world.broadcast_json(_done(cell.folder, own))}
        left = [observation for observation in range(len(plan.observations)) if observation not in done]
        if not left:
            continue
        run.console.say(f"{cell.label}: {len(left) * len(starts)} attacks, one network over each {mesh.shard.size} ranks")
        module = copy.deepcopy(cell.trained.training.defence.model).to(run.world.device)
        cut_up(module, mesh.device_mesh["shard"])
        mine = left[mesh.clients.rank :: mesh.clients.size]
        with run.console.track("attack in groups: iteration", len(mine) * len(starts) * plan.matching.iterations) as bar:
            over = 0
            for observation in mine:
                began, chunk = time.perf_counter(), tuple((observation, start) for start in starts)
                running = invert_large(plan.observations[observation], module, plan.matching, seed=cell.seed, chunk=chunk, checkpointing=recomputable(module))
                refused = ""
                while True:
                    try:
                        bar.update(over + int(next(running).done))
                    except StopIteration as end:
                        result = end.value
                        break
                    except StorageError:
                        raise
                    except InputError as error:
                        refused, result = worded(error), attacks.broken(chunk, plan.observations, plan.matching)
                        break
                told = mesh.shard.all_gather_json(refused)
                if any(text != refused for text in told):
                    raise RuntimeError(f"{cell.label}: the ranks of a group disagree on whether the attack on victim {observation} failed: {told}")
                if refused:
                    run.console.notice(f"{cell.label}: {len(chunk)} attacks failed: {refused}")
                errors = {f"{victim},{start}": refused for victim, start in chunk} if refused else {}
                over += len(starts) * plan.matching.iterations
                if mesh.shard.rank == 0:
                    meta = {"mark": own, "attacks": [list(one) for one in chunk], "seconds": time.perf_counter() - began, "errors": errors, "mode": "groups", "at_once": 1}
                    save_file(cell.folder / f"attacks-{observation:05d}-000-{len(chunk):04d}.safetensors", result, meta)
        run.world.barrier()


def _tasks_of(run: Run, cell: Cell, plan: methods.Plan, folder: Path) -> list[Task]:
    matching, programs, own = plan.matching, attacks.Programs(), mark(run, cell)
    done = run.world.broadcast_json(_done(cell.folder, own))
    left = len(plan.observations) * matching.starts - len(done)
    if not left:
        return []
    cell.calibration = _calibrated(run, cell, plan, programs, left, folder)
    mode, at_once = cell.calibration.mode, cell.calibration.at_once
    precision = parity.gated(run, cell, mode=mode, at_once=at_once, path=folder / "parity.json")
    run.console.say(f"{cell.label}: {left} attacks, {at_once} at once, {mode}")
    chunks = attacks.plan(len(plan.observations), matching.starts, at_once, together=matching.together, done=[tuple(one) for one in done])

    def task(chunk: attacks.Chunk) -> Task:
        path = cell.folder / f"attacks-{chunk[0][0]:05d}-{chunk[0][1]:03d}-{len(chunk):04d}.safetensors"
        stages = plan.stages
        total = sum(stage.iterations for stage in stages) * len(chunk)

        def do(worker: int, report: Callable[[float], None]) -> None:
            began, errors, reported = time.perf_counter(), {}, 0.0
            options = {"seed": cell.seed, "mode": mode, "at_once": at_once, "device": run.world.device, "precision": precision}

            def advance(now: float) -> None:
                nonlocal reported
                report(max(0.0, now - reported))
                reported = max(reported, now)

            def attacked(some: attacks.Chunk) -> Tensors:
                results, over = [], 0.0
                for number, stage in enumerate(stages):
                    settings = stage if number == 0 else methods.refined(plan, results[-1])
                    running = climb(
                        some, plan.observations, plan.make_simulate(), settings, notice=lambda text: _notice(run, cell, programs, text),
                        programs=programs, large=_large(run, cell, plan), every_s=REPORT_S, **options,
                    )  # fmt: skip
                    while True:
                        try:
                            advance(over + next(running).done)
                        except StopIteration as end:
                            results.append(end.value)
                            break
                    over += stage.iterations * len(some)
                    for text in programs.notices:
                        _notice(run, cell, programs, text)
                return results[0] if len(results) == 1 else attacks.joined(results, [stage.iterations for stage in stages])

            def tried(some: attacks.Chunk) -> Tensors | str:
                try:
                    return attacked(some)
                except StorageError:
                    raise
                except Exception as error:  # of the model's code or the device: these attacks failed, which is a result; the others go on
                    return worded(error)

            parts = [(chunk, tried(chunk))]
            if isinstance(parts[0][1], str) and len(victims := dict.fromkeys(o for o, _ in chunk)) > 1:  # it may be one victim's fault alone
                parts = [(some, tried(some)) for some in (tuple(one for one in chunk if one[0] == victim) for victim in victims)]
            for some, text in parts:
                if isinstance(text, str):
                    errors |= {f"{o},{s}": text for o, s in some}
            for text in dict.fromkeys(errors.values()):
                run.console.notice(f"{cell.label}: {sum(one == text for one in errors.values())} attacks failed: {text}")
            found = [attacks.broken(some, plan.observations, plan.whole) if isinstance(one, str) else one for some, one in parts]
            result = found[0] if len(found) == 1 else {name: torch.cat([one[name] for one in found]) for name in found[0] if all(name in one for one in found)}
            advance(float(total))
            meta = {"mark": own, "attacks": [list(one) for one in chunk], "seconds": time.perf_counter() - began, "errors": errors, "mode": mode, "at_once": at_once}
            save_file(path, result, meta)

        return Task(f"{cell.label} {chunk[0][0]}.{chunk[0][1]}", max(total, 1), path, do)

    return [task(chunk) for chunk in chunks]


def on_itself(run: Run, cell: Cell, plan: methods.Plan) -> bool:
    """Whether an attack can run on the module itself, see `attack.large`: A0 by descent, and A3, that match one gradient of the cross-entropy alone."""
    attack, defence = cell.attack, cell.trained.training.defence
    left_out = (config.EotMatching, config.DeepLeakage, config.DecoderAware, config.GenerativePrior, config.MultiRound, *config.READS)
    joint = isinstance(attack, config.JointMatching)
    if not isinstance(attack, config.NaiveMatching) or isinstance(attack, left_out) or callable(getattr(attack, "plan", None)):
        return False
    if joint and (defence.transforms or defence.encoders or defence.secure is not None or any(name.startswith(DECODER) for name in plan.observations[0].params)):
        return False
    if joint and observe.terms(run, cell.trained, attack, progress=cell.snapshot.progress) != "utility" and not defence.cross_entropy_alone(cell.snapshot.progress):
        return False
    return plan.matching.coupling is None and plan.matching.unordered is None and not plan.matching.searched and run.recipe.evaluation.release == "gradient"


def _large(run: Run, cell: Cell, plan: methods.Plan) -> Callable[[attacks.Chunk], Generator[attacks.Progress, None, Tensors]] | None:
    """The last resort where memory runs out: the attack on the module itself."""
    if not on_itself(run, cell, plan):
        return None

    def module() -> torch.nn.Module:
        return copy.deepcopy(cell.trained.training.defence.model).to(run.world.device)

    checkpointing = recomputable(cell.trained.training.defence.model)
    return on_module(plan.observations, module, plan.matching, seed=cell.seed, checkpointing=checkpointing, every_s=REPORT_S)


def recomputable(model: SplitModel) -> bool:
    """Whether blocks may be computed again in the backward pass: not where the latent is changed inside of one, which happens in a forward pass alone."""
    if model.perturbation is None and not model.latent_norm:
        return True
    parts = model.cut.removeprefix(BEFORE).split(".")
    lists = (torch.nn.ModuleList, torch.nn.Sequential)
    return not any(isinstance(model.backbone.get_submodule(".".join(parts[:depth])), lists) for depth in range(len(parts) - 1))


def _notice(run: Run, cell: Cell, programs: attacks.Programs, text: str) -> None:
    """Once per cell."""
    said = f"told {text}"
    if said not in programs.told:
        programs.told.add(said)
        run.console.notice(f"{cell.label}: {text}")


def _done(folder: Path, own: str) -> list[list[int]]:
    """Attacks whose results are in files of this recipe, attack and victims. Raises InputError for files of another."""
    found: list[list[int]] = []
    for path in sorted(folder.glob("attacks-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads((file.metadata() or {})["meta"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise StorageError(f"{path} cannot be read ({error}): remove it, and its attacks run again.") from error
        if meta["mark"] != own:
            raise StorageError(f"{path} is of another recipe: remove {path.parent}, or choose another --out.")
        found += meta["attacks"]
    return found


def collect(run: Run, cell: Cell) -> None:
    """Read a cell's results from the files of whoever computed them."""
    source = cell.twin or cell
    results, errors, own = [], {}, mark(run, source)
    if source.failure:
        cell.reconstructions = failures(cell, source.failure)
        starts = [(o, s) for o in range(len(cell.victims.rows)) for s in range(getattr(cell.attack, "restarts", 1))]
        common = {"iterations": 0, "status": "failed", "error": source.failure, "loss": math.inf, "fit": math.inf, "seconds": 0.0, "mark": own[:16]}
        cell.attempts = [{"observation": observation, "start": start, **common} for observation, start in starts]
        return
    for path in sorted(source.folder.glob("attacks-*.safetensors")):
        tensors, meta = load_marked(path, own)
        results.append(tensors)
        here = {tuple(map(int, key.split(","))): text for key, text in meta["errors"].items()}
        errors |= here
        cell.seconds += meta["seconds"] if cell.twin is None else 0.0
        for row, (observation, start) in enumerate(tensors["attacks"].tolist()):
            status, error = attacks.outcome({name: tensor[row] for name, tensor in tensors.items()}, here.get((observation, start), ""))
            cell.attempts.append({
                "observation": observation, "start": start, "iterations": int(tensors["iterations"][row]), "status": status,
                "error": error, "loss": float(tensors["loss"][row]), "fit": float(tensors["fit"][row]), "seconds": meta["seconds"] / len(tensors["attacks"]),
                "mark": own[:16],
            })  # fmt: skip
    choose_by = getattr(cell.attack, "choose_by", "objective")
    cell.reconstructions = attacks.select(results, len(cell.victims.rows), choose_by=choose_by, errors=errors)


def load_marked(path: Path, own: str, device: torch.device | str = "cpu") -> tuple[Tensors, dict[str, Any]]:
    """A task's result file, which must be of this recipe, victims and attack. Raises StorageError if it is not; Unfit if the task failed."""
    tensors, meta = load_file(path, device)
    if meta["mark"] != own:
        raise StorageError(f"{path} is of another recipe: remove {path.parent}, or choose another --out.")
    if meta.get("unfit"):
        raise Unfit(meta["unfit"])
    return tensors, meta


def failures(cell: Cell, error: str, victims: Sequence[int] | None = None) -> list[Reconstruction]:
    """A failure, mid-grey, for each of a cell's observations, or for some, with the labels that its threat model grants (zeros where it grants none). Of a
    sum over clients, for everybody's images."""
    granted = getattr(cell.attack, "labels", "known") == "known"
    some = range(len(cell.victims.rows)) if victims is None else victims
    return [
        Reconstruction(
            torch.full((len(labels), *images.shape[1:]), 0.5), (labels if granted else torch.zeros_like(labels)).cpu(), math.inf, torch.tensor([math.inf]), status="failed", error=error
        )
        for images, labels in ((cell.victims.images[victim], cell.victims.all_labels(victim)) for victim in some)
    ]  # fmt: skip


def sound(found: list[Reconstruction]) -> list[Reconstruction]:
    """The same, with failures, mid-grey, in place of images that are not finite, as a network gives them whose training diverged."""
    said = {"status": "failed", "error": "what was reconstructed is not finite", "loss": torch.inf}
    return [one if one.images.isfinite().all() else dataclasses.replace(one, images=torch.full_like(one.images, 0.5), **said) for one in found]


# --- calibration ---------------------------------------------------------------------------------------------------------


def _calibrated(run: Run, cell: Cell, plan: methods.Plan, programs: attacks.Programs, left: int, folder: Path) -> attacks.Calibration:
    """Mode and size of the programs: as asked for, from an earlier life of the run, or measured by rank 0 and told to all."""
    speed = run.recipe.speed
    asked_modes = [speed.attack_mode] if speed.attack_mode != "auto" else None
    if asked_modes and speed.attacks_at_once:
        return attacks.Calibration(asked_modes[0], speed.attacks_at_once, ())
    found, measured = None, False
    if run.leads:
        path = folder / "calibration.json"
        kept = parity.kept(path)
        key = _key(run, cell, plan)
        if measured := key not in kept:
            kept[key] = _measure(run, cell, plan, programs, left, asked_modes).to_json()
            write_atomically(path, (json.dumps(kept, indent=1) + "\n").encode())
        found = kept[key]
    found, measured = run.world.broadcast_json([found, measured])
    calibration = attacks.Calibration.from_json(found)
    for line in calibration.lines() if measured and len(calibration.candidates) > 1 else []:
        run.console.say(f"  {line}")
    return calibration


def _measure(run: Run, cell: Cell, plan: methods.Plan, programs: attacks.Programs, left: int, modes: list[str] | None) -> attacks.Calibration:
    """A first look, and the whole calibration where it can pay for itself."""
    speed, workers, matching = run.recipe.speed, build.num_workers(run.recipe, run.world) * run.world.size, plan.matching
    common = {
        "seed": cell.seed, "device": run.world.device, "programs": programs, "workers": workers, "attacks": left, "precision": speed.attack_precision,
    }  # fmt: skip
    share = max(1, -(-left // workers))
    size = speed.attacks_at_once or min(8, share)
    simulate = plan.make_simulate()
    if run.world.device.type == "cpu":
        common["memory_bytes"] = attacks.free_bytes(run.world.device, build.num_workers(run.recipe, run.world) * _ranks_here(run))
    try:
        if size > 1 and not speed.attacks_at_once and run.world.device.type == "cpu":  # where memory runs out there, the process is killed: one tells what eight take
            one = attacks.calibrate(plan.observations, simulate, matching, modes=modes or ("vmap",), at_once=1, iterations=1, **common)
            size = min(size, attacks.fitting(one.candidates[0], common["memory_bytes"]))
        first = attacks.calibrate(plan.observations, simulate, matching, modes=modes or ("vmap",), at_once=size, iterations=1, **common)
        seconds = first.candidates[0].ms * 1e-3 * share * matching.evaluations()
    except Exception:  # not vectorisable: a loop may do
        first, seconds = None, float("inf")
    if first is not None and seconds < SHORT_S:
        return first
    candidates = modes or ["vmap", "loop", "traced", *(["compiled"] if speed.compile else [])]
    try:
        return attacks.calibrate(
            plan.observations, simulate, matching, modes=candidates, at_once=speed.attacks_at_once or None, budget_s=min(60.0, 0.1 * seconds),
            measured=first.candidates if first is not None else (), **common,
        )  # fmt: skip
    except Exception as error:  # the attacks will say so themselves, each in its row
        run.console.notice(f"{cell.label}: no program could be measured: {worded(error)}")
        return attacks.Calibration(candidates[0] if modes else "loop", 1, ())


def _ranks_here(run: Run) -> int:
    """Ranks on this machine, as the launcher says; all of them if it does not."""
    said = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0].partition(",")[0]
    return min(int(said), run.world.size) if said.isdecimal() and int(said) > 0 else run.world.size


def _key(run: Run, cell: Cell, plan: methods.Plan) -> str:
    """What the best size depends on: the attack, the client that it simulates, how many images, the shapes of what it runs on, the machine's share."""
    first, world, speed = plan.observations[0], run.world, run.recipe.speed
    shapes = [sorted((name, tuple(tensor.shape)) for name, tensor in tensors.items()) for tensors in (first.params, first.update, first.known)]
    searched = sorted((name, tuple(one.shape)) for name, one in plan.matching.searched.items())
    parts = [
        config.to_json(cell.attack), _simulated(run, cell), first.num_examples, shapes, searched, plan.matching.noise_shape, len(plan.observations), world.size,
        str(world.device), speed.attack_mode, speed.attacks_at_once, speed.compile, speed.attack_precision, build.num_workers(run.recipe, world), speed.threads,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _simulated(run: Run, cell: Cell) -> list[Any]:
    """What of a client an attack may simulate beside its pass: the terms of its loss, its local steps, what it does to images and updates."""
    attack, defence, evaluation = cell.attack, cell.trained.training.defence, run.recipe.evaluation
    found = [str(type(defence)), evaluation.release, evaluation.local_steps, evaluation.local_epochs, evaluation.local_optimiser]
    terms = observe.terms(run, cell.trained, attack, progress=cell.snapshot.progress)
    if terms != "utility" and not defence.cross_entropy_alone(cell.snapshot.progress):
        settings = getattr(defence, "settings", None)  # a term costs the same at any weight but nought
        own = {spec.name: getattr(settings, spec.name) for spec in dataclasses.fields(settings)} if dataclasses.is_dataclass(settings) else {}
        found += [terms, {name: value if isinstance(value, str) else bool(value) for name, value in own.items()}]
    if observe.adapts(attack):
        found += [str(type(one)) for one in (*defence.transforms, *defence.encoders)]
    return found
