"""`main(RECIPE)`: the last line of every recipe. Parses and checks before anything heavy is imported or any process group starts."""

import os
import sys
import time
from pathlib import Path

from gidef.config import Recipe, problems

ERROR = 2
"""Exit status of a run that bad input ended."""


def main(recipe: Recipe, *, name: str | None = None, args: list[str] | None = None) -> None:
    """Run a recipe, with overrides from the command line; exits with status 2 and one message on bad input.

    Args:
        recipe: the declarations.  name: of the run's folder and title; the recipe's file name by default.
        args:   the command line, sys.argv[1:] by default.

    Does nothing when the calling recipe is imported rather than run, so that recipes can be read from other code.
    """
    caller = sys._getframe(1).f_globals
    if args is None and caller.get("__name__") != "__main__":
        return
    name = name or Path(caller.get("__file__", "recipe")).stem
    args = sys.argv[1:] if args is None else args
    # the deepspeed launcher adds --local_rank, torch.distributed.launch --local-rank; the environment says the same
    args = [arg for arg in args if not arg.startswith(("--local_rank", "--local-rank"))]
    recipe = parse(recipe, args, name)
    found = problems(recipe)
    if found:
        fail("\n".join(found))
    if recipe.out is None and recipe.resume:
        fail("--resume continues the run in --out: give its folder, e.g. --out runs/a.")

    from gidef.errors import InputError
    from gidef.job import run_recipe

    try:
        run_recipe(recipe, name)
    except InputError as error:
        fail(str(error), everywhere=True)


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
