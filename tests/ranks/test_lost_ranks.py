"""Ranks that are killed, stopped or stuck: the others end soon, with a message that names them. Small timeouts; ranks meet through a TCP store."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import gidef
from gidef.clients.sharded import Fsdp
from gidef.errors import RankFailure
from gidef.parallel import World, open_world, run_tasks, with_mesh
from tests.ranks.launch import free_port

pytestmark = pytest.mark.ranks
HOST = socket.gethostname()


class Nursery:
    """One process that has imported torch, and forks the ranks of each case: an import takes longer than most cases."""

    def __init__(self) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "WORLD_SIZE", "TORCHELASTIC", "MASTER"))}
        environ |= {"PYTHONPATH": str(Path(gidef.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *what: object) -> object:
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, case: str, size: int, folder: Path, *, timeout_s: float = 1.5, stall_s: float = 60) -> list[int]:
        """Process ids, by rank."""
        self.folder = folder
        return self.ask("start", case, size, str(folder), free_port(), timeout_s, stall_s)

    def finish(self, pids: list[int], *, without: int | None = None) -> tuple[list[int], list[str]]:
        """Exit statuses and outputs of all ranks but one, which is killed then."""
        codes = self.ask("wait", [pid for rank, pid in enumerate(pids) if rank != without], 40)
        if without is not None:
            self.ask("wait", [pids[without]], 0)
        assert None not in codes, "some ranks did not end"
        return codes, [(self.folder / f"out-{rank}").read_text() for rank in range(len(pids)) if rank != without]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    one = Nursery()
    yield one
    one.process.stdin.close()
    one.process.wait(30)
    one.process.stdout.close()


def serve() -> None:
    """The nursery's own side."""

    def wait(pids: list[int], seconds: float) -> list[int | None]:
        codes: dict[int, int | None] = dict.fromkeys(pids)
        deadline = time.monotonic() + seconds
        while None in codes.values():
            for pid in [pid for pid, code in codes.items() if code is None]:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    return [codes[pid] for pid in pids]
            time.sleep(0.01)
        return [codes[pid] for pid in pids]

    for line in sys.stdin:
        what, *given = json.loads(line)
        print(json.dumps(begin(*given) if what == "start" else wait(*given)), flush=True)


def begin(case: str, size: int, folder: str, port: int, timeout_s: float, stall_s: float) -> list[int]:
    pids = []
    for rank in range(size):
        if pid := os.fork():
            pids.append(pid)
            continue
        out = os.open(f"{folder}/out-{rank}", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(out, stream)
        code = 0
        try:
            with open_world("cpu", timeout_s, stall_s=stall_s, init_method=f"tcp://127.0.0.1:{port}", rank=rank, size=size) as world:
                CASES[case](world, Path(folder))
        except RankFailure as error:
            print(f"RankFailure ranks={list(error.ranks)} lines={len(error.lines)} {error}", flush=True)
            code = 3
        except Exception:
            traceback.print_exc()
            code = 1
        sys.exit(code)
    return pids


def until(ready, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "the ranks did not get that far"
        time.sleep(0.02)


def busy(world: World, folder: Path) -> None:
    """Rank 0 and the others wait in a collective for the last rank, which works for ever."""
    (folder / f"busy-{world.rank}").touch()
    while world.rank == world.size - 1:
        time.sleep(0.1)
    world.any(False)


def first_works(world: World, folder: Path) -> None:
    """The others wait for rank 0, where the store is."""
    (folder / f"busy-{world.rank}").touch()
    while world.rank == 0:
        time.sleep(0.1)
    world.any(False)


def pulling(world: World, folder: Path) -> None:
    """All pull from the common queue."""

    def do(task: int, worker: int) -> None:
        (folder / f"busy-{world.rank}").touch()
        time.sleep(0.05)

    run_tasks(world, range(2000), [1.0] * 2000, do, schedule="dynamic")


def patient(world: World, folder: Path) -> None:
    """The last rank works for thrice the timeout, and the others wait."""
    if world.rank == world.size - 1:
        time.sleep(3 * 1.5)
    assert world.any(world.rank == 0)


def raising(world: World, folder: Path) -> None:
    if world.rank == 1:
        raise KeyError("no such image")
    world.broadcast_json("hello")


def mismatched(world: World, folder: Path) -> None:
    if world.rank == 1:
        world.barrier()
    else:
        world.broadcast_json("hello")


def inside(world: World, folder: Path) -> None:
    """A collective of torch's own, which all have entered but one, that is dead."""
    with world._together("a sum"):
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(4))


def buckets(world: World, folder: Path) -> None:
    """A sum in buckets, of which one rank takes two and is dead."""
    world.meet("a sum")
    for there in world.all_reduce_buckets_(torch.ones(1000), entries=100):
        if world.rank == 1 and there == 200:
            os.kill(os.getpid(), signal.SIGKILL)


def sharded(world: World, folder: Path) -> None:
    """All ranks of a group train a client, while a thread of each writes a checkpoint; the one to be stopped comes to neither. The groups' own timeout
    is longer than the test."""
    mesh = with_mesh(world, world.size, timeout_s=100).mesh
    fsdp = Fsdp(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)), mesh.device_mesh["shard"], mesh.shard)

    def step() -> None:
        fsdp.backward(fsdp.model(torch.ones(3, 4)).square().mean())

    step()
    (folder / f"busy-{world.rank}").touch()
    until((folder / "stopped").exists)
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(dist.all_reduce, torch.ones(1), group=mesh.saving)
        try:
            with mesh.shard.explained():
                step()
        finally:
            with contextlib.suppress(RuntimeError):
                saving.result()


CASES = {one.__name__: one for one in (busy, first_works, pulling, patient, raising, mismatched, inside, buckets, sharded)}


@pytest.mark.parametrize("size", [2, 3])
def test_a_killed_rank_is_named_within_seconds_though_the_timeout_is_long(size: int, tmp_path: Path, nursery: Nursery) -> None:
    pids = nursery.start("busy", size, tmp_path, timeout_s=300)
    until(lambda: len(list(tmp_path.glob("busy-*"))) == size)
    os.kill(pids[-1], signal.SIGKILL)
    codes, outputs = nursery.finish(pids)
    assert codes == [3] * (size - 1) + [-signal.SIGKILL], "\n".join(outputs)
    for output in outputs[:-1]:
        assert f"RankFailure ranks=[{size - 1}]" in output and f"rank {size - 1} on host {HOST} is gone: the connection closed" in output, output


@pytest.mark.parametrize(("case", "who"), [("busy", 2), ("first_works", 0), ("pulling", 0)])
def test_a_stopped_rank_is_named_after_the_timeout_also_where_it_holds_the_store(case: str, who: int, tmp_path: Path, nursery: Nursery) -> None:
    pids = nursery.start(case, 3, tmp_path)
    until(lambda: len(list(tmp_path.glob("busy-*"))) == 3)
    os.kill(pids[who], signal.SIGSTOP)
    codes, outputs = nursery.finish(pids, without=who)
    assert codes == [3, 3], "\n".join(outputs)
    for output in outputs:
        assert f"RankFailure ranks=[{who}]" in output, output
        assert (f"rank 2 on host {HOST} is silent for 1.5 s" if who else "rank 0's host, where the ranks meet, has not answered rank") in output, output


def test_the_killed_holder_of_the_store_is_named_at_once(tmp_path: Path, nursery: Nursery) -> None:
    pids = nursery.start("first_works", 3, tmp_path, timeout_s=300)
    until(lambda: len(list(tmp_path.glob("busy-*"))) == 3)
    os.kill(pids[0], signal.SIGKILL)
    codes, outputs = nursery.finish(pids)
    assert codes == [-signal.SIGKILL, 3, 3], "\n".join(outputs)
    assert all("RankFailure ranks=[0]" in output and "is gone" in output for output in outputs[1:]), outputs


def test_a_rank_that_works_longer_than_the_timeout_is_waited_for(tmp_path: Path, nursery: Nursery) -> None:
    codes, outputs = nursery.finish(nursery.start("patient", 2, tmp_path))
    assert codes == [0, 0], "\n".join(outputs)
    assert "gidef: rank 0 has waited for" in outputs[0] and f"rank 1 on {HOST}" in outputs[0]


def test_a_rank_that_lives_and_never_comes_is_named_with_its_place(tmp_path: Path, nursery: Nursery) -> None:
    codes, outputs = nursery.finish(nursery.start("busy", 2, tmp_path, stall_s=3), without=1)
    assert codes == [3] and "longer than stall_s" in outputs[0] and f"rank 1 on {HOST}" in outputs[0], outputs[0]


def test_an_error_of_one_rank_reaches_the_others_with_its_last_lines(tmp_path: Path, nursery: Nursery) -> None:
    codes, outputs = nursery.finish(nursery.start("raising", 3, tmp_path))
    assert codes == [3, 1, 3], "\n".join(outputs)
    for rank in (0, 2):
        assert f"rank 1 on host {HOST} failed first: KeyError: 'no such image'" in outputs[rank], outputs[rank]
        assert "lines=0" not in outputs[rank]


def test_ranks_in_different_collectives_are_told_so(tmp_path: Path, nursery: Nursery) -> None:
    codes, outputs = nursery.finish(nursery.start("mismatched", 2, tmp_path))
    assert all(codes)
    assert any("the ranks are in different collectives: rank" in output and "broadcast_json" in output for output in outputs), outputs


@pytest.mark.parametrize("case", ["inside", "buckets"])
def test_a_rank_that_dies_inside_a_collective_is_named_too(case: str, tmp_path: Path, nursery: Nursery) -> None:
    codes, outputs = nursery.finish(nursery.start(case, 3, tmp_path, timeout_s=5))
    assert codes == [3, -signal.SIGKILL, 3], "\n".join(outputs)
    assert all("rank 1 on host" in outputs[rank] for rank in (0, 2)), outputs


@pytest.mark.parametrize("who", [1, 0])
def test_a_stopped_rank_of_a_group_that_shares_a_client_is_named_after_the_timeout(who: int, tmp_path: Path, nursery: Nursery) -> None:
    pids = nursery.start("sharded", 2, tmp_path)
    until(lambda: len(list(tmp_path.glob("busy-*"))) == 2)
    os.kill(pids[who], signal.SIGSTOP)
    (tmp_path / "stopped").touch()
    codes, outputs = nursery.finish(pids, without=who)  # within 40 s
    assert codes == [3], "\n".join(outputs)
    assert f"RankFailure ranks=[{who}]" in outputs[0], outputs[0]
    assert (f"rank 1 on host {HOST} is silent for 1.5 s" if who else "rank 0's host, where the ranks meet, has not answered rank") in outputs[0], outputs[0]


def test_an_error_that_no_other_rank_is_to_blame_for_keeps_its_words() -> None:
    for error in (RuntimeError("no kernel for this"), KeyError("no such image"), RankFailure("rank 1 is gone")):
        with pytest.raises(type(error), match=str(error)), World(watch=SimpleNamespace(blamed=lambda: None)).explained():
            raise error
    with pytest.raises(RankFailure, match="rank 1 is gone"), World(watch=SimpleNamespace(blamed=lambda: RankFailure("rank 1 is gone"))).explained():
        raise RuntimeError("connection closed by peer")


if __name__ == "__main__":
    import torch.distributed.fsdp  # seconds, which each rank would spend

    torch.set_num_threads(1)
    serve()
