"""One recipe in several jobs: each trains and attacks its share of the defences and seeds in a folder of its own, and the last one to end joins them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from gidef import audit, build, config, copies, job, restart, strengths, tuning
from gidef.errors import InputError, StorageError
from gidef.parallel import open_world, seated
from gidef.report import Console, Record, read, results
from gidef.report.files import held, write_atomically, writing
from gidef.runs import Run, fingerprint, run_key
from gidef.training import reload

FOLDER = "parts"
"""In the run's folder: those of its parts."""
RESULTS = "results.json"
KEPT = ("start", "round", "trained", "failed", "tuned")
"""Lines of the parts' records that the whole run's takes over; those of attacks are written anew."""


def folder_of(out: Path, number: int, count: int) -> Path:
    return out / FOLDER / f"{number}-of-{count}"


def run_part(recipe: config.Recipe, name: str, out: Path, part: tuple[int, int], *, leads: bool) -> None:
    """Run a part in its folder under `out`, or leave it as it is with --resume if it has ended; then rank 0 joins the parts if all have ended.

    leads: whether this is rank 0.  Raises: InputError where `out` or the part's folder holds a run that is not to be continued.
    """
    number, count = part
    folder = folder_of(out, number, count)
    going_on = recipe.resume or restart.began(folder) is not None
    held_already = [place for place, file in ((out, RESULTS), (folder, RESULTS), (out, job.RECIPE)) if (place / file).exists()]
    if held_already and not going_on:
        raise InputError(f"{held_already[0]} holds a run already: continue it with --resume, or choose another --out.")
    if (out / RESULTS).exists():
        _say(f"{out} holds the whole run already.", leads)
        return
    if not tuning.shares(recipe, count)[number]:
        _say(f"part {number} of {count} is empty: there are fewer defences and seeds than parts.", leads)
    elif folder not in held_already:
        resume = recipe.resume and (folder / job.RECIPE).exists()
        job.run_recipe(dataclasses.replace(recipe, out=str(folder), resume=resume), name, part=part)
    if leads:
        join(recipe, name, out, count)


def join(recipe: config.Recipe, name: str, out: Path, count: int) -> bool:
    """Make the run in `out` of its parts once all have ended: the files that one job would have left there, which are linked, and its tables, pictures and page.

    Nothing is trained or attacked again: reconstructions are scored and pooled over seeds as in a run by one job, so that rows are the same.

    Returns: whether there is a whole run now.
    Raises:  InputError for parts of another recipe, other data, or damaged ones, and, once all is reported, where every training of every part diverged.
    """
    shares = {number: share for number, share in enumerate(tuning.shares(recipe, count)) if share}
    folders = {number: folder_of(out, number, count) for number in shares}
    ended = [number for number, folder in folders.items() if (folder / RESULTS).exists()]
    if len(ended) < len(folders):
        _say(f"{len(ended)} of {len(folders)} parts in {out} have ended; the last one joins them.")
        return False
    try:
        with held(out):
            if not (out / RESULTS).exists():
                _join(recipe, name, out, {number: (folders[number], shares[number]) for number in shares})
    except StorageError as error:
        if "another process is writing" not in str(error):
            raise
        _say(f"another part joins those in {out}.")
        return False
    _say(f"the {len(folders)} parts are joined: {out / 'report.html'}")
    return True


def _join(recipe: config.Recipe, name: str, out: Path, parts: dict[int, tuple[Path, list[tuple[str, int]]]]) -> None:
    began = time.perf_counter()
    told = [results.load(folder / RESULTS) for folder, _ in parts.values()]
    for folder, _ in parts.values():
        if _science(folder) != config.science(recipe):
            raise InputError(f"{folder} was run with another recipe than the one that joins: run that part with the same scientific fields, or choose another --out.")
    every = {place for _, share in parts.values() for place in share}
    lines: list[dict[str, Any]] = []
    for folder, share in parts.values():
        _link(folder, out, [*share, *((recipe.evaluation.named(key, one), seed) for key, seed in share for one in recipe.evaluation.strengths if one != 1)])
        foreign = every - set(share)  # an undefended net that a search measured itself by
        lines += [line for line in read(folder / "record.jsonl") if line["kind"] in KEPT and (line.get("defence"), line.get("seed")) not in foreign]
    tuned = {key: value for content in told for key, value in (content.get("tuned") or {}).items()}
    if tuned:
        write_atomically(out / tuning.FILE, (json.dumps(tuned, indent=1) + "\n").encode())
    order = [(key, seed) for key in recipe.chosen for seed in recipe.seeds]
    tuning.save_failed(out, sorted((one for content in told for one in content.get("failed") or []), key=lambda one: order.index((one["defence"], one["seed"]))))
    write_atomically(out / "record.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    recipe = dataclasses.replace(recipe, out=str(out), resume=True)
    job.write_recipe(recipe, name, out)
    with (
        open_world(recipe.speed.device, init_method="alone") as world,  # this rank by itself: the others have left
        Record(out / "record.jsonl") as record,
        Console(log=out / "log.txt") as console,
    ):
        job.settle_threads(recipe)
        world = seated(world)
        said: list[str] = []
        setting = build.load_setting(recipe, world=world, notice=said.append, folder=out)
        run = Run(setting, world, out, console, record, fingerprint(recipe, setting.dataset))
        console.heading(f"{name}: {len(parts)} parts joined")
        for note in dict.fromkeys([*said, *setting.dataset.notes]):
            console.notice(note)
        defences, _, failed = tuning.resolved(run)
        nets = copies.check(run, {key: one for (key, _), one in defences.items()}, out / copies.FILE)
        trained = {(key, seed): reload(run, key, defence, seed) for (key, seed), defence in defences.items()}
        attacked = strengths.evaluated(run, trained)
        found = audit.audit(run, attacked, folder=out / "attacks")
        seconds = sum(content["seconds"]["total"] for content in told) + time.perf_counter() - began
        content = job.describe(run, name, trained | attacked, found, tuned, nets, failed, seconds=seconds)
        _calibrated(content["rows"], told)
        job.publish(content, out, console)
        run.append("end", seconds=seconds)
    job.check_any(trained, failed)


def _science(folder: Path) -> str:
    """Of a part's recipe as it was run: results.json has no infinity, which a Dirichlet's alpha may be."""
    path = folder / job.RECIPE
    try:
        return config.science(json.loads(path.read_text())["recipe"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read: {error}. Restore it, or run that part again in another --out.") from error


def _link(folder: Path, out: Path, share: list[tuple[str, int]]) -> None:
    """A part's models, snapshots, private states and reconstructions of its share, and what the evaluator trained, in the whole run's folder."""
    kept = [path for pattern in ("attacks/judge-*", "pictures/partition.png") for path in sorted(folder.glob(pattern))]
    for key in (run_key(*place) for place in share):
        kept += filter(Path.exists, [folder / "models" / f"{key}.safetensors"])  # a strength of the evaluation has none of its own
        kept += [path for room in ("snapshots", "clients", "attacks", "attacks/tuning") for path in sorted((folder / room / key).rglob("*")) if path.is_file()]
    for path in kept:
        target = out / path.relative_to(folder)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # of a join that was killed
            try:
                os.link(path, target)
            except OSError:  # no hard links here
                shutil.copyfile(path, target)


def _calibrated(rows: list[dict[str, Any]], told: list[dict[str, Any]]) -> None:
    """Rows say how their attacks ran as programs, as the parts that ran them do."""
    known = {(row["defence"], row["attack"], row["checkpoint"]): row["calibration"] for content in told for row in content["rows"] if "calibration" in row}
    for row in rows:
        if (place := (row["defence"], row["attack"], row["checkpoint"])) in known:
            row["calibration"] = known[place]


def _say(text: str, leads: bool = True) -> None:
    if leads:
        print(f"parts    {text}", flush=True)
