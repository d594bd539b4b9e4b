"""K clients as one program against K clients one after another: the same clients, batches and steps, in turns, in one process.

    python recipes/bench/clients.py                 on one core, about ten minutes
    python recipes/bench/clients.py --small         seconds
    python recipes/bench/clients.py --device cuda

    ms        of one client's step, everything that a client does in a round included; CPU time of this process where it computes on one core, so that
              other jobs do not count, else the wall's. Median over turns.
    ratio     the loop's ms over the program's in the same turn: median, least and greatest.
    chosen    what the calibration of `speed.clients_at_once=0` takes, with its ratio: 1.00 where it takes the loop.
    distance  of the updates of one round from the loop's, over the largest entry of the update.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attack  # the benchmark beside this one
import torch
import tyro
from rich import box
from rich.table import Table
from torch import nn

from gidef import at_once, config
from gidef.build import Shape, make_defence
from gidef.clients.local import LocalSettings
from gidef.clients.participate import Participation, shared_names
from gidef.defence.base import Plain
from gidef.errors import InputError
from gidef.precision import full_float32
from gidef.report import Console
from gidef.types import Client, ServerState, Update


@dataclass(frozen=True, kw_only=True)
class Options:
    """Clients at once against one by one."""

    cases: tuple[str, ...] = ()
    """Of the table's rows; none given: all."""
    at_once: tuple[int, ...] = (2, 4, 8, 16, 32)
    """K."""
    steps: int = 4
    """Of every client."""
    repetitions: int = 7
    """Turns."""
    threads: int = 1
    device: str = "cpu"
    small: bool = False
    out: Path = Path("runs/bench_clients.json")


def convnet(*widths: int, classes: int = 10) -> nn.Sequential:
    """Strided convolutions with GroupNorm and ReLU, pooling, a linear layer, for 32 px."""
    layers: list[nn.Module] = []
    for before, after in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(32 // 2 ** len(widths)), nn.Flatten(), nn.Linear(widths[-1], classes))


def simple_cnn() -> nn.Sequential:
    """pfl-research's net for CIFAR-10, 1,626,442 parameters, without its dropout, which has no seed of a client's."""
    convolutions = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(12544, 128), nn.ReLU(), nn.Linear(128, 10))
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


def mlp(width: int = 98) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, 10))


def plain(net: Callable[[], nn.Module]) -> Callable[[], Plain]:
    def make() -> Plain:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Plain(net())

    return make


def defended(chosen: Any) -> Callable[[], Any]:
    return lambda: make_defence(chosen, config.Recipe(), Shape(10, (3, 32, 32)), seed=0).player()


@dataclass(frozen=True)
class Case:
    name: str
    player: Callable[[], Any]
    batch: int
    optimiser: str = "sgd"


CASES = (
    Case("GN CNN 4 k, batch 4", plain(lambda: convnet(16, 24)), 4),
    Case("GN CNN 57 k, batch 2", plain(lambda: convnet(32, 64, 64)), 2),
    Case("GN CNN 57 k, batch 10", plain(lambda: convnet(32, 64, 64)), 10),
    Case("MLP 302 k, batch 10", plain(mlp), 10),
    Case("small net, batch 10", defended(config.Undefended()), 10),
    Case("small net, batch 10, Adam", defended(config.Undefended()), 10, "adam"),
    Case("learned perturbation, batch 10", defended(config.LearnedPerturbation()), 10, "adam"),
    Case("isotropic noise, batch 10", defended(config.IsotropicNoise()), 10),
    Case("simple_cnn 1.6 M, batch 10", plain(simple_cnn), 10),
)


class NoStore:
    """What clients keep is dropped: they are all new."""

    def get(self, client_id: int, version: int | None) -> None:
        return None

    def put(self, client_id: int, round: int, tensors: dict) -> None:
        return None


def clients(count: int, examples: int, device: torch.device) -> list[Client]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, examples, 3, 32, 32), generator=draw, dtype=torch.uint8).to(device)
    labels = torch.randint(10, (count, examples), generator=draw).to(device)
    return [Client(k, images[k], labels[k]) for k in range(count)]


def participation(player: Any, settings: LocalSettings) -> tuple[Participation, ServerState]:
    initial = {name: p.detach().clone() for name, p in player.model.named_parameters()}
    if player.kept is not None:
        initial |= {f"decoder.{name}": p.detach().clone() for name, p in player.kept.named_parameters()}
    shared = shared_names(initial, (), "full")
    return Participation([player], initial, shared, settings, NoStore(), seed=0, rounds=10), ServerState({name: initial[name] for name in shared}, round=5)


def measure(case: Case, options: Options, console: Console) -> dict[str, Any]:
    device, by_cpu = torch.device(options.device), torch.device(options.device).type == "cpu" and options.threads == 1
    player = case.player()
    for module in (player.model, player.kept):
        if module is not None:
            module.to(device)
    settings = LocalSettings(batch_size=case.batch, optimiser=case.optimiser, lr=0.01)
    part, server = participation(player, settings)
    most = max(options.at_once)
    cohort = clients(most, options.steps * case.batch, device)

    def spend(size: int) -> tuple[float, list[Update]]:
        """ms per client and step."""
        watch, updates = attack.Watch(device), []
        for first in range(0, most, size):
            updates += part.train_group(server, cohort[first : first + size])
        took = watch.read()
        return 1e3 * (took.cpu if by_cpu else took.wall) / (most * options.steps), updates

    expected = spend(1)[1]
    apart = {size: distance(expected, spend(size)[1]) for size in options.at_once}
    ms: dict[int, list[float]] = {size: [] for size in (1, *options.at_once)}
    for _ in range(options.repetitions):
        for size, values in ms.items():
            values.append(spend(size)[0])
    ratios = {size: [a / b for a, b in zip(ms[1], values, strict=True)] for size, values in ms.items()}
    chosen, _ = at_once.calibrate(lambda groups: at_once._seconds(part, server, groups, device), cohort, slots=1)
    at_chosen = statistics.median(ratios[chosen]) if chosen in ratios else None
    parameters = sum(p.numel() for p in player.model.parameters())
    console.say(f"{case.name}: {parameters} parameters, loop {statistics.median(ms[1]):.2f} ms, chosen {chosen}")
    return {
        "case": case.name, "parameters": parameters, "batch": case.batch, "steps": options.steps, "clients": most, "ms": ms, "ratios": ratios, "distance": apart,
        "ratio": {size: statistics.median(values) for size, values in ratios.items()}, "chosen": chosen, "chosen_ratio": at_chosen,
    }  # fmt: skip


def distance(expected: list[Update], found: list[Update]) -> float:
    pairs = [(one.delta, other.delta) for one, other in zip(expected, found, strict=True)]
    largest = max(float(tensor.abs().max()) for delta, _ in pairs for tensor in delta.values())
    return max(float((delta[name] - other[name]).abs().max()) for delta, other in pairs for name in delta) / largest


def table(rows: list[dict[str, Any]], sizes: tuple[int, ...]) -> Table:
    shown = Table(box=box.SIMPLE, title="times as fast as the loop, by clients at once: median (least to greatest)")
    for column in ("case", "loop, ms", *map(str, sizes), "chosen", "distance"):
        shown.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        cells = [f"{row['ratio'][size]:.2f} ({min(row['ratios'][size]):.2f} to {max(row['ratios'][size]):.2f})" for size in sizes]
        chosen = f"{row['chosen']}" + (f": {row['chosen_ratio']:.2f}" if row["chosen_ratio"] else "")
        shown.add_row(row["case"], f"{statistics.median(row['ms'][1]):.2f}", *cells, chosen, f"{max(row['distance'].values()):.0e}")
    return shown


def main(options: Options) -> dict[str, Any]:
    """Measure, print and save; returns what was saved."""
    if unknown := sorted(set(options.cases) - {case.name for case in CASES}):
        raise InputError(f"--cases {unknown}: choose of {', '.join(repr(case.name) for case in CASES)}.")
    if min(*options.at_once, options.steps, options.repetitions, options.threads) < 1 or min(options.at_once) < 2:
        raise InputError("--at-once takes numbers from 2, --steps, --repetitions and --threads from 1.")
    if options.small:
        options = dataclasses.replace(options, cases=options.cases or (CASES[0].name,), at_once=options.at_once[:2], steps=2, repetitions=min(2, options.repetitions))
    torch.set_num_threads(options.threads)
    full_float32()  # on a GPU too
    results: dict[str, Any] = {"format": 1, "options": {**vars(options), "out": str(options.out)}, "hardware": attack.hardware(options), "versions": attack.versions(), "rows": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with Console() as console:
        for case in CASES:
            if not options.cases or case.name in options.cases:
                results["rows"].append(measure(case, options, console))
                options.out.write_text(json.dumps(results, indent=1))  # after each case: a long run that is stopped keeps what it has
        console.table(table(results["rows"], options.at_once))
        console.say(f"saved {options.out}")
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except InputError as error:
        raise SystemExit(f"clients.py: {error}") from error
