"""What an attack without second derivatives costs, and what it finds, beside double backward: the same nets, images, starts and iterations, in one run.

    python recipes/bench/first_order.py                     on one core, ten minutes
    python recipes/bench/first_order.py --small             under a minute

    double backward         the gradient of the matching distance through the client's gradient
    forward over reverse    the derivative of the input's gradient along v = ∂distance/∂g, exactly
    central difference      the same from two plain gradients of the input, at θ ± h v, with kinks free to open and close
    on the module           the central difference on the module as it is, one attack after another, with kinks held (`invert_large`)

Settings: "naive", those of A0 (Adam, curved kinks), and "published", `breaching`'s preset `invertinggradients` (Adam on the gradient's sign, flat kinks).

    ms        of one iteration of one attack: the median over repetitions in which all contenders take turns, from the end of the first iteration on.
    clock     CPU time of this process where it computes on one core, else the wall's.
    MiB       the most memory in use in a turn, above what was in use before: of all attacks at once where they are one program, of one elsewhere.
    PSNR      mean over the attacks after all iterations, and its difference from double backward's, paired, with a 95 % bootstrap interval.
    distance  the median over the attacks of what is left of the matching distance.

CIFAR-10 is read from GIDEF_DATA if it is there, else images are synthetic.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attack  # the benchmark beside this one: its nets, images, clock and published settings
import torch
import tyro
from rich import box
from rich.table import Table
from saving import save
from torch import Tensor, nn

from gidef.attack import Matching, Programs, drain, naive
from gidef.attack.large import invert_large
from gidef.errors import InputError
from gidef.metrics import bootstrap_interval
from gidef.precision import full_float32
from gidef.report import Console
from gidef.types import Observation, Tensors

FORMS = {"double backward": "double_backward", "forward over reverse": "forward_over_reverse", "central difference": "central_difference"}
MODULE, REFERENCE = "on the module", "double backward"
SETTINGS = ("naive", "published")
MODES = ("loop", "traced")
CASES = (
    attack.Case(net="convnetsmall", title="ConvNetSmall, 32 px", attacks=8, iterations=100, slice=8),
    attack.Case(net="resnet20", title="ResNet-20, 32 px", attacks=8, iterations=100, slice=6),
)
SMALL = {"attacks": 2, "iterations": 6, "slice": 2}


@dataclass(frozen=True, kw_only=True)
class Options:
    """First-order forms of an attack against double backward."""

    models: tuple[str, ...] = ()
    """Of convnetsmall, resnet20; none given: both."""
    settings: tuple[str, ...] = SETTINGS
    """Of naive, published."""
    attacks: int | None = None
    """Of every case; None: the case's own."""
    iterations: int | None = None
    """Of every attack; None: the case's own."""
    repetitions: int = 5
    """Turns of every contender."""
    seed: int = 0
    """Of nets, images and starts."""
    threads: int = 1
    device: str = "cpu"
    small: bool = False
    """Few attacks and iterations."""
    out: Path = Path("runs/bench_first_order.json")
    """Results with hardware, versions and spread."""


class Normalised(nn.Module):
    """A net of normalised images, on images in [0, 1]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - attack.MEAN) / attack.STD)


@dataclass
class OnModule:
    """`invert_large` on a problem, in the shape of `attack.Engine`."""

    problem: attack.Problem
    matching: Matching
    programs: Programs = field(default_factory=Programs)

    def __post_init__(self) -> None:
        self.module = Normalised(self.problem.net)
        named = lambda tensors: {f"net.{name}": tensor for name, tensor in tensors.items()}  # noqa: E731
        seen = self.problem.observations()
        self.observations: list[Observation] = [dataclasses.replace(one, params=named(one.params), update=named(one.update)) for one in seen]

    def start(self, every: int, attacks: int | None = None) -> Any:
        """The first attack, running; `attacks` must be 1: this is one after another."""
        return self.of(0, every)

    def of(self, index: int, every: int) -> Any:
        return invert_large(self.observations[index], self.module, self.matching, seed=0, chunk=((index, 0),), every=every)

    def whole(self) -> Tensors:
        """Of all attacks."""
        rows = [drain(self.of(index, self.matching.iterations)) for index in range(len(self.observations))]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def settings_for(name: str, problem: attack.Problem, iterations: int, form: str) -> Matching:
    if name == "published":
        return attack.settings_for(problem, iterations, form=form)
    starts = problem.starts.clamp(0, 1).cpu()
    shape = tuple(problem.images.shape[2:])
    return naive(image_shape=shape, num_classes=problem.case.classes, iterations=iterations, form=form, start=lambda index, restart: (starts[index], None))


def measure(case: attack.Case, name: str, options: Options, console: Console) -> dict[str, Any]:
    """A case under one of the settings: see the top of this file."""
    device = torch.device(options.device)
    by_cpu = device.type == "cpu" and options.threads == 1
    problem = attack.pose(case, options.seed, device)
    engines: dict[str, tuple[Any, int | None]] = {}
    for title, form in FORMS.items():
        matching = settings_for(name, problem, case.iterations, form)
        engines |= {f"{title}, {mode}": (attack.Engine(problem, matching, mode, case.attacks), 1 if mode == "loop" else None) for mode in MODES}
    on_module = OnModule(problem, settings_for(name, problem, case.iterations, "central_difference"))
    engines[MODULE] = on_module, 1
    contenders = {title: attack.Contender(title) for title in engines}
    for title, (engine, attacks) in engines.items():
        attack.warm_up(contenders[title], engine, attacks)
        for note in contenders[title].notes:
            console.notice(f"{case.name}, {name}, {title}: {note}")
    with console.track(f"{case.name}, {name}: turn", options.repetitions) as track:
        for turn in range(options.repetitions):
            for title, (engine, attacks) in engines.items():
                attack.time_engine(contenders[title], engine, by_cpu, attacks)
            track.update(turn + 1)
    for title, (engine, attacks) in engines.items():  # a turn of its own: looking at memory slows what follows
        with attack.peak_memory(device) as memory:
            attack.time_engine(attack.Contender(title), engine, by_cpu, attacks)
        contenders[title].peak_mib = memory.get("mib")
    found: dict[str, Tensors] = {}
    for title in FORMS:
        console.say(f"  {case.attacks} whole attacks, {title}")
        found[title] = drain(engines[f"{title}, traced"][0].start(case.iterations))
    console.say(f"  {case.attacks} whole attacks, {MODULE}")
    found[MODULE] = on_module.whole()
    quality = {title: {"psnr_db_all": attack.psnr(rows["images"], problem), "fit": float(rows["fit"].median())} for title, rows in found.items()}
    for one in quality.values():
        apart = [ours - reference for ours, reference in zip(one["psnr_db_all"], quality[REFERENCE]["psnr_db_all"], strict=True)]
        low, high = bootstrap_interval(apart, seed=0)
        one |= {"psnr_db": statistics.fmean(one["psnr_db_all"]), "difference_db": {"mean": statistics.fmean(apart), "low": low, "high": high}}
    return {
        "case": case.name, "settings": name, "attacks": case.attacks, "batch": case.batch, "iterations": case.iterations,
        "start_psnr_db": statistics.fmean(attack.psnr(problem.starts.clamp(0, 1), problem)),
        "contenders": {title: contender.summary() for title, contender in contenders.items()}, "quality": quality,
    }  # fmt: skip


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Cost, then quality."""
    cost = Table(title="ms per iteration of one attack: median ± half of what lies between the fastest and the slowest turn; MiB", box=box.SIMPLE)
    for header in ("case", "settings", "form", *(f"{mode}{unit}" for mode in MODES for unit in ("", " MiB"))):
        cost.add_column(header, justify="left" if header in ("case", "settings", "form") else "right", no_wrap=True)
    quality = Table(title="after the same iterations from the same starts", box=box.SIMPLE)
    for header in ("case", "settings", "form", "PSNR dB", "beside double backward", "distance"):
        quality.add_column(header, justify="left" if header in ("case", "settings", "form") else "right", no_wrap=True)
    for row in rows:
        for title in (*FORMS, MODULE):
            cells = []
            for mode in MODES:
                one = row["contenders"].get(MODULE if title == MODULE and mode == "loop" else f"{title}, {mode}")
                ms, mib = (one["ms"], one["peak_mib"]) if one else (None, None)
                cells += ["–" if ms is None else f"{ms['median']:.3g} ± {(ms['max'] - ms['min']) / 2:.2g}", "–" if mib is None else f"{mib:.0f}"]
            cost.add_row(row["case"], row["settings"], title, *cells)
            found = row["quality"][title]
            apart = found["difference_db"]
            beside = "" if title == REFERENCE else f"{apart['mean']:+.2f} [{apart['low']:+.2f}, {apart['high']:+.2f}]"
            quality.add_row(row["case"], row["settings"], title, f"{found['psnr_db']:.2f}", beside, f"{found['fit']:.2g}")
    return [cost, quality]


def chosen(options: Options) -> tuple[Options, list[attack.Case]]:
    """The options with what --small makes of them, and the cases. Raises InputError for unknown names."""
    for what, given, known in (("models", options.models, [case.net for case in CASES]), ("settings", options.settings, SETTINGS)):
        if unknown := sorted(set(given) - set(known)):
            raise InputError(f"--{what} {' '.join(unknown)}: choose of {', '.join(known)}.")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {options.device}: PyTorch sees no GPU here: use cpu.")
    if min(options.repetitions, options.threads, 1 if options.iterations is None else options.iterations, 1 if options.attacks is None else options.attacks) < 1:
        raise InputError("--repetitions, --threads, --attacks, --iterations: expected at least 1.")
    if not options.settings:
        raise InputError(f"--settings: expected at least one of {', '.join(SETTINGS)}.")
    options = dataclasses.replace(options, repetitions=min(options.repetitions, 3) if options.small else options.repetitions)
    given = {name: getattr(options, name) for name in ("attacks", "iterations") if getattr(options, name) is not None}
    cases = []
    for case in CASES:
        if not options.models or case.net in options.models:
            case = dataclasses.replace(case, **{**(SMALL if options.small else {}), **given})
            cases.append(dataclasses.replace(case, slice=min(case.slice, case.iterations)))
    return options, cases


def main(options: Options) -> dict[str, Any]:
    """Measure, print and save; returns what was saved."""
    options, cases = chosen(options)
    torch.set_num_threads(options.threads)
    full_float32()
    told = attack.Options(device=options.device, threads=options.threads)
    results = {
        "format": 1, "options": {**dataclasses.asdict(options), "out": str(options.out)}, "hardware": attack.hardware(told), "versions": attack.versions(),
        "clock": "cpu" if torch.device(options.device).type == "cpu" and options.threads == 1 else "wall", "rows": [],
    }  # fmt: skip
    with Console() as console:
        for case in cases:
            console.heading(f"{case.title}: {case.attacks} attacks of {case.batch}, {case.iterations} iterations")
            for name in options.settings:
                results["rows"].append(measure(case, name, options, console))
                save(results, options.out, console)  # a long run that is stopped keeps what it has
        for table in tables(results["rows"]):
            console.table(table)
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except InputError as error:
        raise SystemExit(f"first_order.py: {error}") from error
