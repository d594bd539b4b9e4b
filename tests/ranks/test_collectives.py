"""One, two and three gloo ranks against the serial answer. Data are synthetic; ranks meet through a file, never a port."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import gidef
from gidef.errors import Diverged
from gidef.parallel import Costs, World, mean_over_world, open_world, run_tasks
from gidef.parallel import cohort as cohort_module
from gidef.rng import generator
from gidef.types import Client, Update
from gidef.updates import CohortMean, mean_over

pytestmark = pytest.mark.ranks
TEMPLATE = {"w": torch.zeros(301, 7), "b": torch.zeros(3, dtype=torch.float64), "s": torch.zeros(())}
SIZES = (5, 90, 1, 33, 8, 8, 60)


def start(case: str, rank: int, size: int, folder: Path) -> subprocess.Popen[str]:
    """One rank of a case: this file as a script, which calls the function of that name."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "WORLD_SIZE"))}
    environ |= {"PYTHONPATH": str(Path(gidef.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning:gidef", __file__, case, str(rank), str(size), str(folder)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(processes: list[subprocess.Popen[str]], timeout_s: float = 50) -> list[str]:
    """Outputs of all ranks; none may outlive the test."""
    try:
        return [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def clients(numbers: range = range(len(SIZES))) -> list[Client]:
    return [Client(k, torch.zeros(SIZES[k], 1, 1, 1, dtype=torch.uint8), torch.zeros(SIZES[k], dtype=torch.long)) for k in numbers]


def shared_update(client: Client, worker: int) -> Update:
    draws = generator(0, "update", client.id)
    delta = {name: (torch.randn(t.shape, generator=draws) * 10.0 ** (client.id % 5 - 2)).to(t.dtype) for name, t in TEMPLATE.items()}
    return Update(delta, client.num_examples, {"loss": client.id / 7, "accuracy": 0.3})


def same(left: object, right: object) -> bool:
    """Whether two CohortMeans have the same bits."""
    tensors = all(torch.equal(left.delta[name], right.delta[name]) and left.delta[name].dtype == right.delta[name].dtype for name in TEMPLATE)
    return tensors and (left.num_examples, left.metrics, left.count) == (right.num_examples, right.metrics, right.count)


def raises(kind: type[Exception], text: str, call: object) -> None:
    try:
        call()
    except kind as error:
        assert type(error) is kind and text in str(error), f"{error!r} does not say {text!r}"
    else:
        raise AssertionError(f"no {kind.__name__}")


def collectives(world: World, folder: Path) -> None:
    """Everything that ends well, or fails on all ranks alike, in one process group."""
    names = ["accuracy", "loss"]
    serial = mean_over(shared_update, clients(), template=TEMPLATE, metric_names=names)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        for workers in (1, 2):
            mean = mean_over_world(world, workers=workers)(shared_update, clients(), template=TEMPLATE, metric_names=names)
            assert same(mean, serial)
    assert all_reduce.call_count == (2 if world.size > 1 else 0), "one all-reduce a round"

    def slowly(tensor: torch.Tensor, reduce: object = dist.all_reduce, **options: object) -> object:
        time.sleep(0.1)
        return reduce(tensor, **options)

    meets = mock.patch.object(type(world.watch), "meet", autospec=True, side_effect=type(world.watch).meet) if world.size > 1 else contextlib.nullcontext()
    with mock.patch.object(dist, "all_reduce", slowly), meets as met:
        mean = mean_over_world(world)(shared_update, clients(), template=TEMPLATE, metric_names=names)
        assert same(mean, serial) and (mean.sum_seconds >= 0.1 if world.size > 1 else mean.sum_seconds == 0)
    assert met is None or [call.args[1] for call in met.call_args_list] == ["the sum of a round", "all_gather_json"], "no meeting within the time of the sum"
    overlapped_sums(world, serial)
    for schedule in ("longest_first", "static", "dynamic"):
        costs, took = Costs(), []
        run = mean_over_world(world, schedule=schedule, costs=costs, learn=lambda cohort, seconds, took=took: took.append(seconds))
        for _ in range(2):
            mean = run(shared_update, clients(), template=TEMPLATE, metric_names=names)
            assert same(mean, serial) and len(mean.seconds) == len(SIZES) and min(mean.seconds) > 0
            costs.learn(clients(), took[-1])  # the next round goes by it
        world.agree("the seconds", json.dumps(took))
        world.agree("the plan", json.dumps(costs.state()))
    two = mean_over_world(world)(shared_update, clients(range(2)), template=TEMPLATE, metric_names=names)  # the third rank has none
    assert same(two, mean_over(shared_update, clients(range(2)), template=TEMPLATE, metric_names=names))

    seen: list[int] = []

    def broken(client: Client, worker: int) -> Update:
        seen.append(client.id)
        if client.id in (1, 3):  # the largest and the third largest: on different ranks where there are two
            raise KeyError(client.id)
        return shared_update(client, worker)

    def diverged(client: Client, worker: int) -> Update:
        update = shared_update(client, worker)
        update.delta["w"][5, 5] = float("inf") if client.id == 2 else 0.0
        return update

    for workers in (1, 2):
        run = mean_over_world(world, workers=workers)
        raises(RuntimeError, "client 1 failed on rank 0: KeyError: 1", lambda run=run: run(broken, clients(), template=TEMPLATE, metric_names=names))
        raises(Diverged, "client 2: w holds NaN or infinity", lambda run=run: run(diverged, clients(), template=TEMPLATE, metric_names=names))
    if world.size > 1:
        odd = clients(range(7) if world.rank else range(1, 7))
        try:
            mean_over_world(world)(shared_update, odd, template=TEMPLATE, metric_names=names)
        except RuntimeError as error:
            assert "different cohorts" in str(error)
            (folder / f"noticed-{world.rank}").touch()
        world.barrier()
        assert list(folder.glob("noticed-*")), "no rank noticed that the cohorts differ"

    assert world.any(world.rank == world.size - 1) and not world.any(False)
    value = {"rank": world.rank, "text": "größe", "none": None, "pair": (1, 2.5), "long": "x" * 3000}
    assert world.broadcast_json(value if world.rank == 0 else object)["text"] == "größe"
    assert world.broadcast_json(value, source=world.size - 1)["rank"] == world.size - 1
    assert world.all_gather_json(["x" * rank for rank in range(world.rank)]) == [["x" * k for k in range(rank)] for rank in range(world.size)]
    world.agree("the weights", "same")
    if world.size > 1:
        text = "other" if world.rank == world.size - 1 else "same"
        raises(RuntimeError, f"ranks disagree on the weights: [{world.size - 1}]", lambda: world.agree("the weights", text))
    total = torch.full((3, 2), 2**40 + world.rank)
    assert world.all_reduce_sum_(total) is total
    assert total.unique().tolist() == [world.size * 2**40 + sum(range(world.size))]

    tasks, done = [f"cell-{k}" for k in range(9)], []

    def do(task: str, worker: int) -> None:
        if task in ("cell-2", "cell-7"):
            raise OSError(f"cannot {task}")
        (folder / f"{task}-of-{world.size}").write_text(str(world.rank))

    costs = [1.0 + k % 3 for k in range(9)]
    text = "2 of 9 tasks failed: cell-2, cell-7. First error, cell-2 on rank 0: OSError: cannot cell-2"
    raises(RuntimeError, text, lambda: run_tasks(world, tasks, costs, do, workers=2, on_done=done.append))
    written = {task: int((folder / f"{task}-of-{world.size}").read_text()) for task in tasks if task not in ("cell-2", "cell-7")}
    assert sorted(done) == [task for task, rank in written.items() if rank == world.rank]
    assert set(written.values()) == set(range(world.size))
    run_tasks(world, tasks[:1], [1.0], do)  # ranks without a task wait for the one that has it
    if world.size > 1:
        count = 5 if world.rank else 6
        raises(RuntimeError, "ranks disagree on the tasks", lambda: run_tasks(world, tasks[:count], costs[:count], do))
    world.barrier()


def overlapped_sums(world: World, serial: CohortMean) -> None:
    """The first rank alone finds its sums slow: all go on in buckets, from the third round on, and a part is averaged while others travel."""
    entries = sum(tensor.numel() for tensor in TEMPLATE.values())
    buckets, names = -(-entries // 500), ["accuracy", "loss"]
    for reduction in ("fixed_point", "float32"):
        run = mean_over_world(world, reduction=reduction, overlap_above=-1.0 if world.rank == 0 else math.inf)
        with mock.patch.object(cohort_module, "BUCKET", 500), mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            calls = []
            for _ in range(4):
                all_reduce.reset_mock()
                mean = run(shared_update, clients(), template=TEMPLATE, metric_names=names)
                calls.append(all_reduce.call_count)
                if reduction == "fixed_point":
                    assert same(mean, serial)
                assert all(torch.allclose(mean.delta[name], serial.delta[name], rtol=1e-5, atol=1e-6) for name in TEMPLATE) and mean.metrics == serial.metrics
            once = 1 if reduction == "fixed_point" else 2
            assert calls == ([once, once, 1 + buckets, 1 + buckets] if world.size > 1 else [0] * 4), calls

            def broken(client: Client, worker: int) -> Update:
                raise KeyError(client.id)

            raises(RuntimeError, "client 1 failed on rank 0: KeyError: 1", lambda run=run: run(broken, clients(), template=TEMPLATE, metric_names=names))
            assert same(run(shared_update, clients(), template=TEMPLATE, metric_names=names), serial) or reduction == "float32"
        for share, bucket in ((math.inf, 500), (-1.0, entries)):  # never, and a sum no larger than a bucket
            never = mean_over_world(world, reduction=reduction, overlap_above=share)
            with mock.patch.object(cohort_module, "BUCKET", bucket), mock.patch.object(World, "all_reduce_buckets_") as cut:
                for _ in range(3):
                    never(shared_update, clients(), template=TEMPLATE, metric_names=names)
            assert not cut.called
    flat = torch.arange(1050) * (world.rank + 1)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        for place, there in enumerate(world.all_reduce_buckets_(flat, entries=100)):
            assert there == min(100 * (place + 1), 1050)
            assert torch.equal(flat[:there], torch.arange(there) * (world.size * (world.size + 1) // 2))
            assert all_reduce.call_count == (min(place + 3, 11) if world.size > 1 else 0), "two buckets are on their way"


def stopped(world: World, folder: Path) -> None:
    """Rank 1's worker threads compute for a minute; rank 0 has little to do and waits for it in a collective."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))

    def do(task: int, worker: int) -> None:
        (folder / f"busy-{world.rank}").touch()
        time.sleep(0.5 * world.rank)

    run_tasks(world, list(range(480)), [1.0] * 480, do, workers=2)


class OnGpu:
    """In the place of a tensor on a GPU, whose copy in host memory alone may travel."""

    is_cuda = True

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def cpu(self) -> torch.Tensor:
        return self.value.clone()

    def copy_(self, host: torch.Tensor) -> OnGpu:
        self.value = host
        return self


def on_gpus(rank: int, size: int, folder: Path) -> None:
    """Ranks that share a GPU sum through host memory, over gloo; those with one each get an NCCL group. The GPUs are made up."""
    for name, count in (("shared", 1), ("one each", size)):
        gpus = mock.patch.multiple(
            torch.cuda, is_available=lambda: True, device_count=lambda count=count: count, set_device=mock.DEFAULT,
            get_device_properties=lambda device: mock.Mock(uuid=f"GPU-{device.index}"),
        )  # fmt: skip
        meeting = open_world("auto", timeout_s=30, init_method=f"file://{folder / name}", rank=rank, size=size)
        with gpus, mock.patch.object(dist, "new_group") as new_group, mock.patch("os.environ", {}), meeting as world:
            assert world.device == torch.device("cuda", rank % count)
            if name == "shared":
                assert world.nccl is None and not new_group.called
                total = OnGpu(torch.full((3,), 2**40 + rank))
                assert world.all_reduce_sum_(total) is total and total.value.tolist() == [size * 2**40 + sum(range(size))] * 3
            else:
                assert world.nccl is new_group.return_value and new_group.call_args.kwargs["backend"] == "nccl"


def test_ranks_that_share_a_gpu_sum_through_host_memory(tmp_path: Path) -> None:
    processes = [start("on_gpus", rank, 2, tmp_path) for rank in range(2)]
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def test_one_rank_needs_no_process_group(tmp_path: Path) -> None:
    collectives(World(), tmp_path)
    assert not dist.is_initialized()


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_gives_the_serial_bits_and_fails_together(size: int, tmp_path: Path) -> None:
    processes = [start("collectives", rank, size, tmp_path) for rank in range(size)]
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0] * size, "\n".join(outputs)
    assert all(json.loads((tmp_path / f"end-{rank}.json").read_text())["grouped"] is False for rank in range(size))


def test_a_rank_that_a_signal_ends_leaves_nobody_waiting(tmp_path: Path) -> None:
    processes = [start("stopped", rank, 2, tmp_path) for rank in range(2)]
    deadline = time.monotonic() + 40
    while len(list(tmp_path.glob("busy-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes, 20)
    assert [process.returncode for process in processes] == [1, 7], "\n".join(outputs)
    assert "all_gather_json" in outputs[0] and "Timed out" not in outputs[0], outputs[0]


if __name__ == "__main__":
    case, rank, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    if case == "on_gpus":
        sys.exit(on_gpus(rank, size, folder))
    with open_world("cpu", timeout_s=30, init_method=f"file://{folder / 'meet'}", rank=rank, size=size) as world:
        {"collectives": collectives, "stopped": stopped}[case](world, folder)
    (folder / f"end-{rank}.json").write_text(json.dumps({"grouped": dist.is_initialized()}))
