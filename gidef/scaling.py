"""Strong and weak scaling of training and attacks over ranks: `scale(RECIPE)` as the last line of a recipe."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import logging
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from gidef.config import Recipe
from gidef.main import _arguments, _checked, _rehearsed, _run, _sized, ending, fail, parse, speaks

MODES = ("strong", "weak")


def scale(recipe: Recipe, *, small: Recipe | None = None, ranks: tuple[int, ...] = (1, 2, 4, 8)) -> None:
    """Run a recipe on each number of ranks, twice, and draw how much faster more ranks are.

    Strong: the recipe as it is. Weak: its cohort and victims times N / max N on N ranks, so that both are the same run on the most ranks.
    Started by python, it starts torchrun for each number in --ranks. Started by a launcher (torchrun, srun), it measures
    that launcher's number of ranks, and draws what is there so far: start it once for each number, with the same --ranks and --out.

    Into --out: scaling.csv, training.png and attacks.png, each with the ideal line and the bound Σt / max t of the strong run's own
    times of clients or attack chunks, and a run's folder for each row. Rows that have ended are not run again. A run that fails ends everything,
    with its own message and status. `--dry-run N` tells what the strong run would do on N ranks (default: the most).
    """
    caller = sys._getframe(1).f_globals
    if caller.get("__name__") != "__main__":
        return
    with ending():
        _scale(recipe, small, ranks, caller["__file__"])


def _scale(recipe: Recipe, small: Recipe | None, ranks: tuple[int, ...], script: str) -> None:
    name = Path(script).stem
    recipe, args = _sized(recipe, small, _arguments(None))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(ranks))
    parser.add_argument("--dry-run", nargs="?", const="")
    own, rest = parser.parse_known_args(args)
    most, parsed = max(own.ranks), parse(recipe, rest, name)
    if min(own.ranks) < 1:
        fail(f"--ranks {' '.join(map(str, own.ranks))}: every number must be at least 1.")
    cohort = parsed.cohort
    if cohort % most or parsed.evaluation.num_victims % most:
        fail(f"a cohort of {cohort} and {parsed.evaluation.num_victims} victims do not divide by {most} ranks: change them, or --ranks.")
    if own.dry_run is not None:
        rehearsed, _ = _rehearsed(["--dry-run", own.dry_run or str(most)])
        return _run(_checked(_sized_for(parsed, "strong", most, most)), f"{name} strong", rehearsed)
    out = Path(parsed.out or Path("runs") / name / (os.environ.get("SLURM_JOB_ID") or time.strftime("%Y-%m-%d-%H%M%S")))
    size = _launched()
    if size is None:
        for count in own.ranks:
            _torchrun(script, count, [*_arguments(None), *([] if parsed.out else ["--out", str(out)])])
    elif parsed.out is None and "SLURM_JOB_ID" not in os.environ:
        fail("on ranks that a launcher started, give --out, the folder in which the numbers of ranks meet.")
    else:
        for mode in MODES:
            folder = _folder(out, mode, size, most)
            if not (folder / "results.json").exists():
                if speaks() and folder.exists():
                    shutil.rmtree(folder)  # of a run that did not end: its times would lack a part
                _run(_checked(dataclasses.replace(_sized_for(parsed, mode, size, most), out=str(folder))), f"{name} {mode} {size}")
    if size is None or speaks():
        _report(out, most)


def _launched() -> int | None:
    """How many ranks a launcher started, or None without one."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    size = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return size if size > 1 else None


def _torchrun(script: str, count: int, args: list[str]) -> None:
    """As torchrun does, but a failure ends this process with the failed rank's status and no word: the ranks have said what there is to say."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for variable in [variable for variable in os.environ if variable.startswith("SLURM_STEP")]:
        del os.environ[variable]  # else a single rank would take itself for one of the step's
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.disable(logging.ERROR)
    try:
        run(parse_args(["--standalone", f"--nproc-per-node={count}", script, *args]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    finally:
        logging.disable(logging.NOTSET)


def _sized_for(recipe: Recipe, mode: str, ranks: int, most: int) -> Recipe:
    """Work for so many ranks; one worker each, so that ranks alone share it."""
    cohort, victims = recipe.cohort, recipe.evaluation.num_victims
    if mode == "weak":
        cohort, victims = cohort * ranks // most, victims * ranks // most
    return dataclasses.replace(
        recipe, rounds=dataclasses.replace(recipe.rounds, cohort_size=cohort, cohort_share=None), evaluation=dataclasses.replace(recipe.evaluation, num_victims=victims),
        speed=dataclasses.replace(recipe.speed, workers=1),
    )  # fmt: skip


def _folder(out: Path, mode: str, ranks: int, most: int) -> Path:
    return out / f"{'strong' if ranks == most else mode}-{ranks}"


def row(folder: Path, mode: str, ranks: int) -> dict[str, Any]:
    """What a run's record says: seconds of a round (median, without the first) and of all attacks, and Σt / max t of clients and of attack chunks."""
    from gidef.report import read

    lines = read(folder / "record.jsonl")
    ends = [line["seconds"] for line in lines if line["kind"] == "round"]
    lasted = [after - before for before, after in zip(ends, ends[1:], strict=False)] or ends
    times = [one["median"] for line in lines if line["kind"] == "trained" for one in line["client_seconds"].values()]
    cohort = next(line["cohort"] for line in lines if line["kind"] == "round")
    matched = next(line for line in lines if line["kind"] == "matched")
    return {
        "mode": mode, "ranks": ranks, "cohort": cohort, "round_s": statistics.median(lasted),
        "clients_useful": min(cohort, cohort * statistics.fmean(times) / max(times)),
        "chunks": len(matched["chunk_seconds"]), "attacks_s": matched["seconds"], "chunks_useful": sum(matched["chunk_seconds"]) / max(matched["chunk_seconds"]),
    }  # fmt: skip


def speedups(rows: list[dict[str, Any]], field: str) -> dict[str, dict[int, float]]:
    """Per mode: ranks → T(1)/T(N), times N where the work grew with the ranks. Modes without a run on one rank are left out."""
    found: dict[str, dict[int, float]] = {}
    for mode in MODES:
        here = {one["ranks"]: one[field] for one in rows if one["mode"] == mode}
        if 1 in here:
            found[mode] = {ranks: here[1] / seconds * (ranks if mode == "weak" else 1) for ranks, seconds in sorted(here.items())}
    return found


def _report(out: Path, most: int) -> None:
    from gidef.report import Console
    from gidef.report.files import write_atomically
    from gidef.report.pictures import scaling_curves

    counts = sorted({int(path.parent.name.split("-")[1]) for path in out.glob("*-*/results.json")})
    rows = [row(_folder(out, mode, n, most), mode, n) for mode in MODES for n in counts if (_folder(out, mode, n, most) / "results.json").exists()]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / "scaling.csv", text.getvalue().encode())
    with Console() as console:
        console.heading("Scaling")
        console.say("mode    ranks  cohort    round s  useful ranks  chunks  attacks s  useful ranks")
        for one in rows:
            console.say(
                f"{one['mode']:6}  {one['ranks']:>5}  {one['cohort']:>6}  {one['round_s']:>9.3g}  {one['clients_useful']:>12.1f}  {one['chunks']:>6}  "
                f"{one['attacks_s']:>9.3g}  {one['chunks_useful']:>12.1f}"
            )
        strong = {one["ranks"]: one for one in rows if one["mode"] == "strong"}
        for what, field, useful, longest in (("training", "round_s", "clients_useful", "client"), ("attacks", "attacks_s", "chunks_useful", "chunk of attacks")):
            found = speedups(rows, field)
            shared = [n for n in counts if n in strong and all(n in one for one in found.values())]
            if not found or not shared:
                console.notice(f"{what}: no picture, as the run on one rank is missing.")
                continue
            curves = {f"{mode} scaling": [one[n] for n in shared] for mode, one in found.items()}
            bound = [min(n, strong[n][useful]) for n in shared]
            scaling_curves(out / f"{what}.png", shared, curves, ideal=shared, bound=bound, title=f"Scaling of {what}", longest=longest)
            console.say(f"picture  {out / f'{what}.png'}")
        console.say(f"table    {out / 'scaling.csv'}")
