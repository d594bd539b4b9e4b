"""How the cost of a round grows: with clients, parameters, image size and ranks. One figure, one CSV.

    python recipes/bench/growth.py                                  on one core, about half an hour
    python recipes/bench/growth.py --small                          seconds
    torchrun --nproc-per-node 2 recipes/bench/growth.py --axes clients --out runs/growth2     more ranks: run once for each number, then --join
    python recipes/bench/growth.py --join runs/growth/growth.csv runs/growth2/growth.csv      redraw over several runs

    clients     10 to 1000 in a round, small net, 10 images of 28 px each
    parameters  5 k to 86 M: perceptrons, ResNet-18, ViT-B/16; 4 clients of one batch of 4 at 32 px (the ViT at 224 px)
    pixels      28 to 224 px, small net, 4 clients of one batch of 8
    ranks       the largest size that was measured on every number of ranks, once rows of several numbers are joined; on a CPU one rank's seconds are
                the processor's and several ranks' the clock's, which agree on a machine that does nothing else
    exponent    of the straight line through the logarithms of seconds and size; 1 is linear. Sizes whose cost has not yet begun to show make it smaller.
    memory      the most that a round takes beyond what was in use before it: of the device on a GPU, of the process on a CPU.

Nothing may grow faster than linearly: clients and parameters by their number, pixels by their square.
"""

from __future__ import annotations

import csv
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attack  # the benchmarks beside this one
import clients as parts
import torch
import tyro
from torch import nn

from gidef.clients.local import LocalSettings
from gidef.errors import InputError
from gidef.models import SmallNet, make_backbone
from gidef.parallel import World, mean_over_world, open_world
from gidef.report import Console
from gidef.rng import generator
from gidef.rounds.algorithm import run_round
from gidef.rounds.server import fed_avg
from gidef.types import Client

FIELDS = ("axis", "size", "ranks", "seconds", "rounds_per_s", "mib", "device")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Cost of a round as things grow."""

    axes: tuple[str, ...] = ()
    """Of clients, parameters, pixels; none given: all."""
    repetitions: int = 3
    device: str = "cpu"
    small: bool = False
    join: tuple[Path, ...] = ()
    """Measure nothing; draw these CSVs together."""
    out: Path = Path("runs/growth")


@dataclass(frozen=True)
class Case:
    """size: what the axis counts."""

    size: int
    net: Callable[[], nn.Module]
    clients: int
    examples: int
    batch: int
    pixels: int


def small() -> nn.Module:
    return SmallNet(10, 3)


def perceptron(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, 10))


def timm(name: str, pixels: int, **more: Any) -> Callable[[], nn.Module]:
    return lambda: make_backbone(name, num_classes=10, image_shape=(3, pixels, pixels), seed=0, **more)


def tiny() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 10))


AXES: dict[str, list[Case]] = {
    "clients": [Case(count, small, count, 10, 10, 28) for count in (10, 30, 100, 300, 1000)],
    "parameters": [
        Case(4_882, tiny, 4, 4, 4, 32), Case(0, perceptron(32), 4, 4, 4, 32), Case(0, perceptron(320), 4, 4, 4, 32),
        Case(0, timm("resnet18", 32, small_stem=True, norm="group"), 4, 4, 4, 32), Case(0, timm("vit_base_patch16_224", 224, small_stem=False, norm="keep"), 4, 4, 4, 224),
    ],
    "pixels": [Case(side, small, 4, 8, 8, side) for side in (28, 56, 112, 224)],
}  # fmt: skip
SMALL = {"clients": (0, 2), "parameters": (0, 2), "pixels": (0, 1)}


def measure(axis: str, case: Case, options: Options, world: World) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = case.net().to(world.device)
    draw = generator(0, "growth")
    shape = (case.examples, 3, case.pixels, case.pixels)
    few = [  # clients share images, so that memory is the round's own
        (torch.randint(256, shape, generator=draw, dtype=torch.uint8).to(world.device), torch.randint(10, (case.examples,), generator=draw).to(world.device))
        for _ in range(min(case.clients, 10))
    ]
    cohort = [Client(k, *few[k % len(few)]) for k in range(case.clients)]
    part, server = parts.participation(parts.Plain(net), LocalSettings(batch_size=case.batch, optimiser="sgd", lr=0.01))
    over = functools.partial(mean_over_world(world, groups=part.groups), template=part.template(), metric_names=("loss",))
    by_cpu = world.device.type == "cpu" and world.size == 1

    def turn() -> float:
        world.barrier()
        watch = attack.Watch(world.device)
        run_round(server, cohort, train=part.train_group, step=fed_avg(), over_cohort=over)
        took = watch.read()
        return took.cpu if by_cpu else took.wall

    turn()
    with attack.peak_memory(world.device) as memory:
        seconds = [turn()]
    seconds += [turn() for _ in range(options.repetitions - 1)]
    size = case.size or sum(p.numel() for p in net.parameters())
    middle = statistics.median(seconds)
    return dict(zip(FIELDS, (axis, size, world.size, middle, 1 / middle, memory.get("mib"), str(world.device)), strict=True))


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def lines(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Rows by axis and number of ranks, by size."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["size"]):
        found.setdefault((row["axis"], row["ranks"]), []).append(row)
    return found


def by_ranks(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Rows by axis and size, by ranks: of each axis that was measured on several numbers of ranks, its largest size that all of them have. Of rows that
    are there twice, the last."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for axis in AXES:
        cells = {(row["size"], row["ranks"]): row for row in rows if row["axis"] == axis}
        ranks = sorted({number for _, number in cells})
        common = [size for size, _ in cells if all((size, number) in cells for number in ranks)]
        if len(ranks) > 1 and common:
            found[axis, max(common)] = [cells[max(common), number] for number in ranks]
    return found


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rounds per second and memory against each axis, and against ranks where there are several numbers of them; a dotted line is linear growth."""
    import matplotlib.pyplot as plt

    axes, against = [axis for axis in AXES if any(row["axis"] == axis for row in rows)], by_ranks(rows)
    columns = len(axes) + bool(against)
    figure, places = plt.subplots(2, columns, figsize=(4 * columns, 6), squeeze=False, sharex="col", layout="constrained")
    for column, axis in enumerate(axes):
        power = 2 if axis == "pixels" else 1
        for (name, ranks), line in lines(rows).items():
            if name != axis:
                continue
            x, rate = [row["size"] for row in line], [row["rounds_per_s"] for row in line]
            places[0, column].loglog(x, rate, marker="o", label=f"{ranks} rank{'s' * (ranks > 1)}")
            places[0, column].loglog(x, [rate[0] * (x[0] / size) ** power for size in x], ":", color="grey")
            if all(row["mib"] is not None for row in line):
                places[1, column].semilogx(x, [row["mib"] for row in line], marker="o")
        places[0, column].set_title(axis)
        places[0, column].legend()
        places[1, column].set_xlabel({"clients": "clients in a round", "parameters": "parameters", "pixels": "image side, pixels"}[axis])
        places[1, column].set_ylim(0, 1.05 * places[1, column].get_ylim()[1])
        if axis == "pixels":  # less than a decade: its ticks are the sizes
            sizes = sorted({row["size"] for (name, _), line in lines(rows).items() if name == axis for row in line})
            places[1, column].set_xticks(sizes, map(str, sizes))
            places[1, column].minorticks_off()
    for (axis, size), line in against.items():
        ranks, rate = [row["ranks"] for row in line], [row["rounds_per_s"] for row in line]
        places[0, -1].loglog(ranks, rate, marker="o", label=f"{size:,} {axis}")
        places[0, -1].loglog(ranks, [rate[0] * number / ranks[0] for number in ranks], ":", color="grey")
        if all(row["mib"] is not None for row in line):
            places[1, -1].semilogx(ranks, [row["mib"] for row in line], marker="o")
    if against:
        places[0, -1].set_title("ranks")
        places[0, -1].legend()
        places[1, -1].set_xlabel("ranks")
        places[1, -1].set_ylim(0, 1.05 * places[1, -1].get_ylim()[1])
        shown = sorted({row["ranks"] for line in against.values() for row in line})
        places[1, -1].set_xticks(shown, map(str, shown))
        places[1, -1].minorticks_off()
    places[0, 0].set_ylabel("rounds per second")
    places[1, 0].set_ylabel("memory of a round, MiB")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return [
            {**row, "size": int(row["size"]), "ranks": int(row["ranks"]), "mib": float(row["mib"]) if row["mib"] else None}
            | {name: float(row[name]) for name in ("seconds", "rounds_per_s")}
            for row in csv.DictReader(file)
        ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(rows)


def main(options: Options) -> list[dict[str, Any]]:
    """Measure (or read), draw, say the exponents; returns the rows."""
    if unknown := sorted(set(options.axes) - set(AXES)):
        raise InputError(f"--axes {' '.join(unknown)}: choose of {', '.join(AXES)}.")
    if options.repetitions < 1:
        raise InputError("--repetitions: expected at least 1.")
    if missing := [str(path) for path in options.join if not path.exists()]:
        raise InputError(f"--join: {', '.join(missing)} is not there: give the CSVs of earlier runs.")
    torch.set_num_threads(1)
    with open_world(options.device) as world, Console(world.rank) as console:
        rows = [row for path in options.join for row in read(path)]
        for axis in () if options.join else options.axes or tuple(AXES):
            for number in SMALL[axis] if options.small else range(len(AXES[axis])):
                rows.append(measure(axis, AXES[axis][number], options, world))
                console.say(f"{axis} {rows[-1]['size']}: {rows[-1]['rounds_per_s']:.3g} rounds/s, {rows[-1]['mib'] or float('nan'):.0f} MiB")
                if world.rank == 0:
                    write(options.out / "growth.csv", rows)  # after each: a long run that is stopped keeps what it has
        for (axis, ranks), line in lines(rows).items():
            if len(line) > 1:
                power = exponent([row["size"] for row in line], [row["seconds"] for row in line])
                console.say(f"{axis}, {ranks} rank(s): seconds grow with the power {power:.2f} of the size (linear: {2 if axis == 'pixels' else 1})")
        for (axis, size), line in by_ranks(rows).items():
            gains = ", ".join(f"{row['ranks']}: {row['rounds_per_s'] / line[0]['rounds_per_s']:.2f}" for row in line)
            console.say(f"{axis} {size}: rounds per second over those of {line[0]['ranks']} rank(s), by ranks: {gains}")
        if world.rank == 0:
            write(options.out / "growth.csv", rows)
            draw(options.out / "growth.png", rows)
            console.say(f"saved {options.out / 'growth.csv'} and growth.png")
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except InputError as error:
        raise SystemExit(f"growth.py: {error}") from error
