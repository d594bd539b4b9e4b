"""`gidef profile RECIPE`: where the seconds of a recipe's training go."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from gidef import build, config, importing
from gidef.errors import InputError
from gidef.job import settle_threads
from gidef.main import parse
from gidef.parallel import World, open_world
from gidef.report import Console
from gidef.report.files import writing
from gidef.runs import Run, fingerprint, run_key
from gidef.spans import PREFIX, watched
from gidef.training import train

SHARES = {
    "arithmetic": "arithmetic: operators of the clients' passes",
    "steps": "Python and dispatch between them",
    "data": "data: batches as the device takes them",
    "optimiser": "optimisers, clips, corrections",
    "client": "clients: weights in and out, what they keep",
    "round": "aggregation and the server's step",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "rest": "the rest: draws, the record",
}
"""Kinds of time, by the innermost stretch of `gidef.spans`; "steps" is told apart by whether an operator is running."""
TOP = 12


@dataclass(frozen=True, slots=True)
class Stretch:
    """One event in a trace, in µs. kind: a key of SHARES, or "operator"."""

    kind: str
    start: float
    end: float


@dataclass(slots=True)
class Profile:
    """seconds: of a round without the profiler, and with it.  shares: by key of SHARES, of the time with it.  costs: (name, calls, µs of its own),
    the dearest first; of kernels on a GPU.  idle: share of the time in which a GPU ran no kernel."""

    seconds: float = 0.0
    watched_s: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    costs: list[tuple[str, int, float]] = field(default_factory=list)
    idle: float | None = None

    @property
    def outside(self) -> float:
        """Share of the time outside the arithmetic."""
        return 1 - self.shares["arithmetic"]


def shares(stretches: Iterable[Stretch], start: float, end: float) -> dict[str, float]:
    """Of the time from start to end: each moment counts for the stretch that was entered last; where that is "steps" and an operator runs, for "arithmetic"."""
    marks = sorted(((edge, begins, one) for one in stretches for edge, begins in ((one.start, True), (one.end, False))), key=lambda mark: mark[:2])
    spent, inside, operators, before = dict.fromkeys(SHARES, 0.0), [], 0, start
    for moment, begins, one in marks:
        moment = min(max(moment, start), end)
        kind = inside[-1].kind if inside else "rest"
        spent["arithmetic" if kind == "steps" and operators else kind] += moment - before
        before = moment
        if one.kind == "operator":
            operators += 1 if begins else -1
        elif begins:
            inside.append(one)
        else:
            inside.remove(one)
    spent[inside[-1].kind if inside else "rest"] += end - before
    return {kind: time / max(end - start, 1e-9) for kind, time in spent.items()}


def _stretches(events: Sequence[Any]) -> Iterator[Stretch]:
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        kind = None
        if event.name.startswith(PREFIX):
            kind = event.name.removeprefix(PREFIX)
        elif event.name.startswith("Optimizer."):
            kind = "optimiser"
        elif event.name.startswith("aten::"):
            kind = "operator"
        if kind is not None:
            yield Stretch(kind, event.time_range.start, event.time_range.end)


def _is_kernel(event: Any) -> bool:
    """Of an event or of a row of events; names of stretches are repeated on the GPU, over the kernels that they cover."""
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def _idle(events: Sequence[Any], start: float, end: float) -> float | None:
    kernels = sorted((event.time_range.start, event.time_range.end) for event in events if _is_kernel(event))
    if not kernels:
        return None
    busy, reached = 0.0, start
    for begins, ends in kernels:
        busy += max(0.0, min(ends, end) - max(begins, reached))
        reached = max(reached, ends)
    return 1 - busy / (end - start)


class _Rounds:
    """Stands in the place of a run's console: hears of every round that ends, and starts and stops the clock and the profiler.

    One round to warm up, `count` with the clock alone, `count` with the profiler.
    """

    def __init__(self, console: Console, count: int, device: torch.device, trace: Path) -> None:
        self.notice, self._count, self._device, self._trace, self.found = console.notice, count, device, trace, Profile()
        self._stack = contextlib.ExitStack()

    def say(self, text: str) -> None:
        return None

    @contextlib.contextmanager
    def track(self, label: str, total: int, **_: Any) -> Iterator[_Rounds]:
        with self._stack:
            yield self

    def update(self, done: int, **_: Any) -> None:
        if done == 1:
            self._began = self._now()
        elif done == 1 + self._count:
            self.found.seconds = (self._now() - self._began) / self._count
            everywhere = _ExperimentalConfig(profile_all_threads=True)  # evaluation works on a thread of its own
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
            self._stack.enter_context(watched())
            self._profiler = self._stack.enter_context(torch.profiler.profile(activities=activities, experimental_config=everywhere))
            self._whole = self._stack.enter_context(torch.profiler.record_function("gidef rounds"))
            self._began = self._now()
        elif done == 1 + 2 * self._count:
            self.found.watched_s = (self._now() - self._began) / self._count
            self._stack.close()
            self._read()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _read(self) -> None:
        events = self._profiler.events()
        whole = next(event.time_range for event in events if event.name == "gidef rounds" and event.device_type == DeviceType.CPU)
        self.found.shares = shares(_stretches(events), whole.start, whole.end)
        self.found.idle = _idle(events, whole.start, whole.end)
        on_gpu = self.found.idle is not None
        for row in self._profiler.key_averages():
            if on_gpu and _is_kernel(row):
                self.found.costs.append((row.key, row.count, row.self_device_time_total))
            elif not on_gpu and not row.key.startswith((PREFIX, "gidef rounds", "Optimizer.")):
                self.found.costs.append((row.key, row.count, row.self_cpu_time_total))
        self.found.costs.sort(key=lambda row: -row[2])
        self._profiler.export_chrome_trace(str(self._trace))


def profile(place: str, args: Sequence[str]) -> dict[str, Profile]:
    """Train each chosen defence for some rounds, one at a time and one client at a time, print where the time went and write a trace of each.

    Evaluation is in line, `speed.overlap_evaluation` or not: a share of the time is of one thread's.

    Args:    place: a recipe's file; its RECIPE, with --small its SMALL, or what `file.py:NAME` names.
             args:  the recipe's, and --out, --profiled-rounds.
    Raises:  InputError for what is no recipe, a bad one, a folder that cannot be written to, or several ranks.
    """
    own, rest = _options(args)
    recipe, name = _recipe(place, rest, small=own.small)
    if own.profiled_rounds < 1:
        raise InputError(f"--profiled-rounds {own.profiled_rounds}: give at least 1.")
    folder, found = Path(own.out or Path("profile") / name), {}
    with open_world(recipe.speed.device, recipe.speed.timeout_s) as world, Console(rank=world.rank) as console:
        if world.size > 1:
            raise InputError(f"gidef profile looks at one rank, and this is one of {world.size}: start it without torchrun.")
        settle_threads(recipe)
        rounds = 1 + 2 * own.profiled_rounds
        recipe = dataclasses.replace(
            recipe, rounds=dataclasses.replace(recipe.rounds, count=rounds, patience=None),
            speed=dataclasses.replace(recipe.speed, workers=1, overlap_evaluation=False), resume=False,
        )
        setting = build.load_setting(recipe, world=world, notice=console.notice)
        with writing(folder):  # before the minutes that the rounds take
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        console.heading(f"{name}: where the time of a round goes")
        for key, chosen in recipe.chosen.items():
            chosen = chosen.at(chosen.low) if isinstance(chosen, config.Matched) else chosen
            trace = folder / f"{run_key(key, recipe.seeds[0])}.json.gz"
            found[key] = _profiled(setting, world, console, key, chosen, own.profiled_rounds, trace)
            _show(console, key, found[key], trace)
    return found


def _profiled(setting: build.Setting, world: World, console: Console, key: str, chosen: Any, count: int, trace: Path) -> Profile:
    rounds = _Rounds(console, count, world.device, trace)
    with tempfile.TemporaryDirectory(prefix="gidef-profile-") as scratch:
        train(Run(setting, world, Path(scratch), rounds, None, fingerprint(setting.recipe, setting.dataset)), key, chosen, setting.recipe.seeds[0])
    return rounds.found


def _options(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="gidef profile RECIPE", add_help=False, allow_abbrev=False)
    parser.add_argument("--out")
    parser.add_argument("--profiled-rounds", type=int, default=2)
    parser.add_argument("--small", action="store_true")
    return parser.parse_known_args(list(args))


def _recipe(place: str, args: Sequence[str], *, small: bool) -> tuple[config.Recipe, str]:
    path, _, attribute = place.rpartition(":") if place.rpartition(":")[0].endswith(".py") else (place, "", "SMALL" if small else "RECIPE")
    if not path.endswith(".py"):
        raise InputError(f"{place} is no recipe's file: give one, such as recipes/tiny.py.")
    recipe = importing.load(f"{path}:{attribute}")
    if not isinstance(recipe, config.Recipe):
        raise InputError(f"{attribute} in {path} is a {type(recipe).__name__}: expected a Recipe.")
    name = Path(path).stem
    recipe = parse(recipe, list(args), name)
    found = config.problems(recipe)
    if found:
        raise InputError("\n".join(found))
    return recipe, name


def _show(console: Console, key: str, found: Profile, trace: Path) -> None:
    console.say("")
    console.say(
        f"{key}: {found.seconds:.3g} s a round ({found.watched_s:.3g} s under the profiler, whose own cost swells the many small ones); "
        f"{found.outside:.0%} outside the arithmetic" + ("" if found.idle is None else f"; the GPU idles {found.idle:.0%} of the time")
    )
    where = Table(box=box.SIMPLE_HEAD)
    where.add_column("share of the time", justify="right")
    where.add_column("goes to")
    for kind, words in SHARES.items():
        where.add_row(f"{found.shares[kind]:.1%}", words)
    console.table(where)
    top, all_of_it = Table(box=box.SIMPLE_HEAD), sum(cost for _, _, cost in found.costs) or 1.0
    top.add_column("top costs")
    for header in ("calls", "ms", "share"):
        top.add_column(header, justify="right")
    for name, calls, cost in found.costs[:TOP]:
        top.add_row(name[:80], str(calls), f"{cost / 1e3:.3g}", f"{cost / all_of_it:.1%}")
    console.table(top)
    console.say(f"trace  {trace}  (open it in chrome://tracing or ui.perfetto.dev)")
