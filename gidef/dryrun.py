"""`--dry-run N`: what a recipe will do on N ranks, tried and measured in one process that keeps nothing: shards, seconds, memory, bytes, disk."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gidef import attack as attacks
from gidef import build, config, evaluation, fits, methods, runs
from gidef.attack.ladder import is_lack_of_memory
from gidef.cells import Cell, make_cells
from gidef.clients.evaluate import num_chunks, predict_chunk
from gidef.clients.local import load_parameters
from gidef.clients.sharded import units
from gidef.errors import InputError
from gidef.parallel import World, open_world, seated
from gidef.releases import Releases
from gidef.report import Console
from gidef.strengths import levelled
from gidef.types import Client, Tensors

MOST_RANKS = 10**6
REPEATS = 3
STEPS = (1, 3)
"""Local steps of the two measured trainings: their difference is a step, the rest is what a client costs beside its steps."""
AT_ONCE = 8
"""Attacks in the measured program, at most; a run's calibration looks further."""
KEPT_STATES = 4
"""Versions of a client's state that checkpoints, the best round and the early snapshot can refer to."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one client's training costs here. step_s, client_s: seconds of a step, and of a client beside its steps.  chunk_s: of predicting
    one chunk of images.  base_gib: of the process before it trains (on a GPU, of the tensors there).  step_gib: what a step adds at its peak."""

    step_s: float
    client_s: float
    chunk_s: float
    base_gib: float
    step_gib: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one defence. cost: None for a network that no device holds whole: then all seconds are NaN.  rank_gib: of a rank at its peak; at least, without
    a cost, and at most, where a client spans several ranks.  counted_gib: see `counted_gib`.  Seconds in a round: training on the slowest rank, evaluation; overlapped: which runs while the next round trains.  bytes_per_round: of all clients, down and up, see `build.bytes_per_round`.  reduced_bytes:
    of the all-reduce that moves as much as a round's collectives, see parallel.traffic.  disk_bytes: of one seed.  attacks_s: of one seed, by attack; None for what was not measured, because
    something is trained for it first or it does not match gradients."""

    cost: Cost | None
    train_s: float
    evaluate_s: float
    bytes_per_round: int
    reduced_bytes: int
    disk_bytes: int
    rank_gib: float
    attacks_s: dict[str, float | None]
    overlapped: bool = False
    counted_gib: float = 0.0

    @property
    def round_s(self) -> float:
        return max(self.train_s, self.evaluate_s) if self.overlapped else self.train_s + self.evaluate_s


def rehearse(recipe: config.Recipe, name: str, ranks: int) -> dict[str, Forecast]:
    """Check a recipe for so many ranks, measure one client's steps on this device, and print what follows. Nothing is written into its folder.

    A client on several ranks is measured on one, where that holds the network whole; of one that does not fit, only shapes are looked at.

    Assumed: every rank has this device, and this process's cores to itself; workers of a rank do not slow one another down; the sum over
    ranks costs nothing (`gidef plan` has networks). Of an attack, one iteration of one program is measured.

    Returns: by defence.
    Raises:  InputError for bad data, a folder that holds a run already, what cannot be built, or too little disk; and where a rank needs more memory than
             this device has, by what is counted beforehand, by what was measured, or because a measured step ran out of it.
    """
    if recipe.out is not None and Path(recipe.out, "recipe.json").exists() and not recipe.resume:
        raise InputError(f"{recipe.out} holds a run already: continue it with --resume, or choose another --out.")
    if ranks > MOST_RANKS:
        raise InputError(f"--dry-run {ranks}: expected at most {MOST_RANKS} ranks.")
    place = _place(recipe)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"the run's folder {recipe.out or 'runs'} cannot be made: {place} cannot be written to. Choose another --out.")
    with open_world(recipe.speed.device, recipe.speed.timeout_s) as world, Console() as console, tempfile.TemporaryDirectory() as scratch:
        if world.size > 1:
            raise InputError(f"--dry-run forecasts {ranks} ranks from one process, and a launcher started {world.size}: start it with python alone.")
        world = seated(world)
        torch.set_num_threads(recipe.speed.threads)
        setting = build.load_setting(recipe, world=world, notice=console.notice)
        if ranks % recipe.speed.shard_size:
            raise InputError(f"--dry-run {ranks}: speed.shard_size={recipe.speed.shard_size} needs whole groups of ranks: give a multiple of it.")
        console.heading(f"{name}: a dry run for {ranks} rank{'s' * (ranks > 1)}")
        if recipe.speed.shard_size > 1:
            console.notice(
                f"a client spans {recipe.speed.shard_size} ranks: memory is counted for such a rank; seconds are of one device alone, which computes all of a "
                "batch and tells no other anything."
            )
        shards = _shards(console, setting, ranks)
        found: dict[str, Forecast] = {}
        for key, defence in recipe.chosen.items():
            trials = (defence.low, defence.high) if isinstance(defence, config.Matched) else ()
            for value in trials:
                build.make_defence(defence.at(value), recipe, setting.dataset, seed=0)
            for seed in recipe.seeds:
                build.privacy_budget(setting, defence.at(defence.low) if trials else defence, seed=seed)
            chosen = defence.at(defence.low) if trials else defence
            found[key] = _tried(chosen, key, setting, world, ranks, Path(scratch))
            _say(console, key, found[key], setting)
        _total(console, setting, found, ranks, shards)
    return found


def _tried(chosen: Any, key: str, setting: build.Setting, world: World, ranks: int, scratch: Path) -> Forecast:
    """One defence: counted without values first, so that a network which cannot fit is not tried."""
    speed, has = setting.recipe.speed, _device_gib(world.device)
    shapes = dataclasses.replace(world, device=torch.device("meta"))
    made = build.make_training(setting, chosen, seed=setting.recipe.seeds[0], world=shapes, state_folder=scratch / key)
    counted, whole = counted_gib(made, setting.recipe), counted_gib(made, setting.recipe, shard_size=1)
    unmeasured = _forecast(made, setting, shapes, ranks, None, counted)
    if counted > has:
        raise InputError(_too_large(key, counted, world.device, has))
    if whole > has:
        return unmeasured
    try:
        made = build.make_training(setting, chosen, seed=setting.recipe.seeds[0], world=world, state_folder=scratch / key)
        found = _forecast(made, setting, world, ranks, _measure(made, setting, world), counted)
        found = dataclasses.replace(found, attacks_s=_attacks_s(made, key, setting, world, ranks, scratch))
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        if speed.shard_size > 1:
            return unmeasured
        raise InputError(_too_large(key, max(counted, has), world.device, has)) from error
    if speed.shard_size == 1 and found.rank_gib > has:
        raise InputError(_too_large(key, found.rank_gib, world.device, has))
    return found


def _too_large(key: str, needs: float, device: torch.device, has: float) -> str:
    return (
        f"{key}: a rank needs about {needs:.3g} GiB{' or more' * (needs == has)}, and the device ({device}) has {has:.3g}. "
        "Raise speed.shard_size, lower clients.batch_size or speed.workers, or take a smaller model."
    )


def _device_gib(device: torch.device) -> float:
    """All memory of a GPU, or of this host, as far as its group of processes may use it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / 2**30
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no Linux, or "max"
        most = min(most, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return most / 2**30


def counted_gib(made: build.Training, recipe: config.Recipe, *, shard_size: int | None = None) -> float:
    """GiB that a rank holds at least while it takes a client's step: weights, gradients and the optimiser's state, as the backend cuts them; the largest
    block gathered, with its gradients; the server's weights and the sum of updates; a decoder's own, whole. Images and activations come on top.

    made: on any device, also one without values.  shard_size: in the place of the recipe's.
    """
    speed, settings = recipe.speed, build.local_settings(recipe.clients)
    parts = shard_size or speed.shard_size
    stage = speed.zero_stage if speed.shard_backend == "deepspeed" else 3
    model, decoder = made.defence.model, made.defence.decoder
    weights, trained = _nbytes(dict(model.named_parameters())), sum(p.nbytes for p in model.parameters() if p.requires_grad)
    beside = sum(p.nbytes for p in decoder.parameters()) if decoder is not None else 0
    slots = 2 if settings.optimiser == "adam" else int(settings.momentum > 0)
    state = 0 if speed.offload == "cpu" and parts > 1 else slots * trained
    held = sum(amount / (parts if stage >= cut_from else 1) for amount, cut_from in ((state, 1), (trained, 2), (weights, 3)))
    block = max((_nbytes(dict(unit.named_parameters())) for unit in units(model)), default=weights) if parts > 1 and stage == 3 else 0
    server = _nbytes(made.participation.template()) * (3 if speed.reduction == "fixed_point" else 2) / parts
    return (held + 2 * block + server + (2 + slots) * beside) / 2**30


def _place(recipe: config.Recipe) -> Path:
    """The run's folder, or the nearest above it that is there."""
    folder = Path(recipe.out or "runs").absolute()
    return next(one for one in (folder, *folder.parents) if one.exists())


def _seconds(setting: build.Setting, numbers: list[int], cost: Cost) -> list[float]:
    """Each client's training in a round."""
    settings = build.local_settings(setting.recipe.clients)
    return [cost.client_s + cost.step_s * settings.steps_in_round(setting.clients[k].num_examples) for k in numbers]


def _shards(console: Console, setting: build.Setting, ranks: int) -> list[list[int]]:
    """Print each rank's clients in the first round of the first seed."""
    shards = build.shards(setting, ranks, seed=setting.recipe.seeds[0], round=0)
    for rank, clients in enumerate(shards[:64]):
        images = sum(setting.clients[k].num_examples for k in clients)
        console.say(f"  rank {rank:<4} {f'clients {clients}'.replace('[', '').replace(']', '')[:100] if clients else 'no client'}   {images} images")
    if ranks > 64:
        console.say(f"  and {ranks - 64} more ranks")
    return shards


def useful_ranks(costs: list[float]) -> float:
    """Σt / max t: more ranks than this cannot shorten a round, as one client is not divided."""
    return sum(costs) / max(costs)


def makespan(costs: list[list[float]], workers: int) -> float:
    """Seconds until the last rank is done, each of whose workers takes the next of its clients as it becomes free."""
    slowest = 0.0
    for mine in costs:
        free = [0.0] * workers
        for seconds in mine:
            free[free.index(min(free))] += seconds
        slowest = max(slowest, *free)
    return slowest


def _forecast(made: build.Training, setting: build.Setting, world: World, ranks: int, cost: Cost | None, counted: float) -> Forecast:
    recipe, participation, several = setting.recipe, made.participation, setting.recipe.speed.shard_size > 1
    workers = 1 if several else len(participation.players)
    shards = build.shards(setting, ranks, seed=recipe.seeds[0], round=0)
    cohort = sum(map(len, shards)) // recipe.speed.shard_size
    whole = all(name in made.server.params for name in made.defence.initial_model())  # else every client has a front of its own
    fronts = 1 if whole else cohort
    chunks = num_chunks(setting.dataset.val.images)
    template = participation.template()
    shared = _nbytes(made.server.params)
    stepped = build.server_step(recipe.rounds.server, num_clients=recipe.data.num_clients, cohort_size=cohort)(
        made.server, {name: torch.zeros_like(tensor) for name, tensor in template.items()}
    )
    slots = sum(_nbytes(slot) for slot in stepped.slots.values())
    private = _nbytes(participation.state(0))
    control = _nbytes(template) - shared
    groups, sent = ranks // recipe.speed.shard_size, build.traffic(recipe, stepped, template)
    sent = dataclasses.replace(sent, entries=-(-sent.entries // recipe.speed.shard_size))
    models = 3 * (2 * shared + slots) + 3 * shared + shared + (0 if whole else private * recipe.data.num_clients)  # checkpoints, snapshots, export
    states = recipe.data.num_clients * KEPT_STATES * (private + control)
    overlapped = build.overlaps_evaluation(recipe, world) and not several
    evaluators = 1 if overlapped else workers
    copied = _nbytes(dict(participation.players[0].model.named_parameters())) / 2**30 if overlapped else 0.0
    evaluation, attacks = recipe.evaluation, recipe.attacks.values()
    starts = sum(getattr(attack, "restarts", 1) for attack in attacks)
    images = len(evaluation.checkpoints) * starts * len(setting.roles.victims) * 4 * setting.dataset.train.images[0].numel()
    train_s = evaluate_s = math.nan
    rank_gib = counted
    if cost is not None:
        train_s = makespan([_seconds(setting, clients, cost) for clients in shards], workers)
        evaluate_s = fronts * -(-chunks // groups) / evaluators * cost.chunk_s if chunks > groups * evaluators else fronts * cost.chunk_s
        rank_gib = cost.base_gib + workers * cost.step_gib + copied
        if several:  # what is beside the network and the sum, such as images and activations, is not divided here
            rank_gib = counted + max(0.0, rank_gib - counted_gib(made, recipe, shard_size=1))
    return Forecast(
        cost=cost, train_s=train_s, evaluate_s=evaluate_s,
        bytes_per_round=build.bytes_per_round(made, recipe),
        reduced_bytes=round(sent.reduced(groups)),
        disk_bytes=models + states + images,
        rank_gib=rank_gib, attacks_s={}, overlapped=overlapped, counted_gib=counted,
    )  # fmt: skip


def _attacks_s(made: build.Training, key: str, setting: build.Setting, world: World, ranks: int, scratch: Path) -> dict[str, float | None]:
    """Seconds of each attack on one seed's model, all checkpoints together."""
    recipe, seed, evaluation = setting.recipe, setting.recipe.seeds[0], setting.recipe.evaluation
    checkpoints = recipe.evaluation.checkpoints
    times = {name: 1 + len(one.points()) * evaluation.num_tuning / evaluation.num_victims for name, one in recipe.attacks.items() if isinstance(one, config.Tuned)}
    plain = {name: one.attack if isinstance(one, config.Tuned) else one for name, one in recipe.attacks.items()}
    setting = dataclasses.replace(setting, recipe=dataclasses.replace(recipe, attacks=plain))
    run = runs.Run(setting, world, scratch, Console(rank=1), None, "")
    one = runs.Trained(made, {name: runs.Snapshot(name, 0, 0.0, made.server.params) for name in checkpoints}, {}, "")
    releases, found = Releases(run), {}
    for cell in make_cells(run, {(key, seed): one}, scratch / "attacks"):
        if cell.checkpoint == checkpoints[0] and cell.twin is None:
            one_s = _attack_s(run, cell, releases, ranks) if cell.matches else None
            strengths = len(recipe.evaluation.strengths) if levelled(made.defence) else 1
            found[cell.name] = None if one_s is None else one_s * len(checkpoints) * strengths * times.get(cell.name, 1)
    return found


def _attack_s(run: runs.Run, cell: Cell, releases: Releases, ranks: int) -> float | None:
    if isinstance(cell.attack, config.GenerativePrior) or getattr(cell.attack, "decoder", "") == "surrogate":
        return None
    cell.releases = releases.of(cell)
    reads = isinstance(cell.attack, config.READS)
    fitted = {} if reads else fits.fitted(run, cell, run.folder)
    case = methods.make_case(run, cell.trained, cell.snapshot, cell.attack, cell.releases, seed=cell.seed, fitted=fitted)
    reading_s, count = 0.0, len(case.observations)
    if reads:  # one stands for all
        began = time.perf_counter()
        case = dataclasses.replace(case, fitted={"latents": [methods.latents_of(case, case.observations[0], 0)] * count})
        reading_s = time.perf_counter() - began
    plan = methods.plan(case)
    workers = build.num_workers(run.recipe, run.world) * ranks
    share = -(-count * plan.matching.starts // workers)
    try:
        measured = attacks.calibrate(
            plan.observations, plan.make_simulate(), plan.matching, seed=cell.seed, device=run.world.device, modes=("vmap",), workers=workers,
            at_once=run.recipe.speed.attacks_at_once or min(AT_ONCE, share), iterations=1,
        )  # fmt: skip
    except InputError:  # not vectorisable: a run's calibration tries a loop
        return None
    evaluations = sum(stage.evaluations() for stage in (plan.matching, plan.refine) if stage is not None)
    return 1e-3 * measured.candidates[0].ms * share * evaluations + reading_s * -(-count // workers)


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _measure(made: build.Training, setting: build.Setting, world: World) -> Cost:
    """Train a client of few images, a few times; the first time warms up."""
    settings = build.local_settings(setting.recipe.clients)
    largest = max(setting.clients, key=lambda client: client.num_examples)
    batch = settings.batch_size * settings.accumulate
    late = dataclasses.replace(made.server, round=setting.rounds - 1)  # when terms of the loss that set in by and by are there

    def few(steps: int) -> Client:
        return Client(largest.id, largest.images[: batch * steps], largest.labels[: batch * steps])

    def seconds(client: Client) -> float:
        began = time.perf_counter()
        made.participation.train(late, client)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        return time.perf_counter() - began

    with _peak_gib(world.device) as memory:
        seconds(few(STEPS[0]))
    made.participation.versions[largest.id] = late.round  # so that what a client does in its first round only is left out
    times = [[seconds(few(steps)) for _ in range(REPEATS)] for steps in STEPS]
    short, long = (statistics.median(one) for one in times)
    few_steps, many_steps = (settings.steps_in_round(few(steps).num_examples) for steps in STEPS)
    step_s = (long - short) / (many_steps - few_steps) if many_steps > few_steps and long > short else short / few_steps
    return Cost(step_s, max(0.0, short - few_steps * step_s), _chunk_s(made, setting, world), *memory())


def _chunk_s(made: build.Training, setting: build.Setting, world: World) -> float:
    model, val = made.participation.players[0].model, setting.dataset.val.images
    [tensors, *_] = evaluation.fronts(made, made.server.params, [0])
    load_parameters(model, tensors)
    model.eval()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        predict_chunk(model, val, 0, lambda count, chunk: made.defence.draw_noise(count, generator=torch.Generator(world.device)))
        times.append(time.perf_counter() - began)
    model.train()
    return statistics.median(times)


@contextlib.contextmanager
def _peak_gib(device: torch.device) -> Iterator[Callable[[], tuple[float, float]]]:
    """(GiB before, what the block added at its peak): of tensors on a GPU, of the process's resident memory on a CPU, looked at every 2 ms."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: (before / 2**30, (torch.cuda.max_memory_allocated(device) - before) / 2**30)
        return
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what was freed before, which would hide what the block takes
        ctypes.CDLL(None).malloc_trim(0)
    over, before = threading.Event(), _resident()
    peaks = [before]

    def watch() -> None:
        while not over.wait(0.002):
            peaks.append(_resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: (before / 2**30, (max(peaks) - before) / 2**30)
    finally:
        peaks.append(_resident())
        over.set()
        watcher.join()


def _resident() -> int:
    """Bytes of this process in memory."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: the most it ever was
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- in words --------------------------------------------------------------------------------------------------------


def _say(console: Console, key: str, one: Forecast, setting: build.Setting) -> None:
    cost, several = one.cost, setting.recipe.speed.shard_size > 1
    if cost is None:
        console.say(f"{key}: no seconds, as this device does not hold the network whole")
        console.say(f"  memory   {one.rank_gib:.2f} GiB per rank at least: weights, gradients, optimiser, and the sum of updates, without images and activations")
        console.say(f"  bytes    {_bytes(one.bytes_per_round)} a round between clients and server; {_bytes(one.reduced_bytes)} per rank in the ranks' sums")
        return
    console.say(f"{key}: a step takes {1e3 * cost.step_s:.3g} ms, a client {1e3 * cost.client_s:.3g} ms beside its steps, {1e3 * cost.chunk_s:.3g} ms a chunk of predictions")
    beside = " beside the next round" * one.overlapped
    console.say(f"  round    {one.round_s:.3g} s: {one.train_s:.3g} s of training, {one.evaluate_s:.3g} s of evaluation{beside}")
    console.say(f"  bytes    {_bytes(one.bytes_per_round)} a round between clients and server; {_bytes(one.reduced_bytes)} per rank in the ranks' sums")
    if several:
        console.say(f"  memory   {one.rank_gib:.2f} GiB per rank at most: {one.counted_gib:.2f} GiB of weights, gradients, optimiser and the sum of updates, and what else a device alone took")
        return
    console.say(f"  memory   {one.rank_gib:.2f} GiB per rank: {cost.base_gib:.2f} GiB, and {cost.step_gib:.2f} GiB for a client's step on each worker{', and a copy of the model' * one.overlapped}")


def _total(console: Console, setting: build.Setting, found: dict[str, Forecast], ranks: int, shards: list[list[int]]) -> None:
    recipe, first = setting.recipe, next(iter(found.values()))
    if first.cost is not None:
        costs = [cost for clients in shards for cost in _seconds(setting, clients, first.cost)]
        console.say(f"useful ranks  {useful_ranks(costs):.1f} in the first round (sum of the clients' seconds over the largest)")
    trials = {key: one.trials if isinstance(one, config.Matched) else 1 for key, one in recipe.chosen.items()}
    trainings = {key: len(recipe.seeds) + trials[key] - 1 for key in found}
    seconds = sum(trainings[key] * setting.rounds * one.round_s for key, one in found.items())
    disk = sum(trainings[key] * one.disk_bytes for key, one in found.items())
    console.say(f"training      {'unknown seconds' if math.isnan(seconds) else f'{seconds:.0f} s'} for {sum(trainings.values())} training(s) of {setting.rounds} rounds on {ranks} rank(s)")
    attacked = len(recipe.seeds) * sum(one_s or 0.0 for one in found.values() for one_s in one.attacks_s.values())
    left_out = sorted({name for one in found.values() for name, one_s in one.attacks_s.items() if one_s is None})
    unmeasured = f" without {', '.join(left_out)}: not measured" if left_out else ""
    if any(one.attacks_s for one in found.values()):
        console.say(f"attacks       {attacked:.0f} s{unmeasured}")
    place = _place(recipe)
    free = shutil.disk_usage(place).free
    console.say(f"disk          {_bytes(disk)} at most, beside pictures; {_bytes(free)} are free in {place}")
    if disk > free:
        raise InputError(f"the run may need {_bytes(disk)} on disk, and {place} has {_bytes(free)}: free some space, or choose another --out.")


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
