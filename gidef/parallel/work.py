"""Independent tasks, such as evaluation cells, over ranks and worker threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from gidef.errors import InputError
from gidef.parallel.plan import longest_first
from gidef.parallel.threads import run_on_threads
from gidef.parallel.world import World

Task = TypeVar("Task")


def run_tasks(
    world: World,
    tasks: Sequence[Task],
    costs: Sequence[float],
    do: Callable[[Task, int], None],
    *,
    workers: int = 1,
    threads: int = 1,
    name: Callable[[Task], str] = str,
    on_done: Callable[[Task], None] | None = None,
) -> None:
    """Run `do(task, worker)` once for each task, longest first over the ranks, then over each rank's worker threads.

    Results travel through files that `do` writes. A failing task does not stop the others. Returns on every rank
    after all tasks of all ranks ended, so whoever returns may read all files.

    Args:    tasks, costs: equal on all ranks (checked); costs at least 0, any unit.  do: worker is 0 ... workers − 1, one
             task at a time each; it computes with `threads` threads.  name: a task's name in messages.
             on_done: called in the main thread of the rank where the task ran, after it succeeded.
    Raises:  on every rank, InputError if the first failed task raised one (a full disk), else RuntimeError with the names of
             failed tasks and the first one's error; RuntimeError when the ranks' tasks differ.
             KeyboardInterrupt and SystemExit (a SIGTERM handler's) propagate from the rank that got them.
    """
    if len(costs) != len(tasks):
        raise ValueError(f"{len(tasks)} tasks but {len(costs)} costs")
    names = [name(task) for task in tasks]
    world.agree("the tasks and their costs", "\n".join(f"{name} {cost!r}" for name, cost in zip(names, costs, strict=True)))
    mine = longest_first(costs, world.size)[world.rank]
    raised = run_on_threads(
        lambda index, worker: do(tasks[index], worker),
        mine,
        workers=workers,
        threads=threads,
        device=world.device,
        on_done=None if on_done is None else lambda index: on_done(tasks[index]),
    )
    errors = {mine[index]: error for index, error in raised.items()}
    told = world.all_gather_json([[index, isinstance(error, InputError), f"{type(error).__name__}: {error}"] for index, error in errors.items()])
    failures = sorted([*failure, rank] for rank, part in enumerate(told) for failure in part)
    if failures:
        index, bad_input, text, rank = failures[0]
        if bad_input:
            raise InputError(f"{names[index]}: {text.removeprefix('InputError: ')}") from errors.get(index)
        failed = ", ".join(names[index] for index, *_ in failures)
        message = f"{len(failures)} of {len(tasks)} tasks failed: {failed}. First error, {names[index]} on rank {rank}: {text}"
        raise RuntimeError(message) from errors.get(index)
