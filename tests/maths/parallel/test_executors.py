"""The cohort's mean and independent tasks on worker threads of one rank. Data are synthetic; several ranks are in tests/ranks."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from gidef.errors import Diverged
from gidef.parallel import Costs, World, mean_over_world, run_tasks
from gidef.rng import generator
from gidef.types import Client, Update
from gidef.updates import mean_over

TEMPLATE = {"w": torch.zeros(50, 3), "b": torch.zeros(())}
SIZES = (5, 90, 1, 33, 8, 8, 60)


def clients() -> list[Client]:
    return [Client(10 + k, torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.long)) for k, n in enumerate(SIZES)]


def shared_update(client: Client, worker: int) -> Update:
    draws = generator(0, client.id)
    delta = {name: torch.randn(tensor.shape, generator=draws) * 10.0 ** (client.id % 4) for name, tensor in TEMPLATE.items()}
    return Update(delta, client.num_examples, {"loss": client.id / 7})


@pytest.mark.parametrize("workers", [1, 2, 4, 9])
def test_worker_threads_give_the_bits_of_the_serial_executor(workers: int) -> None:
    serial = mean_over(shared_update, clients(), template=TEMPLATE, metric_names=["loss"])
    threaded = mean_over_world(World(), workers=workers)(shared_update, clients(), template=TEMPLATE, metric_names=["loss"])
    assert all(torch.equal(serial.delta[name], threaded.delta[name]) for name in TEMPLATE)
    assert (serial.metrics, serial.num_examples, serial.count) == (threaded.metrics, threaded.num_examples, threaded.count)


def test_no_two_clients_share_a_worker_at_once_and_each_worker_computes_with_the_threads_asked_for() -> None:
    busy, seen, lock, before = set(), [], threading.Lock(), torch.get_num_threads()
    both = threading.Barrier(3)

    def watched(client: Client, worker: int) -> Update:
        with lock:
            assert worker not in busy
            busy.add(worker)
            seen.append((worker, client.num_examples, torch.get_num_threads()))
        if len(seen) <= 3:
            both.wait(timeout=10)  # three workers really run at once
        with lock:
            busy.remove(worker)
        return shared_update(client, worker)

    mean_over_world(World(), workers=3, threads=1)(watched, clients(), template=TEMPLATE, metric_names=["loss"])
    assert {worker for worker, _, _ in seen} == {0, 1, 2} and {threads for _, _, threads in seen} == {1}
    assert {size for _, size, _ in seen[:3]} == set(sorted(SIZES)[-3:]), "the largest clients start first"
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failing_client_is_named_and_bad_input_stays_bad_input(workers: int) -> None:
    def broken(client: Client, worker: int) -> Update:
        if client.id == 13:
            raise KeyError("no such layer")
        return shared_update(client, worker)

    def diverged(client: Client, worker: int) -> Update:
        update = shared_update(client, worker)
        update.delta["w"][0, 0] = float("nan") if client.id == 13 else 0.0
        return update

    run = mean_over_world(World(), workers=workers)
    with pytest.raises(RuntimeError, match="client 13 failed on rank 0: KeyError: 'no such layer'") as caught:
        run(broken, clients(), template=TEMPLATE, metric_names=["loss"])
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(Diverged, match="^client 13: w holds NaN"):
        run(diverged, clients(), template=TEMPLATE, metric_names=["loss"])


def test_other_costs_move_the_order_and_not_the_mean() -> None:
    order = []

    def noted(client: Client, worker: int) -> Update:
        order.append(client.id)
        return shared_update(client, worker)

    runs = [mean_over_world(World(), costs=costs) for costs in (None, lambda client: client.id)]
    means = [run(noted, clients(), template=TEMPLATE, metric_names=["loss"]) for run in runs]
    assert torch.equal(means[0].delta["w"], means[1].delta["w"])
    assert order[7:] == sorted(order[:7], reverse=True) != order[:7]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_task_does_not_stop_the_others_and_is_named(workers: int, tmp_path: Path) -> None:
    done = []

    def do(task: str, worker: int) -> None:
        assert worker < workers
        if task in ("b", "d"):
            raise OSError(f"cannot do {task}")
        (tmp_path / task).touch()

    with pytest.raises(RuntimeError, match="2 of 4 tasks failed: cell b, cell d. First error, cell b on rank 0: OSError: cannot do b"):
        run_tasks(World(), list("abcd"), [1, 4, 2, 3], do, workers=workers, name=lambda task: f"cell {task}", on_done=done.append)
    assert sorted(done) == sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]
    run_tasks(World(), [], [], do, workers=workers)
    with pytest.raises(ValueError, match="1 tasks but 2 costs"):
        run_tasks(World(), ["a"], [1, 2], do)


def test_on_done_runs_in_the_calling_thread() -> None:
    names = []
    run_tasks(World(), [1, 2, 3], [1, 1, 1], lambda task, worker: None, workers=2, on_done=lambda task: names.append(threading.current_thread()))
    assert names == [threading.current_thread()] * 3


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_signal_s_exception_propagates_and_starts_nothing_more(workers: int, stop: type[BaseException]) -> None:
    started = []

    def do(task: int, worker: int) -> None:
        started.append(task)
        if task == 0:
            raise stop
        time.sleep(0.001)  # longer than the other thread needs to say so

    with pytest.raises(stop):
        run_tasks(World(), list(range(200)), [1.0] * 200, do, workers=workers)
    assert len(started) < 200


def test_costs_start_from_examples_and_follow_what_was_measured() -> None:
    few, many, new = (Client(k, torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.long)) for k, n in enumerate((10, 30, 20)))
    costs = Costs(smoothing=0.25)
    assert [costs(client) for client in (few, many, new)] == [10, 30, 20]
    costs.learn([few, many], [4.0, 2.0])  # the small client is the slow one
    assert (costs(few), costs(many)) == (4.0, 2.0) and costs(new) == pytest.approx(20 * 6 / 40)
    costs.learn([few], [8.0])
    assert costs(few) == 5.0
    again = Costs()
    again.load(json.loads(json.dumps(costs.state())))
    assert [again(client) for client in (few, many, new)] == [costs(client) for client in (few, many, new)]
    with pytest.raises(ValueError, match="smoothing"):
        Costs(smoothing=0)


@pytest.mark.parametrize("schedule", ["longest_first", "static", "dynamic"])
def test_the_next_round_starts_with_whoever_was_slowest(schedule: str) -> None:
    order, costs = [], Costs()

    def timed(client: Client, worker: int) -> Update:
        order.append(client.id)
        if client.id == 12:  # one example, and the slowest
            time.sleep(0.05)
        return shared_update(client, worker)

    run = mean_over_world(World(), costs=costs, learn=costs.learn, schedule=schedule)
    means = [run(timed, clients(), template=TEMPLATE, metric_names=["loss"]) for _ in range(2)]
    assert means[0].seconds[2] >= 0.05 > max(means[0].seconds[:2])
    assert (order[0], order[len(SIZES)]) == ((10, 10) if schedule == "static" else (11, 12))
