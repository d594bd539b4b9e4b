"""The evaluation: release, fit, attack, score, draw.

Attackers get observations (see `observe`); the truth stays here. Work is cut into independent tasks with results in
files, so that ranks and threads share it out and a stopped run takes it up again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gidef import applications, build, config, findings, fits, tuned_attacks
from gidef.cells import Cell, Task, make_cells, not_applicable
from gidef.inversions import collect, in_groups, matching_tasks
from gidef.parallel import run_tasks
from gidef.releases import Releases
from gidef.runs import Run, Trained
from gidef.scores import Scorer


@dataclass(frozen=True, slots=True)
class Findings:
    """The parts of results.json that the evaluation fills; see the docstring of gidef.report."""

    rows: list[dict[str, Any]]
    bounds: list[dict[str, Any]]
    judge: dict[str, Any]
    pictures: list[str]
    seconds: dict[str, float]
    not_applicable: list[dict[str, Any]]


def audit(run: Run, trained: dict[tuple[str, int], Trained], *, folder: Path, pictures: Path | None = None) -> Findings:
    """Attack every cell, score it, draw it. Every rank calls this together; rank 0 gets the findings, the others empty ones."""
    pictures = pictures or run.folder / "pictures"
    tuned = tuned_attacks.choose(run, trained, folder=folder / "tuning", attack=_attack)
    cells, releases, idle = make_cells(run, trained, folder, tuned=tuned), Releases(run), not_applicable(run, trained)
    reasons = applications.without_closed_form(run, cells)
    closed = [cell for cell in cells if isinstance(cell.attack, config.Analytic) and cell.defence in reasons]
    idle += {(one.defence, one.name): {"defence": one.defence, "attack": one.name, "attack_id": one.attack_id, "reason": reasons[one.defence]} for one in closed}.values()
    cells = [cell for cell in cells if not any(cell is one for one in closed)]
    for cell in cells:  # all attacks of a defence, seed and checkpoint see the same updates
        cell.releases = releases.of(cell)
    judges = [(fits.judge_path(run, folder, one), one) for one in (None, *run.recipe.evaluation.judges)]
    seconds, chunks = _attack(run, cells, folder, also=[fits.judge_task(run, *one) for one in judges])
    run.append("matched", seconds=seconds, chunk_seconds=chunks)
    if not run.leads:
        return Findings([], [], {}, [], {}, idle)
    first, *more = (fits.load_judge(run, *one) for one in judges)
    scorer = Scorer(run, first, dict(zip(run.recipe.evaluation.judges, more, strict=True)))
    scored = {id(cell): scorer.score(cell.victims, cell.reconstructions) for cell in cells}
    for cell in cells:
        findings.record(run, cell, scored[id(cell)])
    rows = findings.rows(run, cells, scored)
    drawn = findings.draw(run, cells, scored, scorer, pictures) if cells else []
    seconds = {cell.label: cell.seconds for cell in cells}
    return Findings(rows, scorer.bounds() + findings.control_bounds(cells, scored), scorer.judge_record(), drawn, seconds, idle)


def _attack(run: Run, cells: list[Cell], folder: Path, *, also: Sequence[Task] = ()) -> tuple[float, list[float]]:
    """Attack cells that have their releases, and on rank 0 collect their reconstructions. also: tasks to do beside the fits.

    Returns: seconds of the matching attacks, and of each of their chunks.
    """
    own = [cell for cell in cells if cell.twin is None]
    _work(run, [*also, *fits.tasks(run, own, folder)], "fit judge and decoders: step")
    _work(run, fits.later_tasks(run, own), "fit what reads gradients: step")
    _work(run, applications.tasks(run, own), "attacks without matching: step")
    if run.world.mesh is not None:
        in_groups(run, [cell for cell in own if cell.matches], lambda cell: fits.fitted(run, cell, folder))
    matching = matching_tasks(run, [cell for cell in own if cell.matches], lambda cell: fits.fitted(run, cell, folder), folder)
    began = time.perf_counter()
    chunks = _work(run, matching, "attack: iteration")
    seconds = time.perf_counter() - began
    for cell in cells if run.leads else ():
        if cell.matches:
            collect(run, cell)
            cell.seconds += fits.reading_seconds(run, cell)
        elif isinstance(cell.attack, config.PostHocDecoder):
            fits.collect_decoded(run, cell)
        else:
            applications.collect(run, cell)
    return seconds, chunks


class _Stopped(BaseException):
    """Ends a task of a run that is over. No Exception: a task is not to take it for a failure of its own."""


def _work(run: Run, tasks: list[Task], label: str) -> list[float]:
    """Do the tasks over ranks and threads with one bar; finished ones (their file is there) are left as they are. Returns each one's seconds.

    What leaves early, as at a SIGTERM, stops the running tasks when they report next; they begin anew when the run is resumed.
    """
    names = run.world.broadcast_json([task.path.exists() for task in tasks])
    tasks = [task for task, there in zip(tasks, names, strict=True) if not there]
    if not tasks:
        return []
    total = sum(task.cost for task in tasks)
    lock, done, stop = threading.Lock(), 0.0, threading.Event()
    seconds: list[float] = []

    def do(task: Task, worker: int) -> None:
        began = time.perf_counter()
        task.do(worker, report)
        seconds.append(time.perf_counter() - began)

    share = max(1.0, total / run.world.size)  # this rank's part, for the time left
    with run.console.track(label, int(share)) as bar:

        def report(units: float) -> None:
            nonlocal done
            if stop.is_set():
                raise _Stopped
            with lock:
                done += units
                bar.update(int(min(done, share)))

        try:
            run_tasks(
                run.world, tasks, [task.cost for task in tasks], do,
                workers=build.num_workers(run.recipe, run.world), threads=run.recipe.speed.threads, name=lambda task: task.name,
                schedule=run.recipe.speed.schedule,
            )  # fmt: skip
        except BaseException:
            stop.set()
            raise
    return [one for part in run.world.all_gather_json(seconds) for one in part]

