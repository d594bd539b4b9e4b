"""What it saves to average an update's sum over ranks bucket by bucket while the rest of it travels, beside one all-reduce and the mean after it.

    torchrun --nproc-per-node 2 recipes/bench/sums.py           on two cores, a minute; between hosts, the network decides

Each rank has one client, whose update is there already. Time is the wall's, from a barrier to the mean on the slowest rank: encoding the update, the sum
and the mean. Turns of both forms alternate, and their means must agree.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import attack  # the benchmark beside this one
import torch
import tyro
from saving import save

from gidef.errors import InputError
from gidef.parallel import mean_over_world, open_world
from gidef.parallel.cohort import BUCKET
from gidef.parallel.world import World
from gidef.report import Console
from gidef.rng import generator
from gidef.types import Client, Update
from gidef.updates import CohortMean


@dataclass(frozen=True, kw_only=True)
class Options:
    """The sum of an update over ranks."""

    parameters: int = 25_000_000
    tensors: int = 60
    reduction: Literal["fixed_point", "float32"] = "fixed_point"
    repetitions: int = 5
    device: str = "cpu"
    out: Path = Path("runs/bench_sums.json")


def seconds(world: World, round_of: Callable[[], CohortMean]) -> tuple[float, CohortMean]:
    """Wall seconds of the slowest rank."""
    world.barrier()
    began = time.perf_counter()
    mean = round_of()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return max(world.all_gather_json(time.perf_counter() - began)), mean


def main(options: Options) -> None:
    """Measure, print and save."""
    if min(options.parameters, options.tensors, options.repetitions) < 1 or options.parameters < options.tensors:
        given = f"--parameters {options.parameters} --tensors {options.tensors} --repetitions {options.repetitions}"
        raise InputError(f"{given}: each is at least 1, and there are not more tensors than parameters.")
    if options.parameters <= BUCKET:
        raise InputError(f"--parameters {options.parameters}: a sum is cut into buckets from {BUCKET + 1} on. Give more.")
    torch.set_num_threads(1)
    with open_world(options.device) as world, Console(world.rank) as console:
        if world.size == 1:
            raise InputError("one rank has nothing to sum: torchrun --nproc-per-node 2 recipes/bench/sums.py")
        each = options.parameters // options.tensors
        delta = {f"layer{i:03}": torch.randn(each, generator=generator(0, "sums", world.rank, i)).to(world.device) for i in range(options.tensors)}
        cohort = [Client(number, torch.empty(3, 1, 1, 1, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)) for number in range(world.size)]

        def form(overlap_above: float) -> Callable[[], CohortMean]:
            run = mean_over_world(world, reduction=options.reduction, overlap_above=overlap_above)
            return lambda: run(lambda client, worker: Update(delta, client.num_examples), cohort, template=delta)

        once, cut = form(math.inf), form(-1.0)
        for _ in range(2):  # from the third round on it is cut
            seconds(world, once), seconds(world, cut)
        plain, overlapped = [], []
        for _ in range(options.repetitions):
            took, expected = seconds(world, once)
            plain.append(took)
            took, mean = seconds(world, cut)
            overlapped.append(took)
            differences = max(float((mean.delta[name] - expected.delta[name]).abs().max()) for name in delta)
            if differences > (0.0 if options.reduction == "fixed_point" else 1e-6 * world.size):
                raise RuntimeError(f"the means of both forms differ by {differences:.2g}")
        ratios = [a / b for a, b in zip(plain, overlapped, strict=True)]
        console.say(
            f"{world.size} ranks, {each * options.tensors:,} parameters, {options.reduction}: one all-reduce and the mean after it {statistics.median(plain):.2f} s, "
            f"averaged while it travels {statistics.median(overlapped):.2f} s, {statistics.median(ratios):.2f} times as fast "
            f"({min(ratios):.2f} to {max(ratios):.2f} over {options.repetitions} turns)"
        )
        if world.rank == 0:
            told = {"format": 1, "options": {**vars(options), "out": str(options.out)}, "ranks": world.size, "plain_s": plain, "overlapped_s": overlapped}
            told |= {"ratio": statistics.median(ratios), "hardware": attack.hardware(attack.Options(device=options.device)), "versions": attack.versions()}
            save(told, options.out, console)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except InputError as error:
        raise SystemExit(f"sums.py: {error}") from error
