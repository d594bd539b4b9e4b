"""A client's training step under each defence that trains, beside a plain cross-entropy step and the plainest way to write the same defence.

    python recipes/bench/minimax.py                         on one core, about six minutes
    python recipes/bench/minimax.py --small                 half a minute
    python recipes/bench/minimax.py --device cuda --compile     also the number of kernels that a step launches

The minimax game, on ResNet-18 (GroupNorm, ImageNet's stem) cut after its second stage, latent 128×4×4 at 32 px, learned Gaussian perturbation, a
decoder of three convolutions with pixel shuffles; and on the small net with the library's decoder. Batch 32 both. E, H, D: encoder, predictor,
decoder; f, b: forward, backward (w: to the weights alone, in: to the inputs alone).

    plain           Ef Hf, Hb Eb                                cross-entropy without a perturbation
    naive           Ef Df, Db Eb; Ef Hf Df, Db Hb Eb            a step of the decoder's optimiser, then one of the client's, graphs as they come
    thrifty         Ef Df, Db(w); Ef Hf Df, Db(in) Hb Eb        no graph of the encoder for the decoder's step, the decoder frozen in the client's
    alternating     Ef Hf Df, Db(w), Df, Db(in) Hb Eb           schedule="alternating": one pass of the encoder serves both steps
    simultaneous    Ef Hf Df, Db(w), Db(in) Hb Eb               schedule="simultaneous": both steps at the same weights; another algorithm
      , reversed    Ef Hf Df, Db Hb Eb                          of the MSE and -lambda MSE: one backward pass, reversed on its way out of D
      , nn.Conv2d   the same without speed.small_maps, which takes the weights' gradients over maps of at most 2×2 as products, and the others do not

The steps written by hand have PyTorch's default optimisers, the plain one and the library's fused ones (speed.fused_optimisers).
DP-SGD beside bare Opacus (per-sample gradients by hooks, and ghost clipping), BiDO beside its authors' formulas, CVB beside a plain module.

    ms        of one step, optimisers included: median over turns in which all contenders take some steps each, and the quartiles. Ratios are those
              of medians and, less at the mercy of other jobs, of the fastest turns.
    clock     CPU time of this process on one CPU thread, so that other jobs count as far as they share caches; else the wall's.
    of peak   floating-point operations of the step (convolutions and products), over its time, over the fastest rate that this machine showed
              for a matrix product or a convolution.
    over      the ratio to the plain step over the ratio of operations; a compiled step beside the compiled plain one. The operations of a compiled
              step are those of the same step as it is, since nobody sees into its program.
    flop      those operations over the plain step's: what a step would cost at the plain step's rate. Not counted for our DP-SGD, as the counter
              takes the grouped convolutions of its images' own gradients for whole ones.

    peak MiB  the most memory in a step above what was in use before it; what a contender keeps between steps does not count.

Before the clock runs, the simultaneous step's gradients, of all players, are held against those of the naive step in float64.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attack  # the benchmark beside this one: its clock, its machine's peak
import torch
import torch.nn.functional as F
import tyro
from rich import box
from rich.table import Table
from saving import save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gidef.defence import Defence, LearnedDefence, PrivateDefence
from gidef.defence.bido import BiDODefence, BiDOSettings
from gidef.defence.bottleneck import variational_bottleneck
from gidef.defence.perturbation import MinimaxSettings, decoder_loss
from gidef.errors import InputError
from gidef.models import ConvBottleneck, SplitModel, decoder_for, make_backbone, multiply_over_small_maps
from gidef.models.perturbation import Perturbation
from gidef.precision import full_float32
from gidef.report import Console
from gidef.rng import generator, unit_noise
from gidef.similarity import dependence
from gidef.types import Client

CLASSES, WEIGHT, LR, DECODER_LR = 8, 0.3, 0.01, 1e-3
GAMES = {
    "mse": {"dependence": "neg_mse", "decoder_loss": "mse", "mse_cap": 1.0},
    "default": {},
}  # fmt: skip
"""Losses of the two players: the MSE and −λ MSE, which no image in [0, 1] exceeds 1; and the defaults."""
BARS = tuple(  # (case, contender, yardstick, "at most" or "at least" so many times its time)
    (case, *bar)
    for case in ("resnet18", "upsampling")
    for bar in (
        ("simultaneous mse", "plain", "at most", 1.20),
        ("naive mse", "simultaneous mse", "at least", 1.45),
        ("thrifty mse", "simultaneous mse", "at least", 1.20),
        ("simultaneous default", "plain", "at most", 1.35),
    )
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Training steps beside plain ones."""

    cases: tuple[str, ...] = ("resnet18", "small")
    """Of resnet18, upsampling (the same with a decoder that convolves what it enlarged), small_stem (the same with the stem that recipes give it at 32 px, half of whose operations are before the cut; the game alone for both) and small."""
    parts: tuple[str, ...] = ("minimax", "defences")
    """minimax: the game. defences: DP-SGD, BiDO and CVB."""
    turns: int = 15
    steps: int = 0
    """Of every contender in a turn; 0: as many as take about a third of a second, at least 2."""
    batch: int = 32
    threads: int = 1
    device: str = "cpu"
    compile: bool = False
    """Also compiled steps; on a GPU as CUDA graphs."""
    small: bool = False
    """The small net, few turns."""
    out: Path = Path("runs/bench_minimax.json")


# --- nets ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A net, where it is cut, and its halves by hand."""

    name: str
    title: str
    net: str
    cut: str
    size: int
    halves: Callable[[nn.Module], tuple[nn.Module, nn.Module]]
    decoder: Callable[[], nn.Module]
    small_stem: bool = False

    def backbone(self) -> nn.Module:
        return make_backbone(self.net, num_classes=CLASSES, image_shape=(3, self.size, self.size), small_stem=self.small_stem, seed=0)

    def model(self, perturbation: Any = None) -> SplitModel:
        return SplitModel(self.backbone(), cut=self.cut, perturbation=perturbation, image_shape=(3, self.size, self.size), num_classes=CLASSES)


def three_convolutions() -> nn.Module:
    """128×4×4 → 3×32×32 in three doublings."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(128, 128, 3, padding=1), nn.PixelShuffle(2), nn.GroupNorm(8, 32), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 3, padding=1), nn.PixelShuffle(2), nn.GroupNorm(8, 16), nn.LeakyReLU(0.2),
        nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2), nn.Sigmoid(),
    ]  # fmt: skip
    return nn.Sequential(*layers)


def upsampling() -> nn.Module:
    """128×4×4 → 3×32×32, three times enlarged and convolved, at more than twice the operations of `three_convolutions`."""
    torch.manual_seed(0)
    parts = [(nn.Upsample(scale_factor=2), nn.Conv2d(i, o, 3, padding=1), act) for i, o, act in ((128, 64, nn.LeakyReLU(0.2)), (64, 32, nn.LeakyReLU(0.2)), (32, 3, nn.Sigmoid()))]
    return nn.Sequential(*(layer for part in parts for layer in part))


def of_the_loop() -> nn.Module:
    return decoder_for((64, 7, 7), 1, (3, 28, 28), size="loop", seed=0)


def of_the_loop_at_16() -> nn.Module:
    return decoder_for((128, 16, 16), 1, (3, 32, 32), size="loop", seed=0)


def _resnet_halves(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    front = nn.Sequential(net.conv1, net.bn1, net.act1, net.maxpool, net.layer1, net.layer2)
    return front, nn.Sequential(net.layer3, net.layer4, net.global_pool, net.fc)


def _small_halves(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    return net.blocks[:2], nn.Sequential(net.blocks[2], nn.AdaptiveAvgPool2d(2), nn.Flatten(), net.head)


CASES = {
    "resnet18": Case("resnet18", "ResNet-18, 32 px", "resnet18", "layer2", 32, _resnet_halves, three_convolutions),
    "upsampling": Case("upsampling", "ResNet-18, upsampling decoder, 32 px", "resnet18", "layer2", 32, _resnet_halves, upsampling),
    "small_stem": Case("small_stem", "ResNet-18, small stem, 32 px", "resnet18", "layer2", 32, _resnet_halves, of_the_loop_at_16, small_stem=True),
    "small": Case("small", "small net, 28 px", "small", "blocks.1", 28, _small_halves, of_the_loop),
}


def a_client(case: Case, batch: int, device: torch.device) -> Client:
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(256, (batch, 3, case.size, case.size), generator=draw, dtype=torch.uint8)
    return Client(0, images.to(device), torch.randint(CLASSES, (batch,), generator=draw).to(device))


def floating(client: Client, dtype: torch.dtype = torch.float32) -> Tensor:
    return client.images.to(torch.float32).div_(255).to(dtype)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=LR, momentum=0.9, fused=True)


Step = Callable[[], None]


# --- the game ------------------------------------------------------------------------------------------------------------


class ByHand:
    """The game as one writes it down: halves of a net, a perturbation, a decoder, and a graph for every loss. The noise is the library's."""

    def __init__(self, case: Case, game: str, batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        client, settings = a_client(case, batch, device), GAMES[game]
        self.images, self.labels, self.game = floating(client, dtype), client.labels, settings.get("decoder_loss", "mse_ssim")
        self.front, self.head = (part.to(device, dtype) for part in case.halves(case.backbone()))
        shape = tuple(self.front(self.images[:1]).shape[1:])
        self.perturbation, self.decoder = Perturbation(shape, 1).to(device, dtype), case.decoder().to(device, dtype)
        self.client = nn.ModuleList([self.front, self.perturbation, self.head])
        self.measure = functools.partial(dependence, settings.get("dependence", "pearson2"), mse_cap=settings.get("mse_cap", 0.1))
        self._noise = generator(0, "noise", 0, 0, device=device)
        self._steps = torch.optim.SGD(self.client.parameters(), lr=LR, momentum=0.9), torch.optim.Adam(self.decoder.parameters(), lr=DECODER_LR)

    def draw(self) -> Tensor:
        return unit_noise((len(self.images), *self.perturbation.latent_shape), law="gaussian", generator=self._noise, device=self.images.device, dtype=self.images.dtype)

    def perturbed(self, noise: Tensor) -> Tensor:
        latent, std = self.perturbation(self.front(self.images))
        return latent + std * noise

    def decoders(self, perturbed: Tensor) -> Tensor:
        return decoder_loss(self.images, self.decoder(perturbed), self.game)

    def clients(self, perturbed: Tensor) -> Tensor:
        return F.cross_entropy(self.head(perturbed), self.labels) + WEIGHT * self.measure(self.images, self.decoder(perturbed))

    def naive(self) -> None:
        client, decoder = self._steps
        noise = self.draw()
        decoder.zero_grad()
        self.decoders(self.perturbed(noise)).backward()
        decoder.step()
        client.zero_grad()
        self.clients(self.perturbed(noise)).backward()
        client.step()

    def thrifty(self) -> None:
        client, decoder = self._steps
        noise = self.draw()
        with torch.no_grad():
            perturbed = self.perturbed(noise)
        decoder.zero_grad()
        self.decoders(perturbed).backward()
        decoder.step()
        self.decoder.requires_grad_(False)
        client.zero_grad()
        self.clients(self.perturbed(noise)).backward()
        client.step()
        self.decoder.requires_grad_(True)


def plain(case: Case, batch: int, device: torch.device) -> Step:
    client, model = a_client(case, batch, device), case.backbone().to(device)
    images, optimiser = floating(client), sgd(model)

    def step() -> None:
        optimiser.zero_grad()
        F.cross_entropy(model(images), client.labels).backward()
        optimiser.step()

    return step


def played(player: Any, client: Client) -> Step:
    """A player's step, as local training takes it, without a clip of gradients."""
    images, rows, optimiser = floating(client), torch.arange(client.num_examples, device=client.images.device), sgd(player.model)

    def step() -> None:
        optimiser.zero_grad()
        if hasattr(player, "fill_gradients"):
            player.fill_gradients(images, client.labels, rows=rows, epoch=0)
        else:
            loss = player.loss(images, client.labels, rows=rows, epoch=0)
            (player.backward if hasattr(player, "backward") else loss.backward)()
        optimiser.step()

    player.begin(client, seed=0, round=0, progress=1.0, first=False)
    return step


def game_player(case: Case, game: str, schedule: str, device: torch.device, dtype: torch.dtype = torch.float32, products: bool = True) -> Any:
    """products: as `speed.small_maps`, which acts on a CPU alone."""
    settings = MinimaxSettings(dependence_weight=WEIGHT, decoder_lr=DECODER_LR, schedule=schedule, **GAMES[game])
    player = LearnedDefence(case.model({}).to(device, dtype), case.decoder().to(device, dtype), settings).player()
    if products:
        multiply_over_small_maps(player.model)
    return player


def minimax(case: Case, options: Options, device: torch.device, console: Console) -> dict[str, Step]:
    contenders = {"plain": plain(case, options.batch, device)}
    if options.compile:
        players = {"plain": Defence(case.model().to(device)).player(), **{f"simultaneous {game}": game_player(case, game, "simultaneous", device) for game in GAMES}}
        for name, player in players.items():
            player.compile(graphs=device.type == "cuda", notice=console.notice)
            contenders[name + COMPILED] = played(player, a_client(case, options.batch, device))
    for game in GAMES:
        for name in ("naive", "thrifty"):
            contenders[f"{name} {game}"] = getattr(ByHand(case, game, options.batch, device), name)
        for schedule in ("alternating", "simultaneous"):
            contenders[f"{schedule} {game}"] = played(game_player(case, game, schedule, device), a_client(case, options.batch, device))
        if device.type == "cpu" and multiply_over_small_maps(case.model({})):
            contenders[f"simultaneous {game}{PLAIN}"] = played(game_player(case, game, "simultaneous", device, products=False), a_client(case, options.batch, device))
    return contenders


def disagreement(case: Case, game: str, device: torch.device, batch: int = 4) -> float:
    """The largest difference between a gradient of the simultaneous step and the same of graphs by hand, over the largest entry of its tensor; float64."""
    hand, player, client = ByHand(case, game, batch, device, torch.float64), game_player(case, game, "simultaneous", device, torch.float64), a_client(case, batch, device)
    noise, worst = hand.draw(), 0.0
    theirs = torch.autograd.grad(hand.decoders(hand.perturbed(noise)), list(hand.decoder.parameters()))
    mine = dict(zip(map(id, hand.client.parameters()), torch.autograd.grad(hand.clients(hand.perturbed(noise)), list(hand.client.parameters())), strict=True))
    stepped = [p.detach().clone() for p in player.kept.parameters()]
    player._train_decoder = lambda *_: None  # leaves the decoder's gradients to be read
    player.begin(client, seed=0, round=0, progress=1.0, first=False)
    player.loss(floating(client, torch.float64), client.labels, rows=torch.arange(batch, device=device), epoch=0)
    player.backward()
    front, head = case.halves(player.model.backbone)
    pairs = list(zip([*front.parameters(), *player.model.perturbation.parameters(), *head.parameters()], (mine[id(p)] for p in hand.client.parameters()), strict=True))
    for p, expected in [*pairs, *zip(player.kept.parameters(), theirs, strict=True)]:
        worst = max(worst, float((p.grad - expected).abs().max() / expected.abs().max().clamp_min(1e-9)))
    if all(torch.equal(p, q) for p, q in zip(player.kept.parameters(), stepped, strict=True)):
        raise RuntimeError("the decoder took no step")
    return worst


# --- DP-SGD, BiDO, CVB ---------------------------------------------------------------------------------------------------


def torchvision_resnet18() -> nn.Module:
    """torchvision's, with GroupNorm and without additions in place, which Opacus' hooks cannot follow."""
    from torchvision.models.resnet import BasicBlock, ResNet

    class Block(BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(out + (x if self.downsample is None else self.downsample(x)))

    torch.manual_seed(0)
    net = ResNet(Block, [2, 2, 2, 2], num_classes=CLASSES, norm_layer=lambda width: nn.GroupNorm(32, width))
    net.relu = nn.ReLU()
    return net


def private_net(case: Case) -> nn.Module:
    return torchvision_resnet18() if case.name == "resnet18" else case.backbone()


def opacus_steps(case: Case, options: Options, device: torch.device) -> dict[str, Step]:
    """Bare Opacus, on the whole batch: clip 1, noise multiplier 1."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # images need no gradients, as Opacus knows
    client, found = a_client(case, options.batch, device), {}
    images = floating(client)
    more = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": options.batch}
    hooked = GradSampleModule(private_net(case).to(device))
    usual = DPOptimizer(sgd(hooked), **more)

    def by_hooks() -> None:
        usual.zero_grad()
        F.cross_entropy(hooked(images), client.labels).backward()
        usual.step()

    found["DP-SGD: Opacus, hooks"] = by_hooks
    ghostly = GradSampleModuleFastGradientClipping(private_net(case).to(device), max_grad_norm=1.0, use_ghost_clipping=True)
    fast = DPOptimizerFastGradientClipping(sgd(ghostly), **more)
    criterion = DPLossFastGradientClipping(ghostly, fast, nn.CrossEntropyLoss(reduction="mean"), loss_reduction="mean")

    def by_ghosts() -> None:
        fast.zero_grad()
        criterion(ghostly(images), client.labels).backward()
        fast.step()

    found["DP-SGD: Opacus, ghost clipping"] = by_ghosts
    return found


def private(case: Case, options: Options, device: torch.device) -> Step:
    model = SplitModel(private_net(case), cut=case.cut, image_shape=(3, case.size, case.size), num_classes=CLASSES).to(device)
    player, client = PrivateDefence(model, clip=1.0, noise_multiplier=1.0).player(), a_client(case, options.batch, device)
    step = played(player, client)
    next(iter(player.draw_batches(client, batch_size=options.batch, epochs=1, seed=0, round=0)))
    return step


def bido_by_hand(case: Case, options: Options, device: torch.device) -> Step:
    """As the authors' code computes its normalised HSIC: distances, a kernel, centring, and an inverse for every pair; λ (0.05, 0.5)."""
    client, net = a_client(case, options.batch, device), case.backbone().to(device)
    images, optimiser, m = floating(client), sgd(net), options.batch
    stages = [net.layer1, net.layer2, net.layer3, net.layer4] if case.net == "resnet18" else list(net.blocks)
    centring = (torch.eye(m) - torch.ones(m, m) / m).to(device)

    def distances(x: Tensor) -> Tensor:
        squares = x.square().sum(1, keepdim=True)
        return (squares.T - 2 * x @ x.T + squares).abs()

    def normalised(x: Tensor, kernel: str) -> Tensor:
        centred = (x @ x.T if kernel == "linear" else torch.exp(-distances(x) / (2 * 5.0**2 * x.shape[1]))) @ centring
        return centred @ torch.inverse(centred + 1e-5 * m * torch.eye(m, device=device))

    def hsic(x: Tensor, y: Tensor, left: str, right: str) -> Tensor:
        return (normalised(x, left) * normalised(y, right).T).sum()

    def step() -> None:
        hidden: list[Tensor] = []
        hooks = [stage.register_forward_hook(lambda module, inputs, output: hidden.append(output.flatten(1))) for stage in stages]
        loss = F.cross_entropy(net(images), client.labels)
        for hook in hooks:
            hook.remove()
        targets = F.one_hot(client.labels, CLASSES).float()
        for features in hidden:
            loss = loss + 0.05 * hsic(images.flatten(1), features, "gaussian", "gaussian") - 0.5 * hsic(features, targets, "gaussian", "linear")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def bottleneck_by_hand(case: Case, options: Options, device: torch.device) -> Step:
    """Convolutions to mean and level, noise, a convolution back: in the middle of a plain net."""
    client = a_client(case, options.batch, device)
    front, head = (part.to(device) for part in case.halves(case.backbone()))
    images = floating(client)
    channels = front(images[:1]).shape[1]
    code = channels // 2
    mean, level, back = nn.Conv2d(channels, code, 5, padding=2), nn.Conv2d(channels, code, 5, padding=2), nn.Conv2d(code, channels, 1)
    net = nn.ModuleList([front, head, mean, level, back]).to(device)
    optimiser = sgd(net)

    def step() -> None:
        latent = front(images)
        mu, sigma = mean(latent), F.softplus(level(latent).clamp(-5, 5))
        logits = head(back(mu + sigma * torch.randn_like(mu)))
        divergence = (0.5 * (sigma.square() + mu.square() - 1) - sigma.log()).sum(1).mean()
        optimiser.zero_grad()
        (F.cross_entropy(logits, client.labels) + 0.1 * divergence).backward()
        optimiser.step()

    return step


def defences(case: Case, options: Options, device: torch.device, console: Console) -> dict[str, Step]:
    client = a_client(case, options.batch, device)
    bottleneck = variational_bottleneck(case.model(functools.partial(ConvBottleneck, kernel=5, seed=0)).to(device), kl_weight=0.1)
    contenders = {
        "plain": plain(case, options.batch, device),
        "BiDO: as its authors": bido_by_hand(case, options, device),
        "BiDO": played(BiDODefence(case.model().to(device), BiDOSettings()).player(), client),
        "CVB: a plain module": bottleneck_by_hand(case, options, device),
        "CVB": played(bottleneck.player(), client),
    }
    try:
        import opacus  # noqa: F401
    except ImportError:
        console.notice('Opacus is not installed: no DP-SGD here. pip install -e ".[dp]"')
        return contenders
    return contenders | opacus_steps(case, options, device) | {"DP-SGD": private(case, options, device)}


PAIRS = {"BiDO": ("BiDO: as its authors",), "CVB": ("CVB: a plain module",), "DP-SGD": ("DP-SGD: Opacus, hooks", "DP-SGD: Opacus, ghost clipping")}
PAIR_BAR = 1.3
COMPILED, PLAIN = ", compiled", ", nn.Conv2d"  # after the name of the step that it is


# --- measuring -----------------------------------------------------------------------------------------------------------


def operations(step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def launches(step: Step) -> int:
    """CUDA kernels of a step, copies and fills by the copy engines not among them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu)


def measure(contenders: dict[str, Step], options: Options, device: torch.device, peak: float) -> dict[str, dict[str, Any]]:
    by_cpu, times, rows = device.type == "cpu" and options.threads == 1, {name: [] for name in contenders}, {}
    counts = {}
    for name, step in contenders.items():
        step()
        step()  # the second one meets the optimisers' state
        with attack.peak_memory(device) as memory:
            step()
        watch = attack.Watch(device)
        step()
        took = watch.read()
        counts[name] = options.steps or max(2, round(0.33 / max(took.cpu if by_cpu else took.wall, 1e-6)))
        rows[name] = {"peak_mib": memory.get("mib"), "gflop": operations(step) / 1e9 if name != "DP-SGD" else None}
        if device.type == "cuda":
            rows[name]["kernels"] = launches(step)
    for name, row in rows.items():
        row["gflop"] = rows[name.removesuffix(COMPILED)]["gflop"]
    for _ in range(options.turns):
        for name, step in contenders.items():
            watch = attack.Watch(device)
            for _ in range(counts[name]):
                step()
            took = watch.read()
            times[name].append((took.cpu if by_cpu else took.wall) / counts[name] * 1e3)
    for name, row in rows.items():
        low, median, high = statistics.quantiles(times[name], n=4) if len(times[name]) > 1 else times[name] * 3
        row |= {"ms": median, "quartiles": [low, high], "fastest": min(times[name]), "all_ms": times[name], "of_peak": row["gflop"] and row["gflop"] / median * 1e3 / peak}
    for name, row in rows.items():
        beside = rows["plain" + COMPILED * name.endswith(COMPILED)]
        row |= {"ratio": row["ms"] / rows["plain"]["ms"], "ratio_fastest": row["fastest"] / rows["plain"]["fastest"], "ratio_flop": row["gflop"] and row["gflop"] / rows["plain"]["gflop"]}
        row["over"] = row["gflop"] and row["ms"] / beside["ms"] / row["ratio_flop"]
    return rows


def table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    shown.add_column("step")
    kernels = any("kernels" in row for row in rows.values())
    for header in ("ms", "quartiles", "fastest", "× plain", "fastest", "flop", "over", "of peak", "peak MiB", *(("kernels",) if kernels else ())):
        shown.add_column(header, justify="right")
    for name, row in rows.items():
        low, high = row["quartiles"]
        shown.add_row(
            name, f"{row['ms']:.3g}", f"{low:.3g}–{high:.3g}", f"{row['fastest']:.3g}", f"{row['ratio']:.2f}", f"{row['ratio_fastest']:.2f}",
            *((f"{row['ratio_flop']:.2f}", f"{row['over']:.2f}", f"{row['of_peak']:.0%}") if row["gflop"] else "–––"),
            "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            *((str(row.get("kernels", "–")),) if kernels else ()),
        )  # fmt: skip
    return shown


def verdicts(found: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Ratios that the bars are about, of medians and of fastest turns, each with whether it holds."""
    told = []
    for case, one, other, sense, bar in BARS:
        rows = found.get(f"{case} minimax")
        if rows:
            told.append(_verdict(rows, case, one, other, sense, bar))
    for place, rows in found.items():
        if place.endswith("defences"):
            for one, others in PAIRS.items():
                known = [name for name in others if name in rows]
                if known and one in rows:
                    told.append(_verdict(rows, place.split()[0], one, min(known, key=lambda name: rows[name]["ms"]), "at most", PAIR_BAR))
    return told


def _verdict(rows: dict[str, dict[str, Any]], case: str, one: str, other: str, sense: str, bar: float) -> dict[str, Any]:
    ratio, fastest = (rows[one][key] / rows[other][key] for key in ("ms", "fastest"))
    holds = ratio <= bar if sense == "at most" else ratio >= bar
    return {"case": case, "step": one, "beside": other, "sense": sense, "bar": bar, "ratio": ratio, "fastest": fastest, "holds": holds}


def main(options: Options) -> dict[str, Any]:
    """Measure, print and save."""
    unknown = [*set(options.cases) - set(CASES), *set(options.parts) - {"minimax", "defences"}]
    if unknown or min(options.turns, options.batch, options.threads) < 1 or options.steps < 0:
        raise InputError(f"--cases are of {', '.join(CASES)}, --parts of minimax and defences ({unknown} is not), and --turns, --batch and --threads at least 1.")
    device, cases = torch.device(options.device), ("small",) if options.small else options.cases
    options = options if not options.small else Options(**{**vars(options), "turns": min(options.turns, 3), "steps": options.steps or 2})
    torch.set_num_threads(options.threads)
    full_float32()  # on a GPU too
    found, apart = {}, {}
    with Console() as console:
        rates = attack.peak_gflops(device, device.type == "cpu" and options.threads == 1)
        peak = max(rates.values())
        console.say(f"peak {peak:.0f} GFLOP/s ({', '.join(f'{name} {rate:.0f}' for name, rate in rates.items())}), batch {options.batch}, {options.turns} turns")
        for case in (CASES[name] for name in cases):
            for part in options.parts if case.name in ("resnet18", "small") else ("minimax",):
                if part == "minimax":
                    apart[case.name] = {game: disagreement(case, game, device) for game in GAMES}
                    console.say(f"{case.title}: gradients of all players, simultaneous beside naive, differ by at most {max(apart[case.name].values()):.1e} of their tensor's largest entry")
                    if max(apart[case.name].values()) > 1e-9:
                        raise RuntimeError("the steps that were to be timed are not the same step")
                contenders = minimax(case, options, device, console) if part == "minimax" else defences(case, options, device, console)
                rows = found[f"{case.name} {part}"] = measure(contenders, options, device, peak)
                console.table(table(f"{case.title}, {part}", rows))
        told = verdicts(found)
        for one in told:
            mark = "holds" if one["holds"] else "MISSED"
            console.say(f"{mark:7} {one['case']}: {one['step']} over {one['beside']} {one['ratio']:.2f} (fastest turns {one['fastest']:.2f}), bar {one['sense']} {one['bar']:.2f}")
        content = {
            "format": 1, "options": {**vars(options), "out": str(options.out)}, "peak_gflops": rates, "rows": found, "bars": told, "gradients_apart": apart,
            "hardware": attack.hardware(attack.Options(device=options.device, threads=options.threads)), "versions": attack.versions(),
        }  # fmt: skip
        save(content, options.out, console)
    return content


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except InputError as error:
        raise SystemExit(f"minimax.py: {error}") from error
