"""How much slower a client trains that streams its images from shards than one that holds them in memory.

    python recipes/bench/data.py                                                  on two CPU cores, some minutes
    python recipes/bench/data.py --device cuda --images 4096 --precision bfloat16 --decoders 12      on a GPU

One client trains a whole local epoch (`clients.local.train_locally`, SGD) of random images at 224 pixels from memory (uint8, on the device) and from
local shards of raw arrays (npy), PNG and JPEG, in turns, to the same bits (checked; JPEG: to those of what it decodes to). Beside the rate of training stands
that of reading and decoding alone. The aim: at most 10 % below memory. Shards are written afresh, so that they are read from the page cache: a disk
has to deliver the bytes that the last column says. Noise is the worst case of PNG and JPEG, in bytes and in time; `--smooth` blurs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image

import gidef
from gidef import build, config
from gidef.clients.local import LocalSettings, train_locally
from gidef.data.decode import decode
from gidef.data.stream import ClientShards, scan
from gidef.errors import InputError
from gidef.report import Console
from gidef.rng import generator
from gidef.types import Client

MEMORY = "memory"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Streamed against memory-resident training."""

    images: int = 192
    size: int = 224
    model: str = "resnet18"
    """A timm model, or "small"."""
    batch_size: int = 32
    precision: str = "float32"
    kinds: tuple[str, ...] = ("npy", "png", "jpeg")
    smooth: int = 8
    """Side of the blocks whose grey values are drawn and then interpolated; 1 is noise."""
    per_shard: int = 64
    decoders: int = 2
    """Threads that read and decode."""
    threads: int = 1
    """Of the training."""
    repetitions: int = 5
    device: str = "cpu"
    out: Path = Path("runs/bench_data.json")


def drawn(options: Options) -> torch.Tensor:
    """uint8 (N, 3, H, W)."""
    side = -(-options.size // options.smooth)
    coarse = torch.rand(options.images, 3, side, side, generator=generator(0, "images")) * 255
    return torch.cat([F.interpolate(part, size=(options.size,) * 2, mode="bilinear").to(torch.uint8) for part in coarse.split(64)])


def encoded(image: torch.Tensor, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, image.numpy(), allow_pickle=False)
    else:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, kind.upper(), **({"quality": 90} if kind == "jpeg" else {}))
    return buffer.getvalue()


def write(folder: Path, images: torch.Tensor, labels: torch.Tensor, kind: str, per_shard: int) -> list[str]:
    places = []
    for start in range(0, len(images), per_shard):
        places.append(str(folder / f"{kind}-{start:06d}.tar"))
        with tarfile.open(places[-1], "w") as tar:
            for row in range(start, min(start + per_shard, len(images))):
                for name, data in ((f"{row:06d}.{kind}", encoded(images[row], kind)), (f"{row:06d}.cls", str(int(labels[row])).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return places


def streamed(places: list[str], options: Options) -> ClientShards:
    found = scan(0, places, size=options.size, keep=1, seed=0, decoders=options.decoders)
    left_out = tuple(map(frozenset, found.broken))
    return ClientShards(0, tuple(places), found.sizes, left_out, found.shape, buffer=len(places) * options.per_shard, decoders=options.decoders, pin=options.device != "cpu")


@contextlib.contextmanager
def clock(device: torch.device) -> Iterator[list[float]]:
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    yield seconds
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds.append(time.perf_counter() - began)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main(options: Options) -> None:
    """Measure, print and save."""
    if not set(options.kinds) <= {"npy", "png", "jpeg"} or min(options.images, options.batch_size, options.repetitions, options.decoders, options.per_shard) < 1:
        raise InputError("--kinds are of npy, png and jpeg; --images, --batch-size, --repetitions, --decoders and --per-shard are at least 1.")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    recipe = config.Recipe(model=config.Model(name=options.model, small_stem=False))
    player = build.make_defence(config.Undefended(), recipe, build.Shape(10, (3, options.size, options.size)), seed=0).player()
    player.model.to(device)
    start = {name: p.detach().clone() for name, p in player.model.named_parameters()}
    settings = LocalSettings(batch_size=options.batch_size, optimiser="sgd", lr=1e-3, precision=options.precision)
    images, labels = drawn(options), torch.arange(options.images) % 10

    def train(client: Client, round: int) -> tuple[float, dict[str, torch.Tensor]]:
        player.begin(client, seed=0, round=round, progress=0.0, first=False)
        with clock(device) as seconds:
            result = train_locally(player, start, client, settings, seed=0, round=round)
        return options.images / seconds[0], result.delta

    with Console() as console, tempfile.TemporaryDirectory() as folder:
        clients = {MEMORY: Client(0, images.to(device), labels.to(device))}
        size_of, seen = {MEMORY: 0.0}, {MEMORY: images}
        for kind in options.kinds:
            places = write(Path(folder), images, labels, kind, options.per_shard)
            clients[kind] = Client(0, images[:1], labels[:1], streamed(places, options))
            size_of[kind] = sum(os.path.getsize(place) for place in places) / options.images
            seen[kind] = images if kind != "jpeg" else torch.stack([decode(encoded(image, kind)) for image in images])
        for kind in options.kinds:  # agree first; this also warms up
            same = train(Client(0, seen[kind].to(device), labels.to(device)), 0)[1], train(clients[kind], 0)[1]
            agree = all(torch.allclose(same[0][name], same[1][name], rtol=0, atol=0 if device.type == "cpu" else 1e-4) for name in start)
            if not agree:
                raise RuntimeError(f"{kind}: training from shards and from memory differ")
        rates = {kind: [] for kind in clients}
        alone = {kind: [] for kind in options.kinds}
        for turn in range(1, options.repetitions + 1):
            for kind, client in clients.items() if turn % 2 else reversed(clients.items()):
                rates[kind].append(train(client, turn)[0])
            for kind in options.kinds:
                with clock(torch.device("cpu")) as seconds:
                    for _ in clients[kind].source.batches(batch_size=options.batch_size, epochs=1, seed=0, round=turn):
                        pass
                alone[kind].append(options.images / seconds[0])
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
        console.say(
            f"{options.model}, {options.images} images at {options.size} pixels, batches of {options.batch_size}, {options.precision}, {options.decoders} decoders, "
            f"{name}, {options.repetitions} turns; medians (least to most)"
        )
        console.say(f"memory    {spread(rates[MEMORY])} images/s")
        ratios = {kind: [a / b for a, b in zip(rates[kind], rates[MEMORY], strict=True)] for kind in options.kinds}
        for kind in options.kinds:
            share = [100 * ratio for ratio in ratios[kind]]
            console.say(
                f"{kind:9} {spread(rates[kind])} images/s, {spread(share)} % of memory; reads alone {spread(alone[kind])} images/s, "
                f"{statistics.median(rates[kind]) * size_of[kind] / 2**20:.1f} MiB/s"
            )
        told = {"format": 1, "options": {**dataclasses.asdict(options), "out": str(options.out)}, "rates": rates, "ratios": ratios, "alone": alone}
        told |= {"device": name, "platform": platform.platform(), "torch": torch.__version__, "gidef": gidef.__version__}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(told, indent=1))
        console.say(f"saved {options.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except InputError as error:
        raise SystemExit(f"data.py: {error}") from error
