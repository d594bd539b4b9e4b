"""`main(RECIPE)` or `sweep(RECIPES)`: the last line of every recipe. Parses and checks before anything heavy is imported or any process group starts."""

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gidef.config import Recipe, problems
from gidef.restart import began
from gidef.stopping import leave_on_sigterm

ERROR = 2
"""Exit status of a run that bad input ended."""


def main(recipe: Recipe, *, small: Recipe | None = None, name: str | None = None, args: list[str] | None = None) -> None:
    """Run a recipe, with overrides from the command line; exits with status 2 and one message on bad input.

    --part I/N runs the I-th of N shares of its defences and seeds, I from 0, which an array job gives each of its tasks: parts share --out, each has a
    folder of its own there, and the last one to end joins them to the run that one job would have made (see gidef.parts).

    Args:
        recipe: the declarations.  small: what the flag --small runs instead: all of it, in minutes on two cores.
        name:   of the run's folder and title; the recipe's file name by default.
        args:   the command line, sys.argv[1:] by default.

    Does nothing when the calling recipe is imported rather than run, so that recipes can be read from other code.
    """
    caller = sys._getframe(1).f_globals
    if args is None and caller.get("__name__") != "__main__":
        return
    name = name or Path(caller.get("__file__", "recipe")).stem
    with ending():
        recipe, args = _sized(recipe, small, _arguments(args))
        ranks, args = _rehearsed(args)
        part, args = _parted(args)
        recipe = parse(recipe, args, name)
        if part is None:
            _run(_checked(recipe), name, ranks)
        elif ranks:
            fail("--dry-run forecasts the whole recipe: leave out --part, or name some defences with --only.")
        else:
            _run_part(recipe, name, part)


def sweep(recipes: Mapping[str, Recipe], *, small: Mapping[str, Recipe] | None = None, name: str | None = None, args: list[str] | None = None) -> None:
    """Run several recipes by name, one after another, each in a folder of its own under --out, and a page over all of them, `report.html`,
    with their joined table and trade-off beside it (`gidef.report.joined`).

    The command line's overrides hold for each. --rows NAME... runs only these; --part I/N the I-th of N shares, I from 0, which an array
    job gives each of its tasks; parts share --out, and the last one to end writes the page over all that is there. With --resume, rows
    that have ended are left as they are.

    Args:    recipes: the rows.  small: of --small, with the same or fewer rows.  name, args: as in `main`.
    """
    caller = sys._getframe(1).f_globals
    if args is None and caller.get("__name__") != "__main__":
        return
    name = name or Path(caller.get("__file__", "sweep")).stem
    with ending():
        _sweep(recipes, small, name, _arguments(args))


def _sweep(recipes: Mapping[str, Recipe], small: Mapping[str, Recipe] | None, name: str, args: list[str]) -> None:
    recipes, args = _sized(recipes, small, args)
    rows, part, args = _which(dict(recipes), args)
    ranks, args = _rehearsed(args)
    parsed = {row: parse(recipe, args, name) for row, recipe in recipes.items()}
    base = _shared(next(iter(parsed.values())).out, name)
    if ranks:
        for row in rows:
            _run(_checked(dataclasses.replace(parsed[row], out=str(base / row)), resuming=True), f"{name} {row}", ranks)
        return
    if next(iter(parsed.values())).out is None and (part is not None or launched()):
        _need_shared("a sweep in parts or on several ranks")
    wanted = {row: _checked(dataclasses.replace(parsed[row], out=str(base / row)), resuming=True) for row in rows}
    for row, recipe in wanted.items():
        if (base / row / "results.json").exists():
            if not recipe.resume and not began(base / row):
                fail(f"{base / row} holds results already: continue with --resume, or choose another --out.")
            continue
        _run(dataclasses.replace(recipe, resume=recipe.resume and (base / row / "recipe.json").exists()), f"{name} {row}")
    ended = [base / row for row in recipes if (base / row / "results.json").exists()]
    if speaks() and ended:
        from gidef.report import joined

        page, *others = joined.write(ended, into=base)
        print(f"page     {page}, over {len(ended)} of {len(recipes)} rows; {', '.join(path.name for path in others)} beside it", flush=True)


def _run_part(recipe: Recipe, name: str, part: tuple[int, int]) -> None:
    if recipe.out is None:
        _need_shared("a run in parts")
    recipe, out = _checked(recipe, resuming=True), _shared(recipe.out, name)
    leave_on_sigterm(None)  # before the seconds that the imports take
    from gidef.parts import run_part

    run_part(recipe, name, out, part, leads=speaks())


def _shared(out: str | None, name: str) -> Path:
    """The folder of several runs, or of a run's parts."""
    return Path(out or Path("runs") / name / (os.environ.get("SLURM_ARRAY_JOB_ID") or time.strftime("%Y-%m-%d-%H%M%S")))


def _need_shared(what: str) -> None:
    if "SLURM_ARRAY_JOB_ID" not in os.environ:
        fail(f"{what} needs --out, the folder that they share, e.g. --out runs/a.")


def _arguments(args: list[str] | None) -> list[str]:
    """The command line, --threads under its full name, without what launchers add: deepspeed --local_rank, torch.distributed.launch
    --local-rank; the environment says the same."""
    given = [arg for arg in (sys.argv[1:] if args is None else args) if not arg.startswith(("--local_rank", "--local-rank"))]
    return [f"--speed.{arg[2:]}" if arg.partition("=")[0] == "--threads" else arg for arg in given]


def _sized(full: Any, small: Any, args: list[str]) -> tuple[Any, list[str]]:
    """What is run, and the other arguments."""
    if "--small" not in args:
        return full, args
    if small is None:
        fail("--small: this recipe has no small form; lower --rounds.count, --evaluation.num-victims and its attacks' iterations (--attacks.NAME.iterations) instead.")
    return small, [arg for arg in args if arg != "--small"]


def _rehearsed(args: list[str]) -> tuple[int, list[str]]:
    """Ranks of a --dry-run, 0 without one, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", nargs="?", const="1")
    parser.add_argument("--ranks")
    own, rest = parser.parse_known_args(args)
    if own.dry_run is None:
        if own.ranks is not None:
            fail("--ranks is of --dry-run: a launcher says how many ranks a run has, e.g. torchrun --nproc-per-node 4.")
        return 0, rest
    asked = own.ranks or own.dry_run
    if not asked.isdigit() or int(asked) < 1:
        fail(f"--dry-run {asked}: expected a number of ranks, e.g. --dry-run 8.")
    return int(asked), rest


def _which(recipes: dict[str, Recipe], args: list[str]) -> tuple[list[str], tuple[int, int] | None, list[str]]:
    """Rows to run, the part of how many, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--rows", nargs="*", default=list(recipes))
    own, rest = parser.parse_known_args(args)
    part, rest = _parted(rest)
    unknown = [row for row in own.rows if row not in recipes]
    if unknown or not own.rows:
        fail(f"--rows {' '.join(unknown)}: choose of {', '.join(recipes)}.")
    return own.rows if part is None else own.rows[part[0] :: part[1]], part, rest


def _parted(args: list[str]) -> tuple[tuple[int, int] | None, list[str]]:
    """The part of how many, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--part", nargs="?", const="")
    own, rest = parser.parse_known_args(args)
    return None if own.part is None else share(own.part), rest


def share(part: str) -> tuple[int, int]:
    """I and N of a --part I/N."""
    number, _, of = part.partition("/")
    if not (number.isdigit() and of.isdigit() and int(number) < int(of)):
        fail(f"--part {part}: expected I/N with I from 0 to N - 1, e.g. --part 0/4.")
    return int(number), int(of)


def _checked(recipe: Recipe, *, resuming: bool = False) -> Recipe:
    found = problems(recipe)
    if found:
        fail("\n".join(found))
    if recipe.out is None and recipe.resume and not resuming:
        fail("--resume continues the run in --out: give its folder, e.g. --out runs/a.")
    return recipe


def _run(recipe: Recipe, name: str, ranks: int = 0) -> None:
    """ranks: only tell what the run would do on so many."""
    leave_on_sigterm(recipe.out)  # before the seconds that the imports take
    if ranks:
        from gidef.dryrun import rehearse

        rehearse(recipe, name, ranks)
    else:
        from gidef.job import run_recipe

        run_recipe(recipe, name)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """How a run ends that does not end well.

    Bad input: one message, status 2. A failure of another rank: a summary by one of the ranks that are left, with the last lines of
    the first that failed, status 1 (2 if it was bad input). SIGTERM: at once, whatever worker threads still compute; Ctrl-C: likewise, with one
    message and status 130. Under torchrun an error also goes into the launcher's closing message.
    """
    from gidef.errors import InputError, RankFailure

    try:
        yield
    except InputError as error:
        _tell_launcher(error)
        fail(str(error), everywhere=True)
    except RankFailure as error:
        rank, first = _rank(), min(set(range(len(error.ranks) + 1)) - set(error.ranks))
        if rank == first:
            print(f"gidef: the run ended, because {error}", file=sys.stderr)
            if error.lines:
                print(f"gidef: its last lines{f' (all of them: {error.log})' if error.log else ''}:", file=sys.stderr)
                print("\n".join(f"    {line.rstrip()}" for line in error.lines), file=sys.stderr)
            print("gidef: what was saved is whole: --resume goes on from it.", file=sys.stderr, flush=True)
        sys.exit(ERROR if error.bad_input else 1)
    except SystemExit as error:
        if error.code != 128 + signal.SIGTERM:
            raise
        _leave(error.code)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C does not wait
        if speaks():
            print("gidef: interrupted. What was saved is whole: --resume goes on from it.", file=sys.stderr, flush=True)
        _leave(128 + signal.SIGINT)
    except Exception as error:
        _tell_launcher(error)
        raise


def _leave(code: int) -> None:
    deadline = time.monotonic() + GRACE_S
    for thread in threading.enumerate():  # the interpreter itself would wait for them without end
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


GRACE_S = 5.0
"""After a signal, worker threads may save what they have for so long; attack chunks look at a flag."""


def _tell_launcher(error: Exception) -> None:
    """torchrun prints the first failure of all its workers when it exits, if they write it down for it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _rank() -> int:
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdigit() else 0


def parse(recipe: Recipe, args: list[str], name: str) -> Recipe:
    """The recipe with the command line's overrides; tyro prints and exits on unknown fields and wrong types."""
    import tyro

    silent = not speaks()
    if silent:  # one rank prints the help or the error
        stdout, stderr = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        return tyro.cli(Recipe, default=recipe, args=args, prog=f"{name}.py", config=(tyro.conf.AvoidSubcommands,))
    except SystemExit:
        if silent:
            time.sleep(1.0)  # as in `fail`
        raise
    finally:
        if silent:
            sys.stdout.close()
            sys.stdout, sys.stderr = stdout, stderr


def launched() -> bool:
    """Whether a launcher started several ranks, as far as the environment says."""
    return os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1"


def speaks() -> bool:
    """Whether this process is rank 0, as far as the environment says."""
    rank = os.environ.get("RANK")
    if rank is None and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        rank = os.environ.get("SLURM_PROCID")
    return not (rank or "0").isdigit() or int(rank or 0) == 0  # nonsense is refused later, by open_world, which must be heard


def fail(message: str, *, everywhere: bool = False) -> None:
    """One clear error from one rank, and a non-zero exit. everywhere: it may be this rank's alone, so if no launcher ends it, it speaks too."""
    if speaks():
        print(f"gidef: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(1.0)  # so that a launcher that kills all ranks at the first exit lets rank 0 speak
        if everywhere:
            print(f"gidef: rank {os.environ.get('RANK') or os.environ.get('SLURM_PROCID')}: {message}", file=sys.stderr, flush=True)
    sys.exit(ERROR)
