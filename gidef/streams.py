"""Streamed clients on all ranks: who scans which shards, and the data set that stays in memory beside them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gidef.checkpoint import load_file, save_file
from gidef.data import Dataset, Images, check_dataset
from gidef.data.splits import complete
from gidef.data.stream import ClientShards, Kept, Scan, scan
from gidef.data.tar_stream import remote
from gidef.data.webdataset_shards import Shards, read_index, read_splits
from gidef.errors import InputError
from gidef.parallel import World
from gidef.parallel.plan import longest_first
from gidef.types import Client

AT_LEAST = 16
"""Images of every client that stay in memory."""
SCANS = "scans"
"""Folder of what the scans of a run found, in the run's."""
FORMAT = 1
"""Of a kept scan: to be raised whenever `data.stream.scan` finds something else in the same shards."""


@dataclass(frozen=True, slots=True)
class Streamed:
    """clients: each with its source, and beside it those of its images that stay in memory, on the CPU.

    dataset: what stays in memory.  parts: by client, rows of dataset.train.  positions: int64 (rows,), where each stands in its client's data.
    counts:  int64 (clients, classes), of all that is trained on.
    """

    dataset: Dataset
    clients: list[Client]
    parts: list[Tensor]
    positions: Tensor
    counts: Tensor


def load_streamed(
    lists: Sequence[Sequence[str]], *, name: str, size: int | None, keep: int, seed: int, buffer: int, decoders: int, world: World,
    notice: Callable[[str], None], folder: Path | None = None,
) -> Streamed:  # fmt: skip
    """Scan every client's shards, the ranks in parallel, and settle what is trained on, kept and held out.

    Validation and test come from shards beside the first client's, `val-*` and `test-*` as `gidef data convert` names them; where there are none, from
    the kept images (see data.splits.complete), which their clients then do not train on.

    Args:   lists: by client, its shards.  keep: images in memory, of all clients together, but AT_LEAST of each, and of each class some.
            folder: the run's, where what a scan finds is kept in SCANS, and found again by later starts as long as no shard's path, size and time of
            change differ. Remote shards, which have none that can be trusted, are scanned at every start.
    Raises: InputError, on every rank, see data.stream.scan; and when clients differ in the size of their images.
    """
    scans = _scan_all(lists, size=size, keep=max(AT_LEAST, -(-keep // len(lists))), seed=seed, decoders=decoders, world=world, folder=folder and folder / SCANS, notice=notice)
    sides = {one.shape[1:] for one in scans}
    if len(sides) > 1:
        raise InputError(f"the clients' first images have {sorted(f'{w}x{h}' for h, w in sides)} pixels: set data.size (a side in pixels) to resize all.")
    shape = (max(one.shape[0] for one in scans), *sides.pop())
    images, labels = _shared_images(scans, shape, world)
    places = [(one.client, kept.shard, kept.index) for one in scans for kept in one.kept]
    for one in scans:
        for note in one.notes:
            notice(note)

    first, source = lists[0][0], f"{len(lists)} clients' shards, from {lists[0][0]}"
    index, notes = read_index(first)
    beside = read_splits(first, index, size)
    if beside is not None:
        found = {split: _like(part, shape, split) for split, part in beside.splits.items()} | {"train": Images(images, labels)}
        training, held_out = torch.arange(len(labels)), set()
        notes += beside.notes
    else:
        rows, cut = complete({"all": Images(torch.arange(len(labels)), labels)}, where=source, fraction=0.1, seed=seed)
        training, held_out = rows["train"].images, {places[row] for split in ("val", "test") for row in rows[split].images.tolist()}
        found = {split: Images(images[part.images], part.labels) for split, part in rows.items()}
        notes += tuple(f"of the {len(labels)} streamed images in memory: {note}" for note in cut)
    counts = _counts(scans, {place: int(labels[row]) for row, place in enumerate(places) if place in held_out})
    names = tuple(index["class_names"]) if index else tuple(f"class {number}" for number in range(counts.shape[1]))
    label = index["name"] if index else name
    dataset = check_dataset(
        Dataset(label, index["title"] if index else label, index["modality"] if index else "unknown", names, found["train"], found["val"], found["test"],
                source, _joint_md5(scans, beside), bool(index and index.get("synthetic") is True), (*(index["notes"] if index else ()), *notes))
    )  # fmt: skip
    counts = torch.cat([counts, counts.new_zeros(len(counts), dataset.num_classes - counts.shape[1])], 1)
    shards = [
        ClientShards(
            one.client, tuple(lists[one.client]), one.sizes,
            tuple(frozenset(broken) | {at for k, s, at in held_out if (k, s) == (one.client, shard)} for shard, broken in enumerate(one.broken)),
            shape, buffer, decoders, pin=world.device.type == "cuda",
        )
        for one in scans
    ]  # fmt: skip
    owners = [places[row] for row in training.tolist()]
    parts = [torch.tensor([row for row, place in enumerate(owners) if place[0] == k], dtype=torch.int64) for k in range(len(lists))]
    for k, part in enumerate(parts):
        if not len(part) or not shards[k].num_examples:
            raise InputError(f"client {k} has too few images: none of it is left in memory to train on. Give it more, or raise data.stream_sample.")
    positions = torch.tensor([shards[k].position(shard, at) for k, shard, at in owners])
    clients = [Client(k, found["train"].images[part], found["train"].labels[part], shards[k]) for k, part in enumerate(parts)]
    return Streamed(dataset, clients, parts, positions, counts)


def _scan_all(lists: Sequence[Sequence[str]], *, world: World, folder: Path | None, notice: Callable[[str], None], **options: Any) -> list[Scan]:
    """Every client's scan; the images only of those that this rank scanned."""
    mine, failed, done = longest_first([_bytes(places) for places in lists], world.size)[world.rank], None, []
    try:
        done = [_scanned(k, lists[k], folder, notice, **options) for k in sorted(mine)]
    except InputError as error:
        failed = str(error)
    if failures := sorted(text for text in world.all_gather_json(failed) if text):
        raise InputError(failures[0])
    own = {one.client: one for one in done}
    told = [one for part in world.all_gather_json([_told(one) for one in done]) for one in part]
    return [own.get(one["client"]) or _heard(one) for one in sorted(told, key=lambda one: one["client"])]


def _scanned(client: int, places: Sequence[str], folder: Path | None, notice: Callable[[str], None], *, decoders: int, **options: Any) -> Scan:
    """What an earlier life of the run found in a client's shards, if they and the options are the same, else a scan, which is then kept."""
    path, key = folder and folder / f"client-{client:05d}.safetensors", _key(places, options)
    if path is not None and key is not None and path.exists():
        with contextlib.suppress(InputError):  # a damaged file is made anew
            tensors, meta = load_file(path)
            if meta["key"] == key:
                kept = [Kept(*place, image) for place, image in zip(meta["scan"]["kept"], tensors["images"], strict=True)]
                return replace(_heard(meta["scan"]), kept=tuple(kept))
    found = scan(client, places, decoders=decoders, **options)
    if path is not None and key is not None:
        try:
            save_file(path, {"images": torch.stack([one.image for one in found.kept])}, {"key": key, "scan": _told(found)})
        except (OSError, InputError) as error:
            notice(f"{path} cannot be written ({error}): the shards are scanned again when the run is resumed.")
    return found


def _key(places: Sequence[str], options: dict[str, Any]) -> list[Any] | None:
    """What a scan depends on, as JSON gives it back; None if a shard is remote or cannot be looked at."""
    if any(map(remote, places)):
        return None
    with contextlib.suppress(OSError):
        shards = [[str(Path(place).resolve()), (about := os.stat(place)).st_size, about.st_mtime_ns] for place in places]
        return [FORMAT, [list(pair) for pair in sorted(options.items())], shards]
    return None


def _bytes(places: Sequence[str]) -> int:
    """Of local shards; of remote ones their number."""
    return sum(os.path.getsize(place) if os.path.exists(place) else 1 for place in places)


def _told(one: Scan) -> dict[str, Any]:
    return {
        "client": one.client, "sizes": one.sizes, "broken": one.broken, "counts": one.counts, "shape": one.shape, "md5": one.md5, "notes": one.notes,
        "kept": [(kept.shard, kept.index, kept.label) for kept in one.kept],
    }  # fmt: skip


def _heard(told: dict[str, Any]) -> Scan:
    none = torch.empty(0, dtype=torch.uint8)
    return Scan(
        told["client"], tuple(told["sizes"]), tuple(map(tuple, told["broken"])), {int(label): count for label, count in told["counts"].items()},
        tuple(told["shape"]), told["md5"], tuple(told["notes"]), tuple(Kept(*kept, none) for kept in told["kept"]),
    )  # fmt: skip


def _shared_images(scans: list[Scan], shape: tuple[int, int, int], world: World) -> tuple[Tensor, Tensor]:
    """The kept images of all clients, each from the rank that has it: a sum with zeros, exact."""
    kept = [one for client in scans for one in client.kept]
    images = torch.zeros(len(kept), *shape, dtype=torch.uint8)
    for row, one in zip(images, kept, strict=True):
        if one.image.numel():
            row.copy_(one.image.expand(shape))
    return world.all_reduce_sum_(images), torch.tensor([one.label for one in kept])


def _like(part: Images, shape: tuple[int, int, int], split: str) -> Images:
    """A split's images with the clients' channels."""
    if tuple(part.images.shape[2:]) != shape[1:] or part.images.shape[1] > shape[0]:
        raise InputError(f"the {split} shards hold images of shape {tuple(part.images.shape[1:])}, the clients' of {shape}: set data.size to resize all.")
    return replace(part, images=part.images.expand(-1, shape[0], -1, -1).contiguous())


def _counts(scans: list[Scan], held_out: dict[tuple[int, int, int], int]) -> Tensor:
    """int64 (clients, classes) of what is trained on."""
    number = max(max(one.counts) for one in scans) + 1
    if number > sum(sum(one.counts.values()) for one in scans):  # before anything counts up to it
        raise InputError(f"labels: class {number - 1} leaves classes empty: number them without gaps.")
    counts = torch.zeros(len(scans), number, dtype=torch.int64)
    for one in scans:
        for label, count in one.counts.items():
            counts[one.client, label] = count
    for (client, _, _), label in held_out.items():
        counts[client, label] -= 1
    return counts


def _joint_md5(scans: list[Scan], beside: Shards | None) -> str:
    return hashlib.md5("|".join([*(one.md5 for one in scans), beside.md5 if beside else ""]).encode(), usedforsecurity=False).hexdigest()
