"""The attack engine beside the `breaching` package: one attack, the same images, nets, starts and iterations, in one run.

    python recipes/bench/attack.py                          on one core, about 15 minutes
    python recipes/bench/attack.py --small                  under two minutes
    python recipes/bench/attack.py --device cuda            also ResNet-18 and ViT-B/16 at 224 px

Both sides run `breaching`'s preset `invertinggradients`, unmodified: cosine distance, total variation 0.2 with its zero padding, Adam on the
gradient's sign with step 0.1, its decay and box, on images normalised by one mean and deviation (0.5 and 0.25, exact in binary). Ours is put
together from the engine's parts to follow the same path to rounding (tests/recipes/test_bench.py). One difference is left: the peer returns the
image one step after the one with the lowest loss.

    ms        of one iteration of one attack: the median over repetitions in which all contenders take turns, on images of their own
              for the peer and the loop. Starting, copying the model, recording and compiling are left out here and stand under "first".
    clock     CPU time of this process where it computes on one core, so that other jobs do not count; else the wall's. Both are in the file.
    floor     7 forward passes (forward; backward to weights and inputs, 2; the backward of all that, 4) at the fastest rate this machine
              showed for a matrix product or a convolution.
    counts    the ratio counts only if the mean PSNR of both sides, over all attacks and seeds, differs by at most 0.05 dB.
    quality   seconds until our best candidates so far have the mean PSNR of the peer's result, to 0.01 dB (or that of our own, where both are
              equal to 0.05 dB); the evaluator looks at candidates when the engine yields.

The peer comes with `pip install -e ".[bench]"`; without it the engine is measured alone. CIFAR-10 is read from GIDEF_DATA if it is there,
else images are synthetic.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import gc
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gidef
from gidef.attack import Matching, Programs, calibrate, inverting_gradients, run_chunk
from gidef.attack.client import gradient_of
from gidef.attack.optimisers import Adam
from gidef.data import as_float, load_dataset, synthetic_blood_cells
from gidef.errors import InputError
from gidef.metrics import pair, psnr_db
from gidef.models.surgery import make_differentiable
from gidef.precision import full_float32, tf32
from gidef.report import Console
from gidef.rng import generator, stream_seed
from gidef.types import Observation, Tensors

MEAN, STD = 0.5, 0.25
TV_WEIGHT, STEP = 0.2, 0.1
TOLERANCE_DB, QUALITY_DB = 0.05, 0.01
FORWARDS = 7
MODES = ("loop", "vmap", "traced", "compiled")
PEER = "breaching"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Attack engine against `breaching`."""

    models: tuple[str, ...] = ()
    """Of lenet, resnet20, convnetsmall, resnet18, vit_b16; none given: those of 32 px on a CPU, all on a GPU."""
    modes: tuple[str, ...] = ()
    """Of loop, vmap, traced, compiled; none given: all, but the compiled one with --small."""
    attacks: int | None = None
    """Attacks K of every case; None: the case's own."""
    iterations: int | None = None
    """Of every attack; None: the case's own."""
    repetitions: int = 5
    """Turns of every contender."""
    seeds: tuple[int, ...] = (0,)
    """Of nets, images and starts; the quality pools them, the first one is timed."""
    threads: int = 1
    device: str = "cpu"
    small: bool = False
    """Few attacks and iterations."""
    lock: Path | None = None
    """A file. Benchmarks that name the same one may run at the same time: they record and compile side by side, and are timed one after another."""
    precision: Literal["float32", "tf32"] = "float32"
    """Of products on both sides; tf32 on a GPU."""
    peer: bool = True
    """Measure the peer too, if it is installed."""
    out: Path = Path("runs/bench_attack.json")
    """Results with hardware, versions, seeds and spread."""


# --- the nets: the peer's architectures, so that a run does not change with the peer's absence ---------------------------


class LeNet(nn.Module):
    """Three sigmoid convolutions and a linear layer, with the wide weights of Zhu et al. 2019 (DLG)."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, 12, 12, 12), (2, 2, 1)
        layers = [(nn.Conv2d(i, o, 5, stride=s, padding=2), nn.Sigmoid()) for i, o, s in zip(widths, widths[1:], strides, strict=False)]
        self.body = nn.Sequential(*(part for layer in layers for part in layer))
        self.fc = nn.Sequential(nn.Linear(768, 10))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).flatten(1))


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after)
        self.nonlin = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.nonlin(self.bn1(self.conv1(x)))))
        return self.nonlin(out + (x if self.downsample is None else self.downsample(x)))


class ResNet20(nn.Module):
    """He et al. 2016, section 4.2, with projections for shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        plan = [[(16, 16, 1)] * 3, [(16, 32, 2)] + [(32, 32, 1)] * 2, [(32, 64, 2)] + [(64, 64, 1)] * 2]
        self.layers = nn.Sequential(*(nn.Sequential(*(Block(*block) for block in stage)) for stage in plan))
        self.linear = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layers(self.stem(x)).mean((2, 3)))


class ConvNetSmall(nn.Module):
    """Four convolutions without norm, of the peer's class's default width 32 (its command line takes 256)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(3),
            nn.Conv2d(4 * width, 4 * width, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(weights=None)


def vit_b16() -> nn.Module:
    import timm

    return make_differentiable(timm.create_model("vit_base_patch16_224", pretrained=False), fused_attention=False)


NETS: dict[str, Callable[[], nn.Module]] = {
    "lenet": LeNet, "resnet20": ResNet20, "convnetsmall": ConvNetSmall, "resnet18": resnet18, "vit_b16": vit_b16,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row. attacks: K.  batch: B images in a gradient.  slice: iterations of a turn.  most: attacks at once that a GPU tries."""

    net: str
    title: str
    attacks: int
    batch: int = 1
    iterations: int
    slice: int
    most: int = 512
    size: int = 32
    classes: int = 10

    @property
    def name(self) -> str:
        return f"{self.net}-b{self.batch}"


CASES = (
    Case(net="lenet", title="LeNet, 32 px", attacks=64, iterations=100, slice=20),
    Case(net="resnet20", title="ResNet-20, 32 px", attacks=8, iterations=60, slice=6),
    Case(net="convnetsmall", title="ConvNetSmall, 32 px", attacks=8, iterations=60, slice=8),
    Case(net="convnetsmall", title="ConvNetSmall, 32 px", attacks=4, batch=4, iterations=60, slice=6),
    Case(net="resnet18", title="ResNet-18, 224 px", attacks=16, iterations=100, slice=10, most=64, size=224, classes=1000),
    Case(net="vit_b16", title="ViT-B/16, 224 px", attacks=8, iterations=60, slice=6, most=16, size=224, classes=1000),
)
SMALL = {"lenet-b1": (16, 24, 8), "resnet20-b1": (4, 8, 2), "convnetsmall-b1": (4, 8, 2), "convnetsmall-b4": (2, 8, 2)}
"""attacks, iterations and slice with --small."""


# --- one attack, posed to both sides ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A case's net, and for every attack its images (K, B, C, H, W) in [0, 1], labels (K, B), observed gradients and start."""

    case: Case
    net: nn.Module
    images: Tensor
    labels: Tensor
    starts: Tensor
    gradients: list[Tensors]

    def observations(self) -> list[Observation]:
        params = {name: parameter.detach() for name, parameter in self.net.named_parameters()}
        pairs = zip(self.gradients, self.labels.cpu(), strict=True)
        return [Observation(params, gradient, self.case.batch, labels=labels) for gradient, labels in pairs]

    def take(self, attacks: Sequence[int]) -> Problem:
        rows = list(attacks)
        gradients = [self.gradients[row] for row in rows]
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows], starts=self.starts[rows], gradients=gradients)


def pose(case: Case, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Problem:
    """The problem of a seed: images of the data set in a shuffled order, an untrained net in eval mode, starts N(0, 1) once normalised."""
    pool, labels = photographs(case.attacks * case.batch)
    order = torch.randperm(len(pool), generator=generator(seed, "bench victims"))[: case.attacks * case.batch]
    if len(order) < case.attacks * case.batch:
        raise InputError(f"{case.attacks} attacks of {case.batch} images need {case.attacks * case.batch}, there are {len(pool)}: lower --attacks.")
    shape = (case.attacks, case.batch, *pool.shape[1:])
    images, labels = as_float(pool[order]).to(dtype).view(shape), labels[order].view(shape[:2])
    if case.size > pool.shape[-1]:
        grown = F.interpolate(images.flatten(0, 1), size=(case.size, case.size), mode="bicubic", antialias=True)
        images = grown.clamp(0, 1).view(*shape[:3], case.size, case.size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "bench net", case.net) % 2**63)
        net = NETS[case.net]().eval().to(device, dtype)
    draws = torch.stack([torch.randn(shape[1:2] + images.shape[2:], generator=generator(seed, "bench start", k)) for k in range(case.attacks)])
    images, labels = images.to(device), labels.to(device)
    names = [name for name, _ in net.named_parameters()]
    gradients = []
    for image, label in zip(images, labels, strict=True):
        found = torch.autograd.grad(F.cross_entropy(net((image - MEAN) / STD), label), list(net.parameters()))
        gradients.append(dict(zip(names, found, strict=True)))
    return Problem(case=case, net=net, images=images, labels=labels, starts=(MEAN + STD * draws).to(device, dtype), gradients=gradients)


@functools.lru_cache(maxsize=2)
def photographs(least: int) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, 32, 32) and labels: CIFAR-10's training images if they are on this machine, else at least so many synthetic cells."""
    try:
        found = load_dataset("cifar10", download=False, notice=lambda text: None)
    except InputError:
        found = synthetic_blood_cells(train=max(least, 8), val=8, test=8, size=32)
    return found.train.images, found.train.labels


def psnr(images: Tensor, problem: Problem) -> list[float]:
    """Mean PSNR of each attack, in dB; a batch's images are assigned to the true ones first."""
    scores = []
    for found, true in zip(images.float().cpu(), problem.images.float().cpu(), strict=True):
        scores.append(float(psnr_db(found[pair(found, true)], true).mean()))
    return scores


# --- the peer ----------------------------------------------------------------------------------------------------------------


def peer_is_there() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in (PEER, "hydra", "omegaconf"))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the peer's prints, its log, and the warnings of the versions it was written for."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.INFO)
        try:
            yield
        finally:
            logging.disable(before)


@dataclass(frozen=True)
class PeerRun:
    """images: of all attacks (K, B, C, H, W), in [0, 1].  losses: of each attack before each step.  spans: from its first to its last iteration."""

    images: Tensor
    losses: list[list[float]]
    spans: list[Watch]


def peer_attack(problem: Problem, iterations: int, *, precision: str = "float32", dtype: str = "float", **optim: Any) -> PeerRun:
    """The peer attacks a problem, one attack after another.

    precision: as in Options.  dtype, optim: other values for fields of its preset. Nothing of the package is changed: it is given what its server and its user would hand
    it, a loss, and the images to start from. A hook on its objective reads the clock at the start of every iteration.
    """
    with quiet(), tf32() if precision == "tf32" else contextlib.nullcontext():
        import breaching

        changes = {"optim.max_iterations": iterations, "optim.callback": iterations, "impl.dtype": dtype, **{f"optim.{k}": v for k, v in optim.items()}}
        settings = breaching.get_attack_config("invertinggradients", overrides=[f"{name}={value}" for name, value in changes.items()])
        case, device, colours = problem.case, problem.images.device, problem.images.shape[2]
        loss = torch.jit.script(nn.CrossEntropyLoss())  # as the peer's own construct_model does
        attacker = breaching.attacks.prepare_attack(problem.net, loss, settings, {"dtype": problem.images.dtype, "device": device})
        data = SimpleNamespace(
            modality="vision", task="classification", classes=case.classes, shape=tuple(problem.images.shape[2:]), mean=(MEAN,) * colours, std=(STD,) * colours
        )
        server = [{"parameters": list(problem.net.parameters()), "buffers": list(problem.net.buffers()), "metadata": data}]
        found, losses, spans = [], [], []
        for gradient, labels, start in zip(problem.gradients, problem.labels, problem.starts, strict=True):
            told = {"num_data_points": case.batch, "labels": labels, "local_hyperparams": None}
            user = [{"gradients": list(gradient.values()), "buffers": None, "metadata": told}]
            watch, times = Watch(device), []
            hook = attacker.objective.register_forward_pre_hook(lambda *_, watch=watch, times=times: times.append(watch.read()))
            result, stats = attacker.reconstruct(server, user, {}, initial_data=(start - MEAN) / STD)
            hook.remove()
            found.append(result["data"] * STD + MEAN)
            losses.append(stats["Trial_0_Val"])
            spans.append(dataclasses.replace(watch, wall=times[-1].wall - times[0].wall, cpu=times[-1].cpu - times[0].cpu))
    return PeerRun(torch.stack(found), losses, spans)


def peer_tv(point: Any) -> Tensor:
    """The peer's total variation: mean over all pixels of |right − here| + |below − here|, with zeros beyond the last row and column."""
    images = (point.images - MEAN) / STD
    across, down = F.pad(images, (0, 1)).diff(dim=-1), F.pad(images, (0, 0, 0, 1)).diff(dim=-2)
    return (across.abs() + down.abs()).mean()


# --- ours --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PeerSteps:
    """Adam on the gradient's sign, whose steps fall tenfold where the peer's do: its marks are rounded down, one iteration before 3/8, 5/8 and 7/8."""

    iterations: int
    adam: Adam = Adam(sign="hard")

    def begin(self, variables: Tensors) -> Tensors:
        return self.adam.begin(variables)

    def step(self, *given: Any, rates: Tensors, iteration: Tensor, **more: Any) -> tuple[Tensors, Tensors]:
        passed = sum((iteration >= self.iterations // share).float() for share in (2.667, 1.6, 1.142))
        return self.adam.step(*given, rates={name: rate * 0.1**passed for name, rate in rates.items()}, iteration=iteration, **more)


def settings_for(problem: Problem, iterations: int, **changes: Any) -> Matching:
    """The peer's preset, in pixels of [0, 1]: steps shrink with the deviation."""
    shape, starts = tuple(problem.images.shape[2:]), problem.starts.cpu()
    fields = {
        "tv": 0.0, "priors": ((TV_WEIGHT, peer_tv),), "lr": STEP * STD, "decay": "constant", "optimiser": PeerSteps(iterations=iterations),
        "start": lambda index, restart: (starts[index], None),
    }  # fmt: skip
    return inverting_gradients(image_shape=shape, num_classes=problem.case.classes, iterations=iterations, **{**fields, **changes})


@dataclass
class Engine:
    """Our side of a problem in one mode. A program that was recorded or compiled once serves all its calls."""

    problem: Problem
    matching: Matching
    mode: str
    at_once: int
    precision: str = "float32"
    programs: Programs = field(default_factory=Programs)

    def __post_init__(self) -> None:
        colours = self.matching.image_shape[0]
        self.simulate = gradient_of(self.problem.net, mode="eval", normalise=((MEAN,) * colours, (STD,) * colours))
        self.observations = self.problem.observations()

    def start(self, every: int, attacks: int | None = None) -> Any:
        """The running attack, which yields after iteration 0 and after every `every` more."""
        chunk = tuple((index, 0) for index in range(attacks or len(self.observations)))
        cast = {"device": self.problem.images.device, "dtype": self.problem.images.dtype, "precision": self.precision}
        return run_chunk(
            chunk, self.observations, self.simulate, self.matching, seed=0, mode=self.mode, every=every, at_once=self.at_once, programs=self.programs, **cast
        )


# --- measuring -----------------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """Seconds since it was made, by the wall and by this process' CPU time, after the device has finished."""

    device: torch.device
    wall: float = 0.0
    cpu: float = 0.0

    def __post_init__(self) -> None:
        self._began = self._now()

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    def read(self) -> Watch:
        now = self._now()
        self.wall, self.cpu = now[0] - self._began[0], now[1] - self._began[1]
        return dataclasses.replace(self)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """{"mib": the most memory in use inside, above what was in use before}; empty where the system does not tell."""
    told: dict[str, float] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield told
        told["mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else pages that an earlier contender freed would hide this one's
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again (Linux)
    before = _resident("VmRSS")
    yield told
    if before is not None:
        told["mib"] = max(_resident("VmHWM") - before, 0) / 1024


def _resident(name: str) -> float | None:
    """KiB of a line of /proc/self/status."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return float(line.split()[1])
    return None


def peak_gflops(device: torch.device, by_cpu: bool, seconds: float = 1.0) -> dict[str, float]:
    """The fastest this machine computes in float32, with this process' threads and TF32 settings: a matrix product and a convolution."""
    side, batch = (8192, 256) if device.type == "cuda" else (1024, 16)
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    x, w = torch.randn(batch, 64, 32, 32, device=device), torch.randn(64, 64, 3, 3, device=device)
    work = {"gemm": (lambda: a @ b, 2 * side**3), "conv": (lambda: F.conv2d(x, w, padding=1), 2 * batch * 32 * 32 * 64 * 64 * 9)}
    rates = {}
    for name, (function, operations) in work.items():
        function()
        times, spent = [], 0.0
        while spent < seconds:
            watch = Watch(device)
            function()
            took = watch.read()
            times.append(took.cpu if by_cpu else took.wall)
            spent += took.wall
        rates[name] = operations / min(times) / 1e9
    return rates


def flops(problem: Problem) -> tuple[float, float]:
    """Of a forward pass of one attack's batch, and of one whole iteration, as PyTorch counts plain autograd's operators."""
    net, labels = problem.net, problem.labels[0]
    images = problem.images[0].clone().requires_grad_()
    images = (images - MEAN) / STD  # no leaf: the counter follows modules by hooks on what they are given
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        net(images)
    with FlopCounterMode(display=False) as iteration:
        found = torch.autograd.grad(F.cross_entropy(net(images), labels), list(net.parameters()), create_graph=True)
        torch.autograd.grad(sum(tensor.square().sum() for tensor in found), images)
    return forward.get_total_flops(), iteration.get_total_flops()


@dataclass
class Contender:
    """What was measured of one side. ms: of an attack-iteration, one value per turn.  first_s: until its first iteration was done."""

    name: str
    ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    first_s: float = 0.0
    peak_mib: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    def add(self, spent: Watch, iterations: float, by_cpu: bool) -> None:
        self.ms.append(1e3 * (spent.cpu if by_cpu else spent.wall) / iterations)
        self.wall_ms.append(1e3 * spent.wall / iterations)

    def summary(self) -> dict[str, Any]:
        spread = {"median": self.median, "min": min(self.ms), "max": max(self.ms), "all": self.ms}
        return {"ms": spread, "wall_ms": statistics.median(self.wall_ms), "first_s": self.first_s, "peak_mib": self.peak_mib, "notes": self.notes}


def time_peer(contender: Contender, problem: Problem, by_cpu: bool, precision: str) -> None:
    """A turn: every attack of the problem, from its first to its last iteration."""
    case, device = problem.case, problem.images.device
    spans = peer_attack(problem, case.slice + 1, precision=precision).spans
    spent = Watch(device, wall=sum(span.wall for span in spans), cpu=sum(span.cpu for span in spans))
    contender.add(spent, case.slice * len(spans), by_cpu)


def time_engine(contender: Contender, engine: Engine, by_cpu: bool, attacks: int | None = None) -> None:
    """A turn: from the end of the first iteration on."""
    device, iterations = engine.problem.images.device, engine.problem.case.slice
    running = engine.start(iterations, attacks)
    next(running)
    watch = Watch(device)
    next(running)
    spent = watch.read()
    running.close()
    contender.add(spent, iterations * (attacks or len(engine.observations)), by_cpu)


def warm_up(contender: Contender, engine: Engine, attacks: int | None = None) -> None:
    """The first iteration, with all that is done once: recording, compiling."""
    watch = Watch(engine.problem.images.device)
    running = engine.start(1, attacks)
    next(running)
    running.close()
    contender.first_s = watch.read().wall
    contender.notes = list(engine.programs.notices)


def most_at_once(problem: Problem, options: Options, console: Console) -> int:
    """On a GPU: how many attacks in one program are fastest, by the engine's own calibration."""
    engine = Engine(problem, settings_for(problem, problem.case.iterations), "vmap", 1)
    cast = {"device": problem.images.device, "dtype": problem.images.dtype, "precision": options.precision}
    found = calibrate(engine.observations, engine.simulate, engine.matching, seed=0, modes=("vmap",), most=problem.case.most, **cast)
    for line in found.lines():
        console.say(f"  {line}")
    return min((one for one in found.candidates if one.ms is not None), key=lambda one: one.ms).at_once


# --- a case --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """While nobody else is timed who names this file."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free(device: torch.device) -> None:
    """What is no longer used goes back to the device: others may need it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(case: Case, options: Options, console: Console, peak: float) -> dict[str, Any]:
    """Everything about one case: see the top of this file."""
    device = torch.device(options.device)
    by_cpu = device.type == "cpu" and options.threads == 1
    with_peer = options.peer and peer_is_there()
    pool = pose(dataclasses.replace(case, attacks=case.most), options.seeds[0], device)  # on a CPU no larger than the case
    with alone(options.lock):
        at_once = case.attacks if device.type == "cpu" else most_at_once(pool, options, console)
    free(device)
    timed = pool.take(range(at_once))
    forward, iteration = flops(timed)
    few = min(at_once, 2)  # attacks that the peer and the loop take on in a turn: their speed does not depend on K
    matching = settings_for(timed, case.iterations, snapshots=_snapshots(case))
    contenders, engines = {}, {}
    if with_peer:
        contender, watch = Contender(PEER), Watch(device)
        peer_attack(timed.take([0]), 1, precision=options.precision)
        contenders[PEER], contender.first_s = contender, watch.read().wall
    for mode in options.modes:
        engine, contender, attacks = Engine(timed, matching, mode, at_once, options.precision), Contender(mode), few if mode == "loop" else at_once
        try:
            warm_up(contender, engine, attacks)
        except InputError as error:
            if not str(error).startswith(f"mode={mode!r}"):
                raise
            console.notice(f"{case.name}: this version of the engine has no mode {mode!r}; it is left out ({error})")
            continue
        except torch.cuda.OutOfMemoryError:
            console.notice(f"{case.name}, {mode}: {attacks} attacks at once do not fit into the device's memory; it is left out")
            continue
        free(device)
        for note in contender.notes:
            console.notice(f"{case.name}, {mode}: {note}")
        contenders[mode], engines[mode] = contender, (engine, attacks)
    if not engines:
        raise InputError(f"{case.name}: none of the modes {', '.join(options.modes)} can run here: choose others, or fewer --attacks.")

    def take_turn(contender: Contender, turn: int) -> None:
        if contender.name == PEER:
            time_peer(contender, timed.take((turn * few + place) % at_once for place in range(few)), by_cpu, options.precision)
        else:
            time_engine(contender, engines[contender.name][0], by_cpu, engines[contender.name][1])

    with alone(options.lock):
        with console.track(f"{case.name} turn", options.repetitions) as track:
            for turn in range(options.repetitions):
                for name in contenders:
                    take_turn(contenders[name], turn)
                track.update(turn + 1)
        for name, contender in contenders.items():  # a turn of its own: looking at memory slows what follows
            with peak_memory(device) as memory:
                take_turn(Contender(name), 0)
            contender.peak_mib = memory.get("mib")

    best = min(engines, key=lambda name: contenders[name].median)
    engine = engines[best][0]
    engines.clear()  # their programs hold memory
    quality = judge(pool.take(range(case.attacks)), options, engine, console, with_peer)
    row = {
        "case": case.name, "title": case.title, "attacks": case.attacks, "batch": case.batch, "iterations": case.iterations, "at_once": at_once,
        "contenders": {name: contender.summary() for name, contender in contenders.items()}, "best": best,
        "gflop_forward": forward / 1e9, "gflop_iteration": iteration / 1e9, "floor_ms": FORWARDS * forward / peak / 1e6, **quality,
    }  # fmt: skip
    for name, contender in contenders.items():
        row["contenders"][name] |= {"gflops": iteration / contender.median / 1e6, "of_floor": row["floor_ms"] / contender.median, "of_peak": iteration / contender.median / 1e6 / peak}
    if with_peer:
        row["ratio"] = contenders[PEER].median / contenders[best].median
        row["counts"] = abs(row["psnr_db"]["ours"] - row["psnr_db"]["peer"]) <= TOLERANCE_DB
    return row


def _snapshots(case: Case) -> int:
    """As many as divide the iterations, 20 at most."""
    return max(number for number in range(1, 21) if case.iterations % number == 0)


def judge(problem: Problem, options: Options, engine: Engine, console: Console, with_peer: bool) -> dict[str, Any]:
    """Whole attacks of every seed on both sides: PSNR, seconds, and our seconds to the peer's quality. The problem is the first seed's."""
    device, case = problem.images.device, dataclasses.replace(problem.case, attacks=len(problem.images))
    peers, ours, curves, spent, peer_spent = [], [], [], [], []
    every = case.iterations // _snapshots(case)
    for seed in options.seeds:
        if seed != options.seeds[0]:
            problem = pose(case, seed, device)
        if with_peer:
            console.say(f"  {case.attacks} whole attacks by {PEER}, seed {seed}")
            with alone(options.lock):
                watch = Watch(device)
                peers += psnr(peer_attack(problem, case.iterations, precision=options.precision).images, problem)
                peer_spent.append(watch.read())
        if seed != options.seeds[0] or engine.at_once != case.attacks:  # another net or K: a program of its own, made outside the clock
            matching = settings_for(problem, case.iterations, snapshots=_snapshots(case))
            again = "traced" if device.type == "cuda" and engine.mode == "compiled" else engine.mode  # to compile once is enough
            engine = Engine(problem, matching, again, case.attacks, options.precision)
            warm_up(Contender(engine.mode), engine)
        console.say(f"  {case.attacks} whole attacks, {engine.mode}, seed {seed}")
        with alone(options.lock):
            times, watch, running = [], Watch(device), engine.start(every)
            while True:
                try:
                    progress = next(running)
                except StopIteration as end:
                    result = end.value
                    break
                times.append((progress.iteration, watch.read().wall))
            spent.append(watch.read())
        ours += psnr(result["images"], problem)
        curve = [statistics.fmean(psnr(shown, problem)) for shown in result["snapshots"].float().unbind(1)]
        curves.append((curve, [seconds for iteration, seconds in times if iteration]))
    told = {"psnr_db": {"ours": statistics.fmean(ours), "ours_all": ours}, "whole_s": {"ours": statistics.fmean(one.wall for one in spent)}}
    if with_peer:
        goal = statistics.fmean(peers)
        told["psnr_db"] |= {"peer": goal, "peer_all": peers}
        told["whole_s"] |= {"peer": statistics.fmean(one.wall for one in peer_spent)}
        # the mean curve over seeds: every seed keeps candidates when it yields
        means = [statistics.fmean(values) for values in zip(*(curve for curve, _ in curves), strict=True)]
        seconds = [statistics.fmean(values) for values in zip(*(marks for _, marks in curves), strict=True)]
        if means[-1] >= goal - TOLERANCE_DB:
            goal = min(goal, means[-1])
        told["seconds_to_peer_quality"] = next((at for value, at in zip(means, seconds, strict=True) if value >= goal - QUALITY_DB), None)
    return told


# --- the report ------------------------------------------------------------------------------------------------------------------


def hardware(options: Options) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.device(options.device).type == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": options.threads, "gpu": gpu, "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__, "gidef": gidef.__version__, PEER: None, "commit": None}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found[PEER] = importlib.metadata.version(PEER)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        here = Path(__file__).resolve().parent
        tell = lambda *words: subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout.strip()  # noqa: E731
        found["commit"] = tell("rev-parse", "HEAD") + ("+changes" if tell("status", "--porcelain", "-uno") else "")
    return found


def tables(rows: list[dict[str, Any]], modes: Sequence[str]) -> list[Table]:
    """Speeds of all contenders; then the fastest mode beside the peer."""
    speed = Table(title="ms per iteration of one attack: median ± half of what lies between the fastest and the slowest turn", box=box.SIMPLE)
    for header in ("case", "K × B", PEER, *modes, "ratio"):
        speed.add_column(header, justify="left" if header == "case" else "right", no_wrap=True)
    rest = Table(title=f"{PEER} → the fastest mode", box=box.SIMPLE, caption="first: seconds to the end of the first iteration, recording and compiling included")
    for header in ("case", "mode", "GFLOP/s", "of floor", "peak MiB", "PSNR dB", "whole s", "first s", "quality s"):
        rest.add_column(header, justify="left" if header in ("case", "mode") else "right", no_wrap=True)
    for row in rows:
        contenders, best = row["contenders"], row["best"]
        cells = []
        for name in (PEER, *modes):
            ms = contenders.get(name, {}).get("ms")
            text = "–" if ms is None else f"{ms['median']:.3g} ± {(ms['max'] - ms['min']) / 2:.2g}"
            cells.append(Text(text, style="bold" if name == best else ""))
        ratio = "–" if PEER not in contenders else f"{row['ratio']:.2f}" if row["counts"] else f"({row['ratio']:.2f}) PSNR differs"
        speed.add_row(row["case"], f"{row['attacks']} × {row['batch']}", *cells, ratio)
        sides = [contenders[name] for name in (PEER, best) if name in contenders]
        told = [(row["psnr_db"], ".2f"), (row["whole_s"], ".3g")]
        quality = row.get("seconds_to_peer_quality")
        rest.add_row(
            row["case"], best, *(_beside([side[key] for side in sides], shape) for key, shape in (("gflops", ".3g"), ("of_floor", ".0%"), ("peak_mib", ".0f"))),
            *(_beside([values[side] for side in ("peer", "ours") if side in values], shape) for values, shape in told),
            f"{contenders[best]['first_s']:.1f}", "–" if quality is None else f"{quality:.3g}",
        )  # fmt: skip
    return [speed, rest]


def _beside(values: Sequence[float | None], shape: str) -> str:
    return " → ".join("–" if value is None else format(value, shape) for value in values)


def chosen(options: Options) -> tuple[Options, list[Case]]:
    """The options with their defaults filled in, and the cases. Raises InputError for unknown names."""
    on_gpu = torch.device(options.device).type == "cuda"
    for what, given, known in (("models", options.models, tuple(NETS)), ("modes", options.modes, MODES)):
        if unknown := sorted(set(given) - set(known)):
            raise InputError(f"--{what} {' '.join(unknown)}: choose of {', '.join(known)}.")
    if on_gpu and not torch.cuda.is_available():
        raise InputError(f"--device {options.device}: PyTorch sees no GPU here: use cpu.")
    if min(options.repetitions, options.threads, options.attacks or 1, options.iterations or 1, len(options.seeds)) < 1:
        raise InputError("--repetitions, --threads, --attacks, --iterations: expected at least 1, and at least one of --seeds.")
    modes = options.modes or (MODES[:3] if options.small else MODES)
    options = dataclasses.replace(options, modes=modes, repetitions=min(options.repetitions, 3) if options.small else options.repetitions)
    wanted = options.models or tuple(dict.fromkeys(case.net for case in CASES if case.size == 32 or on_gpu))
    cases = []
    for case in CASES:
        if case.net in wanted:
            attacks, iterations, turn = SMALL.get(case.name, (2, 4, 1)) if options.small else (case.attacks, case.iterations, case.slice)
            iterations = options.iterations or iterations
            attacks = options.attacks or attacks
            changes = {"attacks": attacks, "iterations": iterations, "slice": min(turn, iterations), "most": max(attacks, case.most) if on_gpu else attacks}
            cases.append(dataclasses.replace(case, **changes))
    return options, cases


def main(options: Options) -> dict[str, Any]:
    """Measure, print and save; returns what was saved."""
    options, cases = chosen(options)
    device = torch.device(options.device)
    by_cpu = device.type == "cpu" and options.threads == 1
    torch.set_num_threads(options.threads)
    full_float32()  # on both sides: PyTorch's default rounds the convolutions of a GPU; see --precision
    results = {
        "format": 1, "options": {**dataclasses.asdict(options), "out": str(options.out), "lock": options.lock and str(options.lock)}, "hardware": hardware(options), "versions": versions(),
        "clock": "cpu" if by_cpu else "wall", "tolerance_db": TOLERANCE_DB, "rows": [],
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with Console() as console:
        if options.peer and not peer_is_there():
            console.notice(f'{PEER} is not installed: the engine is measured alone. pip install -e ".[bench]" brings it.')
        with alone(options.lock), tf32() if options.precision == "tf32" else contextlib.nullcontext():
            rates = results["peak_gflops"] = peak_gflops(device, by_cpu)
        console.say(f"{results['hardware']['gpu'] or results['hardware']['cpu']}, {options.threads} threads, " + ", ".join(f"{k} {v:.1f} GFLOP/s" for k, v in rates.items()))
        for case in cases:
            console.heading(f"{case.title}: {case.attacks} attacks of {case.batch}, {case.iterations} iterations")
            try:
                results["rows"].append(measure(case, options, console, max(rates.values())))
            except torch.OutOfMemoryError:
                console.notice(f"{case.name}: the device's memory ran out; the case is left out. Lower --attacks, or choose --modes.")
            free(device)  # outside the handler, whose traceback holds the tensors
            options.out.write_text(json.dumps(results, indent=1))  # after each case: a long run that is stopped keeps what it has
        for table in tables(results["rows"], options.modes):
            console.table(table)
        console.say(f"saved {options.out}")
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except InputError as error:
        raise SystemExit(f"attack.py: {error}") from error
