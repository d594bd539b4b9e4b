"""Independent tasks, such as evaluation cells or chunks of attacks, over ranks and worker threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from gidef.errors import InputError
from gidef.parallel.plan import longest_first
from gidef.parallel.queue import Queue
from gidef.parallel.threads import run_on_threads
from gidef.parallel.world import World

Task = TypeVar("Task")

Schedule = Literal["longest_first", "static", "dynamic"]
SCHEDULES = ("longest_first", "static", "dynamic")


def run_tasks(
    world: World,
    tasks: Sequence[Task],
    costs: Sequence[float],
    do: Callable[[Task, int], None],
    *,
    schedule: Schedule = "longest_first",
    workers: int = 1,
    threads: int = 1,
    name: Callable[[Task], str] = str,
    on_done: Callable[[Task], None] | None = None,
) -> None:
    """Run `do(task, worker)` once for each task, over the ranks, then over each rank's worker threads.

    Results travel through files that `do` writes. A failing task does not stop the others. Returns on every rank
    after all tasks of all ranks ended, so whoever returns may read all files.

    Args:    tasks, costs: equal on all ranks (checked); costs at least 0, any unit.  do: worker is 0 ... workers − 1, one
             task at a time each; it computes with `threads` threads.  name: a task's name in messages.
             schedule: who does what; it moves no result. "longest_first": planned, each task, the costliest first, to the rank
             with the least work. "static": planned, every size-th task, whatever it costs. "dynamic": the costliest first, each
             to whichever worker of any rank is free next; for costs that are guesses and for ranks of unequal speed.
             on_done: called in the main thread of the rank where the task ran, after it succeeded.
    Raises:  on every rank, InputError if the first failed task raised one (a full disk), else RuntimeError with the names of
             failed tasks and the first one's error; RuntimeError when the ranks' tasks differ. InputError for an unknown schedule.
             KeyboardInterrupt and SystemExit (a SIGTERM handler's) propagate from the rank that got them.
    """
    if len(costs) != len(tasks):
        raise ValueError(f"{len(tasks)} tasks but {len(costs)} costs")
    if schedule not in SCHEDULES:
        raise InputError(f"schedule={schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}.")
    names = [name(task) for task in tasks]
    lines = [f"{name} {cost!r}" for name, cost in zip(names, costs, strict=True)]
    world.agree("the tasks, their costs or the schedule", "\n".join([schedule, *lines]))
    turns, take = turns_of(world, costs, schedule)
    taken: dict[int, int] = {}  # turn of this rank → task

    def work(turn: int, worker: int) -> None:
        if (index := take(turn)) is not None:
            taken[turn] = index
            do(tasks[index], worker)

    def report(turn: int) -> None:
        if on_done is not None and turn in taken:
            on_done(tasks[taken[turn]])

    raised = run_on_threads(work, range(turns), workers=workers, threads=threads, device=world.device, on_done=report)
    for turn, error in raised.items():
        if turn not in taken:
            raise error  # the queue's own: the ranks have lost one another
    errors = {taken[turn]: error for turn, error in raised.items()}
    told = world.all_gather_json([[index, isinstance(error, InputError), _said(error)] for index, error in errors.items()])
    failures = sorted([*failure, rank] for rank, part in enumerate(told) for failure in part)
    if failures:
        index, bad_input, text, rank = failures[0]
        if bad_input:
            raise InputError(f"{names[index]}: {text}") from errors.get(index)
        failed = ", ".join(names[index] for index, *_ in failures)
        message = f"{len(failures)} of {len(tasks)} tasks failed: {failed}. First error, {names[index]} on rank {rank}: {text}"
        raise RuntimeError(message) from errors.get(index)


def _said(error: Exception) -> str:
    """Of bad input its message, of a defect its kind, too."""
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def turns_of(world: World, costs: Sequence[float], schedule: str) -> tuple[int, Callable[[int], int | None]]:
    """How many turns this rank has at most, and what each turn does: a task's index, or None once nothing is left."""
    if schedule == "dynamic":
        order, queue = longest_first(costs, 1)[0], Queue(world, len(costs))
        return len(order), lambda turn: None if (place := queue.take()) is None else order[place]
    mine = longest_first(costs, world.size)[world.rank] if schedule == "longest_first" else range(world.rank, len(costs), world.size)
    return len(mine), lambda turn: mine[turn]
