"""The schedules of `run_tasks` in one process, and the queue under threads."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter

import pytest

from gidef.errors import InputError
from gidef.parallel import World, run_tasks
from gidef.parallel.queue import Queue

SCHEDULES = ("longest_first", "static", "dynamic")
COSTS = [1.0, 5.0, 2.0, 5.0, 0.0, 3.0]


@pytest.mark.parametrize(("schedule", "order"), [("longest_first", [1, 3, 5, 2, 0, 4]), ("static", [0, 1, 2, 3, 4, 5]), ("dynamic", [1, 3, 5, 2, 0, 4])])
def test_a_schedule_starts_tasks_in_its_order(schedule: str, order: list[int]) -> None:
    started: list[int] = []
    run_tasks(World(), range(6), COSTS, lambda task, worker: started.append(task), schedule=schedule)
    assert started == order


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_is_done_once_by_one_worker_at_a_time_call_after_call(schedule: str, workers: int) -> None:
    for count in (0, 1, 7, 40, 3):
        done: list[int] = []
        told: list[int] = []
        busy: list[int] = []

        def do(task: int, worker: int, done: list[int] = done, busy: list[int] = busy) -> None:
            assert worker in range(workers) and worker not in busy
            busy.append(worker)
            time.sleep(0.0005)
            busy.remove(worker)
            done.append(task)

        run_tasks(World(), range(count), [float(k % 3) for k in range(count)], do, schedule=schedule, workers=workers, on_done=told.append)
        assert sorted(done) == sorted(told) == list(range(count))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("workers", [1, 2])
def test_failing_tasks_are_named_and_the_others_done_under_every_schedule(schedule: str, workers: int) -> None:
    done: list[int] = []

    def do(task: int, worker: int) -> None:
        if task in (3, 5):
            raise OSError(f"cannot do {task}")

    with pytest.raises(RuntimeError, match=r"2 of 6 tasks failed: 3, 5\. First error, 3 on rank 0: OSError: cannot do 3") as caught:
        run_tasks(World(), range(6), COSTS, do, schedule=schedule, workers=workers, on_done=done.append)
    assert isinstance(caught.value.__cause__, OSError) and str(caught.value.__cause__) == "cannot do 3"
    assert sorted(done) == [0, 1, 2, 4]

    def full(task: int, worker: int) -> None:
        raise InputError("the disk is full")

    with pytest.raises(InputError, match="^0: the disk is full"):
        run_tasks(World(), range(6), COSTS, full, schedule=schedule, workers=workers)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_signal_stops_a_dynamic_queue_at_once(stop: type[BaseException]) -> None:
    started: list[int] = []

    def do(task: int, worker: int) -> None:
        started.append(task)
        if len(started) == 2:
            raise stop

    with pytest.raises(stop):
        run_tasks(World(), range(50), [1.0] * 50, do, schedule="dynamic")
    assert started == [0, 1]


def test_an_idle_worker_takes_what_a_busy_one_would_have_done() -> None:
    by_worker: Counter[int] = Counter()
    long_one_runs, others_done = threading.Event(), threading.Event()

    def do(task: int, worker: int) -> None:
        by_worker[worker] += 1
        if task == 0:
            long_one_runs.set()
            assert others_done.wait(20), "nobody else worked meanwhile"
        else:
            assert long_one_runs.wait(20)
            if sum(by_worker.values()) == 9:
                others_done.set()

    run_tasks(World(), range(9), [9.0, *[1.0] * 8], do, schedule="dynamic", workers=2)
    assert sorted(by_worker.values()) == [1, 8]


def test_an_unknown_schedule_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match="schedule='fastest' is unknown: choose one of longest_first, static, dynamic"):
        run_tasks(World(), [1], [1.0], lambda task, worker: pytest.fail("ran"), schedule="fastest")


class TwoRanks(World):
    """Two ranks, of which the other never says anything: a collective would hang."""

    def agree(self, label: str, text: str | bytes) -> None: ...

    def broadcast_json(self, value: object, *, source: int = 0) -> object:
        return value

    def all_gather_json(self, value: object) -> list[object]:
        pytest.fail("waited for a rank that is gone")


class SlowStore:
    """A store that answers after a while, in which other threads run."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, name: str) -> int:
        self.counts[name] += 1
        count = self.counts[name]
        time.sleep(0.0002)
        return count


@pytest.mark.parametrize("world", [World(), TwoRanks(0, 2)])
def test_threads_share_a_queue_without_gap_or_repeat(world: World) -> None:
    store = SlowStore()
    world = dataclasses.replace(world, watch=store if world.size > 1 else None)
    for length in (500, 1, 0, 200):  # in one store, one after another
        queue, taken = Queue(world, length), [[] for _ in range(8)]
        asked, refused = [], []  # when a number was asked for that came, and when the answer was that none is left

        def take(mine: list[int], queue: Queue = queue, asked: list[float] = asked, refused: list[float] = refused) -> None:
            start = time.monotonic()
            while (number := queue.take()) is not None:
                mine.append(number)
                asked.append(start)
                time.sleep(0.0001)
                start = time.monotonic()
            refused.append(time.monotonic())

        threads = [threading.Thread(target=take, args=(mine,)) for mine in taken]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(number for mine in taken for number in mine) == list(range(length))
        assert all(mine == sorted(mine) for mine in taken)
        assert max(asked, default=0.0) <= min(refused), "a thread was told that nothing is left, and a later one got a number"
        assert queue.take() is queue.take() is None
    assert sorted(store.counts.values()) == ([] if world.size == 1 else [1, 2, 201, 501]), "once past the end, nobody asks again"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_lost_store_ends_the_call_with_its_own_error_and_is_asked_once(workers: int) -> None:
    class Lost:
        asked = 0

        def count(self, name: str) -> int:
            Lost.asked += 1
            if Lost.asked > 3:
                raise RuntimeError("the connection was reset by the peer")
            return Lost.asked

    done: list[int] = []
    with pytest.raises(RuntimeError, match="reset by the peer"):
        run_tasks(TwoRanks(0, 2, watch=Lost()), range(20), [1.0] * 20, lambda task, worker: done.append(task), schedule="dynamic", workers=workers)
    assert sorted(done) == [0, 1, 2] and Lost.asked == 4
