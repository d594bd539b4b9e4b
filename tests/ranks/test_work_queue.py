"""Tasks over one, two and three gloo ranks under every schedule. Ranks meet through a file, never a port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import gidef
from gidef.errors import InputError
from gidef.parallel import World, open_world, run_tasks

pytestmark = pytest.mark.ranks
SCHEDULES = ("longest_first", "static", "dynamic")


def start(case: str, rank: int, size: int, folder: Path) -> subprocess.Popen[str]:
    """One rank of a case: this file as a script, which calls the function of that name."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "WORLD_SIZE"))}
    environ |= {"PYTHONPATH": str(Path(gidef.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning:gidef", __file__, case, str(rank), str(size), str(folder)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(processes: list[subprocess.Popen[str]], timeout_s: float = 60) -> list[str]:
    """Outputs of all ranks; none may outlive the test."""
    try:
        return [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


class Ledger:
    """A line per task that was done, in a file of the rank; all ranks read all of them."""

    def __init__(self, world: World, folder: Path, call: str) -> None:
        self.world, self.folder, self.call = world, folder, call

    def write(self, task: int) -> None:
        with open(self.folder / f"{self.call}-of-{self.world.size}-by-{self.world.rank}", "a") as file:
            file.write(f"{task}\n")  # one write of a line, so that a rank's threads may share the file

    def read(self) -> dict[int, list[int]]:
        """Rank → what it did."""
        own = (self.folder / f"{self.call}-of-{self.world.size}-by-{rank}" for rank in range(self.world.size))
        return {rank: [int(line) for line in path.read_text().split()] if path.exists() else [] for rank, path in enumerate(own)}


def schedules(world: World, folder: Path) -> None:
    """Everything that ends well, or fails on all ranks alike, in one process group."""
    for schedule in SCHEDULES:
        for workers in (1, 2):
            for call, count in enumerate((17, 1, 0, 5, 17)):  # one after another: no call may meet what an earlier one counted
                ledger, told = Ledger(world, folder, f"{schedule}-{workers}-{call}"), []
                costs = [float(1 + k % 4) for k in range(count)]
                run_tasks(world, range(count), costs, lambda task, worker, to=ledger: to.write(task), schedule=schedule, workers=workers, on_done=told.append)
                done = ledger.read()
                assert Counter(task for tasks in done.values() for task in tasks) == Counter(range(count)), f"{schedule}, {workers} workers: {done}"
                assert sorted(told) == sorted(done[world.rank])
    ledger = Ledger(world, folder, "order")
    run_tasks(world, range(7), [1.0] * 7, lambda task, worker: ledger.write(task), schedule="static")
    assert ledger.read() == {rank: list(range(rank, 7, world.size)) for rank in range(world.size)}

    for schedule in SCHEDULES:
        ledger = Ledger(world, folder, f"failing-{schedule}")

        def do(task: int, worker: int, ledger: Ledger = ledger) -> None:
            if task in (2, 7):
                raise OSError(f"cannot do {task}")
            ledger.write(task)

        try:
            run_tasks(world, range(9), [1.0 + k % 3 for k in range(9)], do, schedule=schedule, workers=2)
        except RuntimeError as error:
            text = str(error)
        assert text.startswith("2 of 9 tasks failed: 2, 7. First error, 2 on rank ") and text.endswith("OSError: cannot do 2"), text
        assert sorted(task for tasks in ledger.read().values() for task in tasks) == [0, 1, 3, 4, 5, 6, 8]

        def full(task: int, worker: int) -> None:
            raise InputError("the disk is full") if task == 0 else OSError("later")

        try:
            run_tasks(world, range(3), [1.0] * 3, full, schedule=schedule)
        except InputError as error:
            text = str(error)
        assert text == "0: the disk is full", text
    seconds = [0.15 if task % world.size == 0 else 0.005 for task in range(4 * world.size)]
    for schedule in SCHEDULES:  # all costs are thought equal, while every size-th task takes long: a plan gives those to one rank
        ledger = Ledger(world, folder, f"uneven-{schedule}")

        def slow(task: int, worker: int, ledger: Ledger = ledger) -> None:
            time.sleep(seconds[task])
            ledger.write(task)

        world.barrier()
        run_tasks(world, range(len(seconds)), [1.0] * len(seconds), slow, schedule=schedule)
        worst = max(sum(seconds[task] for task in tasks) for tasks in ledger.read().values())
        assert worst < 0.5 if schedule == "dynamic" and world.size > 1 else worst >= 0.6, f"{schedule}: {worst} s on the busiest of {world.size} ranks"

    if world.size > 1:
        try:
            run_tasks(world, range(3), [1.0] * 3, lambda task, worker: None, schedule="dynamic" if world.rank else "static")
        except RuntimeError as error:
            text = str(error)
        assert "ranks disagree on the tasks" in text, text
    world.barrier()


def lost(world: World, folder: Path) -> None:
    """Rank 1 is ended by a signal while both pull from the queue."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))

    def do(task: int, worker: int) -> None:
        (folder / f"busy-{world.rank}").touch()
        (folder / f"task-{task}-by-{world.rank}").touch()
        time.sleep(0.02)

    run_tasks(world, range(200), [1.0] * 200, do, schedule="dynamic")


def test_one_rank_does_everything_without_a_process_group(tmp_path: Path) -> None:
    schedules(World(), tmp_path)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_do_every_task_once_balance_by_pulling_and_fail_together(size: int, tmp_path: Path) -> None:
    processes = [start("schedules", rank, size, tmp_path) for rank in range(size)]
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0] * size, "\n".join(outputs)


def test_the_other_rank_finishes_the_queue_of_one_that_a_signal_ends_and_then_stops(tmp_path: Path) -> None:
    processes = [start("lost", rank, 2, tmp_path) for rank in range(2)]
    deadline = time.monotonic() + 40
    while len(list(tmp_path.glob("busy-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [1, 7], "\n".join(outputs)
    done = [path.name.split("-")[1] for path in tmp_path.glob("task-*")]
    assert sorted(map(int, done)) == list(range(200)), "a task was left, or done twice"
    assert "all_gather_json" in outputs[0] and "Timed out" not in outputs[0], outputs[0]


if __name__ == "__main__":
    case, rank, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    with open_world("cpu", timeout_s=30, init_method=f"file://{folder / 'meet'}", rank=rank, size=size) as world:
        {"schedules": schedules, "lost": lost}[case](world, folder)
