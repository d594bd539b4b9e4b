"""How many times faster N ranks attack than one: the same chunks on one rank while the others wait, then shared by all, in turns.

    torchrun --nproc-per-node 2 recipes/bench/ranks.py          on two cores, two minutes

A chunk is K attacks on LeNet as in attack.py, recorded once per rank outside the clock. Time is the wall's, from a barrier to the end of
the slowest rank; the efficiency is the ratio over N. Give each rank a core of its own, and nothing else to do: what the ranks share (memory,
caches, the clock's boost) shows here, too.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import attack  # the benchmark beside this one
import torch
import tyro
from saving import save

from gidef.attack import drain, run_chunk
from gidef.errors import InputError
from gidef.parallel.work import SCHEDULES, run_tasks
from gidef.parallel.world import World, open_world
from gidef.report import Console


@dataclass(frozen=True, kw_only=True)
class Options:
    """Attacks on N ranks against one."""

    at_once: int = 32
    """Attacks K of a chunk."""
    chunks: int = 8
    """Of every rank."""
    iterations: int = 60
    mode: str = "traced"
    schedule: str = "longest_first"
    repetitions: int = 5
    device: str = "cpu"
    out: Path = Path("runs/bench_ranks.json")


def seconds(world: World, ranks: World, engine: attack.Engine, options: Options) -> float:
    """Wall seconds until the slowest of `ranks` has attacked its share; the others of the world wait."""
    count = options.chunks * world.size

    def work(task: int, worker: int) -> None:
        chunk = tuple((index, 0) for index in range(options.at_once))
        drain(
            run_chunk(
                chunk, engine.observations, engine.simulate, engine.matching, seed=task, mode=options.mode, every=options.iterations,
                at_once=options.at_once, programs=engine.programs, device=world.device,
            )  # fmt: skip
        )

    world.barrier()
    began = time.perf_counter()
    if ranks.size == world.size or world.rank == 0:
        run_tasks(ranks, list(range(count)), [1.0] * count, work, schedule=options.schedule)
    world.barrier()
    return time.perf_counter() - began


def main(options: Options) -> None:
    """Measure, print and save."""
    if options.schedule not in SCHEDULES or min(options.at_once, options.chunks, options.iterations, options.repetitions) < 1:
        raise InputError(f"--schedule is one of {', '.join(SCHEDULES)}, and --at-once, --chunks, --iterations and --repetitions are at least 1.")
    torch.set_num_threads(1)
    with open_world(options.device) as world, Console(world.rank) as console:
        case = dataclasses.replace(next(case for case in attack.CASES if case.net == "lenet"), attacks=options.at_once)
        problem = attack.pose(case, 0, world.device)
        engine = attack.Engine(problem, attack.settings_for(problem, options.iterations), options.mode, options.at_once)
        alone = World(device=world.device)
        seconds(world, world, engine, dataclasses.replace(options, chunks=1))  # every rank records its program
        one, all_ranks = [], []
        for _ in range(options.repetitions):
            one.append(seconds(world, alone, engine, options))
            all_ranks.append(seconds(world, world, engine, options))
        ratios = [a / b for a, b in zip(one, all_ranks, strict=True)]
        ratio = statistics.median(ratios)
        console.say(
            f"{world.size} ranks, {options.chunks} chunks of {options.at_once} attacks each, {options.iterations} iterations, {options.mode}, "
            f"{options.schedule}: {statistics.median(one):.2f} s on one rank, {statistics.median(all_ranks):.2f} s on all, {ratio:.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f} over {options.repetitions} turns), efficiency {ratio / world.size:.1%}"
        )
        if world.rank == 0:
            told = {"format": 1, "options": {**vars(options), "out": str(options.out)}, "ranks": world.size, "one_s": one, "all_s": all_ranks, "ratio": ratio}
            told |= {"hardware": attack.hardware(attack.Options(device=options.device)), "versions": attack.versions()}
            save(told, options.out, console)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except InputError as error:
        raise SystemExit(f"ranks.py: {error}") from error
