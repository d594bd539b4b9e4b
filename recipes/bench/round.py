"""A round of federated averaging: gidef beside a bare PyTorch loop, `pfl` and Flower, the same net, data and steps; all but Flower in turns, in one process.

    python recipes/bench/round.py                                       on one core, about ten minutes
    python recipes/bench/round.py --small                               seconds
    torchrun --nproc-per-node 2 recipes/bench/round.py --settings A     on two cores
    torchrun --nproc-per-node 4 recipes/bench/round.py --device cuda --settings A    four ranks on the GPUs there are, or on the one; without `pfl`

    settings  A     pfl-research's CIFAR-10: simple_cnn of 1.6 M parameters, 50 images a client, batch 10, cohort 50, SGD 0.1; without dropout
              B     FLUTE's federated CIFAR-100: ResNet-18 with GroupNorm, 100 images a client, batch 20, cohort 10, SGD 0.1
              tiny  a perceptron of 5 k parameters, 50 images of 8 px a client, batch 10, cohort 50: what is left is overhead
    bare      the loop that one would write by hand for this one purpose: float images at hand, weights copied in, torch.optim.SGD, a sum in float32
    gidef     its rounds: uint8 images, a client's own order of batches, checks, the exact sum.  gidef, K: with K clients at once, calibrated
    pfl       its FederatedAveraging without evaluation; the second iteration of two, since the first one always evaluates
    flower    its simulation with one Ray actor (flower_side.py), if `flwr[simulation]` is installed: rounds after the first, at the wall's clock, beside the
              bare loop's at that clock; not under torchrun
    recipe    `run_recipe` with the setting's net and data as callables: validation, record and checkpoints in every round included
    ms        of a client's part in a round: CPU time of this process where it computes on one core, else the wall's. Of the recipe and Flower the wall's.
    extra     ms of a client beyond the bare loop's.   peak: share of the fastest rate this machine showed for a product or a convolution.

All start at the same weights; first, every side takes one step on all of a client's images, and their models must agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attack  # the benchmarks beside this one
import clients as parts
import flower_side
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from rich import box
from rich.table import Table
from saving import save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gidef import at_once, config
from gidef.clients.local import LocalSettings
from gidef.errors import InputError
from gidef.models import make_backbone
from gidef.parallel import World, mean_over_world, open_world
from gidef.precision import full_float32
from gidef.report import Console
from gidef.rng import generator
from gidef.rounds.algorithm import run_round
from gidef.rounds.server import fed_avg
from gidef.types import Client, ServerState, Tensors

PEER = "pfl"
TOLERANCE = 1e-3
"""Largest difference of two sides' models over the largest change of a weight: at the kink of a ReLU two correct roundings part."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """A round beside a bare loop and `pfl`."""

    settings: tuple[str, ...] = ()
    """Of A, B, tiny; none given: A and tiny on a CPU, all on a GPU."""
    cohort: int | None = None
    """Clients of a round; None: the setting's own."""
    repetitions: int = 5
    threads: int = 1
    device: str = "cpu"
    peer: bool = True
    flower: bool = True
    """Measure Flower too, if it is installed."""
    recipe: bool = True
    """Also from end to end."""
    small: bool = False
    out: Path = Path("runs/bench_round.json")


@dataclass(frozen=True)
class Setting:
    name: str
    net: Callable[[], nn.Module]
    image: tuple[int, int, int]
    classes: int
    examples: int
    batch: int
    cohort: int
    lr: float = 0.1


def resnet18() -> nn.Module:
    return make_backbone("resnet18", num_classes=100, image_shape=(3, 32, 32), small_stem=True, norm="group", seed=0)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 10))


SETTINGS = {
    "A": Setting("A", parts.simple_cnn, (3, 32, 32), 10, 50, 10, 50),
    "B": Setting("B", resnet18, (3, 32, 32), 100, 100, 20, 10),
    "tiny": Setting("tiny", perceptron, (3, 8, 8), 10, 50, 10, 50),
}


class Problem:
    """A setting's clients and first weights."""

    def __init__(self, setting: Setting, world: World) -> None:
        self.setting, self.world = setting, world
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = setting.net().to(world.device)
        draw = generator(0, "bench", "round")
        images = torch.randint(256, (setting.cohort, setting.examples, *setting.image), generator=draw, dtype=torch.uint8).to(world.device)
        labels = torch.randint(setting.classes, (setting.cohort, setting.examples), generator=draw).to(world.device)
        self.clients = [Client(k, images[k], labels[k]) for k in range(setting.cohort)]
        self.start = {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def reset(self) -> None:
        with torch.no_grad():
            for name, p in self.net.named_parameters():
                p.copy_(self.start[name])


Round = Callable[[], Tensors]
"""One round from the first weights: the server's parameters afterwards."""


def bare(problem: Problem, batch: int) -> Round:
    setting, world, net = problem.setting, problem.world, problem.net
    named = dict(net.named_parameters())
    start, mine = [problem.start[name] for name in named], problem.clients[world.rank :: world.size]
    data = [(client.images.float() / 255, client.labels) for client in mine]
    order = generator(1, "bare")

    def run() -> Tensors:
        parameters = list(named.values())
        total = [torch.zeros_like(p) for p in parameters]
        for images, labels in data:
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            optimiser = torch.optim.SGD(parameters, lr=setting.lr)
            for rows in torch.randperm(len(labels), generator=order).to(labels.device).split(batch):
                optimiser.zero_grad()
                F.cross_entropy(net(images[rows]), labels[rows]).backward()
                optimiser.step()
            with torch.no_grad():
                torch._foreach_add_(total, torch._foreach_sub(parameters, start), alpha=len(labels))
        if world.size > 1:
            flat = world.all_reduce_sum_(torch.cat([tensor.flatten() for tensor in total]))
            total = [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)]
        examples = setting.examples * len(problem.clients)
        return {name: first + part / examples for name, first, part in zip(named, start, total, strict=True)}

    return run


def ours(problem: Problem, batch: int, clients_at_once: int | None) -> tuple[Round, int]:
    """clients_at_once: None for what the calibration takes. Returns the round and K."""
    setting, world = problem.setting, problem.world
    problem.reset()
    part, server = parts.participation(parts.Plain(problem.net), LocalSettings(batch_size=batch, optimiser="sgd", lr=setting.lr, grad_clip=0.0))
    server = ServerState(server.params)
    if clients_at_once is None:
        found = at_once.calibrate(lambda groups: at_once._seconds(part, server, groups, world.device), problem.clients, slots=world.size)[0]
        clients_at_once = world.broadcast_json(found)
    part.at_once = clients_at_once
    over = functools.partial(mean_over_world(world, threads=torch.get_num_threads(), groups=part.groups), template=part.template(), metric_names=("loss",))
    return lambda: run_round(server, problem.clients, train=part.train_group, step=fed_avg(), over_cohort=over)[0].params, part.at_once


def peer(problem: Problem, batch: int) -> Callable[[], tuple[attack.Watch, Tensors]]:
    """What was spent on one round, and the model after two."""
    os.environ["PFL_PYTORCH_DEVICE"] = str(problem.world.device)  # else it takes a GPU wherever there is one, and the net with it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pfl.aggregate.simulate import SimulatedBackend
        from pfl.algorithm.base import NNAlgorithmParams
        from pfl.algorithm.federated_averaging import FederatedAveraging
        from pfl.callback.base import TrainingProcessCallback
        from pfl.data.dataset import Dataset
        from pfl.data.federated_dataset import FederatedDataset
        from pfl.hyperparam import NNTrainHyperParams
        from pfl.metrics import Metrics
        from pfl.model.pytorch import PyTorchModel

    setting, world = problem.setting, problem.world
    data = [(client.images.float() / 255, client.labels) for client in problem.clients]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = problem.net

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images)

        def loss(self, images: Tensor, labels: Tensor, eval: bool = False) -> Tensor:
            return F.cross_entropy(self.net(images), labels)

        def metrics(self, images: Tensor, labels: Tensor, eval: bool = True) -> dict:
            return {}

    class Clock(TrainingProcessCallback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> tuple[bool, Any]:
            self.seen.append(self.watch.read() if self.seen else None)
            self.models = [*getattr(self, "models", []), {name: p.detach().clone() for name, p in problem.net.named_parameters()}]
            self.watch = attack.Watch(world.device)
            return False, Metrics()

    def run() -> tuple[Any, Tensors]:
        problem.reset()
        turn = iter(range(2 * len(data)))
        model = PyTorchModel(Net(), torch.optim.SGD, torch.optim.SGD(problem.net.parameters(), lr=1.0))
        federation = FederatedDataset(lambda user: Dataset(data[user]), lambda: next(turn) % len(data))
        clock = Clock()
        FederatedAveraging().run(
            NNAlgorithmParams(central_num_iterations=2, evaluation_frequency=10**6, train_cohort_size=len(data), val_cohort_size=0),
            SimulatedBackend(federation, None), model, NNTrainHyperParams(local_num_epochs=1, local_learning_rate=setting.lr, local_batch_size=batch),
            None, callbacks=[clock], send_metrics_to_platform=False,
        )  # fmt: skip
        return clock.seen[1], clock.models[0]

    return run


def from_end_to_end(problem: Problem, rounds: int, threads: int) -> list[float]:
    """Wall seconds of each round of a recipe but the first, of which validation (500 images), the record's line and a checkpoint are part."""
    from gidef.job import run_recipe

    with tempfile.TemporaryDirectory() as folder:
        out = problem.world.broadcast_json(folder)
        setting, place = problem.setting, "bench_round_parts"
        _offer(place, problem)
        recipe = config.Recipe(
            data=config.Data(name=f"{place}:data", num_clients=setting.cohort, split_seed=0), model=config.Model(name=f"{place}:net", normalise="none"),
            clients=config.LocalTraining(batch_size=setting.batch, optimiser="sgd", lr=setting.lr, grad_clip=0.0),
            rounds=config.Rounds(count=rounds, patience=None), evaluation=config.Evaluation(num_victims=1, num_tuning=0, judge_epochs=1),
            speed=config.Speed(device=str(problem.world.device), threads=threads, workers=1), out=f"{out}/run",
        )  # fmt: skip
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            run_recipe(recipe, "bench")
        lines = [json.loads(line) for line in Path(out, "run", "record.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if line["kind"] == "round"]
    return [after - before for before, after in zip(seconds, seconds[1:], strict=False)]


def _offer(place: str, problem: Problem) -> None:
    """A module of that name, for the recipe to import."""
    import sys
    from types import ModuleType

    from gidef.data import Dataset, Images

    setting, draw = problem.setting, generator(0, "bench", "recipe")

    def images(count: int) -> Images:
        pixels = torch.randint(256, (count, *setting.image), generator=draw, dtype=torch.uint8)
        return Images(pixels, torch.arange(count) % setting.classes)

    def data() -> Dataset:
        names = tuple(map(str, range(setting.classes)))
        train = images(setting.cohort * setting.examples)
        return Dataset(name="bench", title="noise", modality="noise", source="drawn", md5=None, train=train, val=images(500), test=images(100), class_names=names, synthetic=True)

    def net(num_classes: int, **_: Any) -> nn.Module:
        made = setting.net()
        made.default_cut = next(name for name, module in made.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
        return made

    module = sys.modules[place] = ModuleType(place)
    module.data, module.net = data, net


def flops(problem: Problem) -> float:
    """Of a client's part: forward and backward passes over its images."""
    client, count = problem.clients[0], problem.setting.batch
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(problem.net(client.images[:count].float().requires_grad_()), client.labels[:count]).backward()
    for p in problem.net.parameters():
        p.grad = None
    return counter.get_total_flops() * problem.setting.examples / count


def flower(problem: Problem, batch: int, rounds: int) -> tuple[list[float], Tensors]:
    """Wall seconds of rounds after the first, and the model after the first."""
    setting, names = problem.setting, list(problem.start)
    seconds, weights = flower_side.simulate(setting.name, setting.cohort, batch, rounds, str(problem.world.device), list(problem.start.values()))
    return seconds, {name: tensor.to(problem.world.device) for name, tensor in zip(names, weights, strict=True)}


def agree(problem: Problem, with_peer: bool, with_flower: bool) -> dict[str, float]:
    """Distances of the models of all sides from the bare loop's after one step of each client on all of its images."""
    whole = problem.setting.examples
    expected = bare(problem, whole)()
    found = {"gidef": ours(problem, whole, 1)[0]()}
    found |= {"gidef, K": ours(problem, whole, min(4, len(problem.clients)))[0]()}
    if with_peer:
        found[PEER] = peer(problem, whole)()[1]
    if with_flower:
        found[flower_side.NAME] = flower(problem, whole, 1)[1]
    moved = max(float((tensor - problem.start[name]).abs().max()) for name, tensor in expected.items())
    return {side: max(float((model[name] - expected[name]).abs().max()) for name in expected) / moved for side, model in found.items()}


def measure(setting: Setting, options: Options, world: World, console: Console, rate: float) -> dict[str, Any]:
    problem, with_peer = Problem(setting, world), options.peer and peer_is_there()
    with_flower = options.flower and world.size == 1 and flower_side.is_there()
    by_cpu = world.device.type == "cpu" and options.threads == 1 and world.size == 1
    apart = agree(problem, with_peer, with_flower)
    if max(apart.values()) > TOLERANCE:
        raise RuntimeError(f"setting {setting.name}: the sides do not agree: {apart}")
    together, chosen = ours(problem, setting.batch, None)
    runs: dict[str, Callable[[], Any]] = {"bare": bare(problem, setting.batch), "gidef": ours(problem, setting.batch, 1)[0], f"gidef, K = {chosen}": together}
    if chosen == 1:
        runs.popitem()
    if with_peer:
        runs[PEER] = peer(problem, setting.batch)
    ms: dict[str, list[float]] = {name: [] for name in runs}
    memory: dict[str, float | None] = {}
    bare_wall: list[float] = []
    for turn in range(options.repetitions + 1):  # the first one warms up
        for name, run in runs.items():
            world.barrier()
            with attack.peak_memory(world.device) if turn == 0 else contextlib.nullcontext({}) as peak:
                watch = attack.Watch(world.device)
                result = run()
                took = result[0] if name == PEER else watch.read()
            if turn == 0:
                memory[name] = next(iter(peak.values()), None)
            else:
                ms[name].append(1e3 * (took.cpu if by_cpu else took.wall) / setting.cohort)
                if name == "bare":
                    bare_wall.append(1e3 * took.wall / setting.cohort)
    if with_flower:
        seconds, _ = flower(problem, setting.batch, options.repetitions + 1)
        ms[flower_side.NAME] = [1e3 * value / setting.cohort for value in seconds]
    if options.recipe:
        seconds = from_end_to_end(problem, options.repetitions + 1, options.threads) if world.size == 1 else []
        if seconds:
            ms["recipe"] = [1e3 * value / setting.cohort for value in seconds]
    arithmetic = flops(problem)
    row: dict[str, Any] = {"setting": setting.name, "cohort": setting.cohort, "parameters": sum(t.numel() for t in problem.start.values()), "flops": arithmetic, "apart": apart, "sides": {}}
    for name, values in ms.items():
        beside = bare_wall if name == flower_side.NAME else ms["bare"]
        ratios = [a / b for a, b in zip(beside, values, strict=False)] if name != "recipe" else []
        row["sides"][name] = {
            "ms": values, "median": statistics.median(values), "ratios": ratios, "ratio": statistics.median(ratios) if ratios else None,
            "extra_ms": statistics.median([b - a for a, b in zip(beside, values, strict=False)]) if ratios else None,
            "peak_share": arithmetic / statistics.median(values) / 1e6 / rate / world.size, "peak_mib": memory.get(name),
        }  # fmt: skip
    console.say(f"{setting.name}: " + ", ".join(f"{name} {side['median']:.2f} ms" for name, side in row["sides"].items()))
    return row


def table(rows: list[dict[str, Any]], ranks: int, clock: str) -> Table:
    shown = Table(box=box.SIMPLE, title=f"a client's part in a round, {ranks} process(es), {clock} time; ratio: the bare loop's ms over it")
    for column in ("setting", "side", "ms", "ratio", "extra, ms", "peak", "MiB", "apart"):
        shown.add_column(column, justify="left" if column in ("setting", "side") else "right")
    for row in rows:
        for name, side in row["sides"].items():
            ratio = f"{side['ratio']:.2f} ({min(side['ratios']):.2f} to {max(side['ratios']):.2f})" if side["ratios"] else "wall"
            apart = row["apart"].get("gidef, K" if name.startswith("gidef, K") else name)
            shown.add_row(
                row["setting"], name, f"{side['median']:.2f}", ratio, "–" if side["extra_ms"] is None else f"{side['extra_ms']:.2f}", f"{side['peak_share']:.0%}",
                "–" if side["peak_mib"] is None else f"{side['peak_mib']:.0f}", "–" if apart is None else f"{apart:.0e}",
            )  # fmt: skip
    return shown


def peer_is_there() -> bool:
    return importlib.util.find_spec(PEER) is not None


@contextlib.contextmanager
def ranks(options: Options) -> Iterator[World]:
    """gidef's world; `pfl` joins the processes when it is imported, and gidef then goes along."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and options.peer and peer_is_there():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pfl.internal.ops import pytorch_ops, selector  # 0.6 joins here, others when the operations are asked for

            selector.set_framework_module(pytorch_ops)
            getattr(selector, "get_ops", lambda: None)()
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), torch.device(options.device))
        return
    with open_world(options.device) as world:
        yield world


def main(options: Options) -> dict[str, Any]:
    """Measure, print and save; returns what was saved."""
    if unknown := sorted(set(options.settings) - set(SETTINGS)):
        raise InputError(f"--settings {' '.join(unknown)}: choose of {', '.join(SETTINGS)}.")
    if min(options.repetitions, options.threads, options.cohort or 1) < 1:
        raise InputError("--repetitions, --threads and --cohort are at least 1.")
    names = options.settings or (tuple(SETTINGS) if options.device.startswith("cuda") else ("A", "tiny"))
    if options.small:
        names, options = options.settings or ("tiny",), dataclasses.replace(options, cohort=options.cohort or 4, repetitions=min(2, options.repetitions))
    torch.set_num_threads(options.threads)
    full_float32()  # for all sides: TF32, PyTorch's default for convolutions on a GPU, alone would part them by more than TOLERANCE
    torch.backends.cudnn.deterministic = True  # as `run_recipe` has it
    wanted = options.peer
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and torch.cuda.is_available():
        options = dataclasses.replace(options, peer=False)
    with ranks(options) as world, Console(world.rank) as console:
        if wanted and not options.peer:
            console.notice(f"{PEER} joins the ranks of a machine with GPUs by NCCL alone, a GPU for each: it is left out.")
        if options.peer and not peer_is_there():
            console.notice(f'{PEER} is not installed: gidef stands beside the bare loop alone. pip install -e ".[bench]" brings it.')
        if options.flower and world.size == 1 and not flower_side.is_there():
            console.notice('Flower is not installed and left out. pip install "flwr[simulation]", in an environment of its own with gidef, brings it.')
        by_cpu = world.device.type == "cpu" and options.threads == 1 and world.size == 1
        rates = attack.peak_gflops(world.device, by_cpu)
        results: dict[str, Any] = {
            "format": 1, "options": {**vars(options), "out": str(options.out)}, "ranks": world.size, "hardware": attack.hardware(options),
            "versions": attack.versions(), "clock": "cpu" if by_cpu else "wall", "peak_gflops": rates, "rows": [],
        }  # fmt: skip
        for name in names:
            setting = dataclasses.replace(SETTINGS[name], cohort=options.cohort or SETTINGS[name].cohort)
            results["rows"].append(measure(setting, options, world, console, max(rates.values())))
        console.table(table(results["rows"], world.size, results["clock"]))
        if world.rank == 0:
            save(results, options.out, console)
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except InputError as error:
        raise SystemExit(f"round.py: {error}") from error
