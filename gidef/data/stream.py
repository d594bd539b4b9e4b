"""Clients whose images do not fit in memory: each streams from shards of its own, in an order that (seed, round, client) fixes.

Before the first round every shard is read once (`scan`): that finds archives that are cut or changed, counts what is broken and skipped, and keeps a
few images of every client in memory. Victims, tuning and judge, the images that a client has at hand, and, without splits of their own, validation and
test come from these. In training (`ClientShards.batches`) no more than the batches ahead is in memory of a local, uncompressed shard, where each image
is read at its place, beside an index of some 25 bytes per example; of other shards, which are read from end to end, up to three windows of `buffer`
examples, not yet decoded.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gidef.data.decode import MAX_SIDE, MIN_SIDE
from gidef.data.images import resize
from gidef.data.tar_stream import ARRAY, JSON, LABEL, PICTURES, Sample, ShardReader, image_of, label_of, remote
from gidef.errors import InputError
from gidef.rng import generator, stream_seed

AHEAD = 4
"""Batches that are being read and decoded while the client trains on one."""
OF_EACH_CLASS = 2
"""Images of every class at every client that stay in memory at least, so that rare classes are among them."""
Item = TypeVar("Item")
KINDS = (*PICTURES, ARRAY)


@dataclass(frozen=True, slots=True)
class Kept:
    """An example that stays in memory: where it stands, and what it is."""

    shard: int
    index: int
    label: int
    image: Tensor


@dataclass(frozen=True, slots=True)
class Scan:
    """What one client's shards hold.

    sizes: examples of every shard, broken ones included.  broken: their places in it, by shard.  counts: good examples by class.
    shape: (C, H, W) of its images, RGB if any is.  kept: as many as asked for, a function of (seed, client), in the order of the shards.
    """

    client: int
    sizes: tuple[int, ...]
    broken: tuple[tuple[int, ...], ...]
    counts: dict[int, int]
    shape: tuple[int, int, int]
    md5: str
    notes: tuple[str, ...]
    kept: tuple[Kept, ...]


def scan(client: int, places: Sequence[str], *, size: int | None, keep: int, seed: int, decoders: int = 1) -> Scan:
    """Read a client's shards once, from end to end, and decode every example.

    Args:   size: side to resize to; None takes the first image's size.  keep: images that stay in memory, at least 1 (the bottom-k of
            random keys), beside OF_EACH_CLASS of every class.  decoders: threads.
    Raises: InputError for a broken archive, and when no example is left.
    """
    reader, draws = ShardReader(), np.random.default_rng(stream_seed(seed, "kept", client))
    sizes, broken, counts = [0] * len(places), [[] for _ in places], Counter()
    target, channels, resized = None if size is None else (size, size), 0, 0
    evenly = _Smallest(keep)
    by_class: dict[int, _Smallest] = {}

    def samples() -> Iterator[tuple[int, Sample]]:
        for shard, place in enumerate(places):
            for sample in reader.samples(place):
                yield shard, sample

    with ThreadPoolExecutor(decoders, initializer=_settle) as pool:
        for (shard, sample), example in _mapped(pool, lambda pair: _tried(pair[1]), samples(), 4 * decoders):
            index, sizes[shard] = sizes[shard], sizes[shard] + 1
            if isinstance(example, Exception):
                broken[shard].append(index)
                reader.refuse(places[shard], sample, example)
                continue
            image, label = example
            if target is None:
                target = tuple(image.shape[1:])
                if not MIN_SIDE <= min(target) <= max(target) <= MAX_SIDE:
                    raise InputError(f"{places[shard]}: the first image has {target[1]}x{target[0]} pixels; set data.size (a side in pixels) to resize all.")
            resized += tuple(image.shape[1:]) != target
            counts[label] += 1
            channels = max(channels, image.shape[0])
            key = (draws.random(), shard, index)
            for chosen in (evenly, by_class.setdefault(label, _Smallest(OF_EACH_CLASS))):
                chosen.offer(key, (label, image))
    if not counts:
        raise InputError(f"client {client}: no example of its {len(places)} shards has both a readable image and a class. {' '.join(reader.notes())}")
    kept = evenly.items()
    for chosen in by_class.values():
        kept |= chosen.items()
    notes = list(reader.notes())
    if resized:
        notes.append(f"{resized} of {counts.total()} images are resized to {target[1]}x{target[0]} pixels (antialiased bilinear).")
    return Scan(
        client, tuple(sizes), tuple(map(tuple, broken)), dict(sorted(counts.items())), (channels, *target), reader.digest.hexdigest(),
        tuple(f"client {client}: {note}" for note in notes),
        tuple(Kept(*place, label, _fitted(image, (channels, *target))) for place, (label, image) in sorted(kept.items())),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ClientShards:
    """A client's training examples, in shards: a `types.Source`.

    left_out: by shard, the places in it of broken and of held-out examples.  shape: (C, H, W) that every image is brought to.
    buffer: examples of a window.  decoders: threads that read and decode for each client that trains.  pin: batches in page-locked memory, for a GPU.
    """

    client: int
    places: tuple[str, ...]
    sizes: tuple[int, ...]
    left_out: tuple[frozenset[int], ...]
    shape: tuple[int, int, int]
    buffer: int
    decoders: int = 2
    pin: bool = False
    _known: dict[int, _Index] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    @property
    def num_examples(self) -> int:
        return sum(self.sizes) - sum(map(len, self.left_out))

    def position(self, shard: int, index: int) -> int:
        """An example's position in the client's data, from 0, in the order of the shards."""
        return self._begins()[shard] + index - sum(place < index for place in self.left_out[shard])

    def batches(self, *, batch_size: int, epochs: int, seed: int, round: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """(epoch, rows, images uint8 (b, C, H, W), labels) of each batch, on the CPU; every example once an epoch, the last batch may be smaller.

        An epoch takes the shards in a fresh order, cuts them into windows of `buffer` examples and permutes each: a function of (seed, round,
        client) alone. With all examples in one window the batches are those of `clients.local.batches`, bit for bit.

        Raises: InputError if a shard is not what it was when it was scanned. Close the iterator to end it early.
        """
        with ThreadPoolExecutor(self.decoders, initializer=_settle) as pool:

            def submitted() -> Iterator[tuple[int, Future]]:
                for epoch, batch in self._order(batch_size, epochs, seed, round):
                    yield epoch, pool.submit(self._decoded, batch)

            with contextlib.closing(_ahead(submitted(), AHEAD)) as batches:
                for epoch, decoded in batches:
                    yield epoch, *decoded.result()

    def _order(self, batch_size: int, epochs: int, seed: int, round: int) -> Iterator[tuple[int, list[tuple[int, Any]]]]:
        """(epoch, [(position, example)]) of each batch."""
        order = generator(seed, "order", round, self.client)
        for epoch in range(epochs):
            shards = torch.randperm(len(self.places), generator=generator(seed, "shards", round, self.client, epoch)).tolist()
            batch: list[tuple[int, Any]] = []
            for window in _ahead(self._windows(shards), 1):
                window.sort(key=lambda example: example[0])
                for index in torch.randperm(len(window), generator=order).tolist():
                    batch.append(window[index])
                    window[index] = None
                    if len(batch) == batch_size:
                        yield epoch, batch
                        batch = []
            if batch:
                yield epoch, batch

    def _windows(self, shards: Iterable[int]) -> Iterator[list[tuple[int, Any]]]:
        examples = itertools.chain.from_iterable(map(self._examples, shards))
        while window := list(itertools.islice(examples, self.buffer)):
            yield window

    def _examples(self, shard: int) -> Iterator[tuple[int, Any]]:
        """(position, where the example is read, or what was read of it) of each example of a shard."""
        position, place, left_out = self._begins()[shard], self.places[shard], self.left_out[shard]
        found = enumerate(self._index(shard)) if _seekable(place) else enumerate(ShardReader(digest=False).samples(place))
        count = 0
        for index, example in found:
            count += 1
            if index not in left_out:
                yield position, (shard, index) if _seekable(place) else example
                position += 1
        if count != self.sizes[shard]:
            raise self._changed(place, f"{count} examples instead of {self.sizes[shard]}")

    def _decoded(self, batch: list[tuple[int, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        images = torch.empty(len(batch), *self.shape, dtype=torch.uint8, pin_memory=self.pin)
        labels = torch.empty(len(batch), dtype=torch.int64)
        for row, (_, example) in enumerate(batch):
            try:
                sample = self._index(example[0]).read(example[1]) if isinstance(example, tuple) else example
                image, label = image_of(sample), label_of(sample)
            except (InputError, ValueError, OSError) as error:
                place = self.places[example[0]] if isinstance(example, tuple) else example["__url__"]
                raise self._changed(place, str(error)) from error
            images[row], labels[row] = _fitted(image, self.shape), label
        return torch.tensor([position for position, _ in batch]), images, labels

    def _index(self, shard: int) -> _Index:
        with self._lock:
            if shard not in self._known:
                self._known[shard] = _Index(self.places[shard])
            return self._known[shard]

    def _begins(self) -> list[int]:
        good = [size - len(left) for size, left in zip(self.sizes, self.left_out, strict=True)]
        return [0, *itertools.accumulate(good)]

    def _changed(self, place: str, why: str) -> InputError:
        return InputError(f"{place} is not what it was when the run began ({why}): restore it, and resume.")


class _Index:
    """Where a local, uncompressed shard's examples stand."""

    def __init__(self, place: str) -> None:
        self._place, rows = place, []
        for sample in ShardReader(digest=False).spans(place):
            image, label = (next((kind for kind in kinds if kind in sample), None) for kinds in (KINDS, (LABEL, JSON)))
            none = (0, -1)
            rows.append((*sample.get(image, none), KINDS.index(image) if image else 0, *sample.get(label, none), label == LABEL))
        self._rows = np.array(rows, dtype=[("at", "i8"), ("bytes", "i4"), ("kind", "i1"), ("label_at", "i8"), ("label_bytes", "i4"), ("text", "?")])

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def read(self, index: int) -> Sample:
        """One example's bytes. The file is opened for it, so that no number of shards exhausts the process's files."""
        row, sample = self._rows[index], {"__key__": str(index), "__url__": self._place}
        handle = os.open(self._place, os.O_RDONLY)
        try:
            if row["bytes"] >= 0:
                sample[KINDS[row["kind"]]] = os.pread(handle, int(row["bytes"]), int(row["at"]))
            if row["label_bytes"] >= 0:
                sample[LABEL if row["text"] else JSON] = os.pread(handle, int(row["label_bytes"]), int(row["label_at"]))
        finally:
            os.close(handle)
        return sample


class _Smallest:
    """The values of the k smallest keys (number, place…) among those offered."""

    def __init__(self, k: int) -> None:
        self._k, self._heap = k, []

    def offer(self, key: tuple[float, int, int], value: Any) -> None:
        entry = (-key[0], *key[1:], value)
        if len(self._heap) < self._k:
            heapq.heappush(self._heap, entry)
        elif entry[0] > self._heap[0][0]:
            heapq.heapreplace(self._heap, entry)

    def items(self) -> dict[tuple[int, ...], Any]:
        """Values by place."""
        return {tuple(entry[1:-1]): entry[-1] for entry in self._heap}


def _seekable(place: str) -> bool:
    return not remote(place) and place.endswith(".tar")


def _fitted(image: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """uint8 (C, H, W) of that shape: resized, grey repeated."""
    if tuple(image.shape[1:]) != shape[1:]:
        image = resize(image[None], shape[1:])[0]
    return image.expand(shape)


def _tried(sample: Sample) -> tuple[Tensor, int] | Exception:
    try:
        return image_of(sample), label_of(sample)
    except (InputError, ValueError) as error:
        return error


def _settle() -> None:
    """A thread beside the one that trains computes with one thread of its own."""
    torch.set_num_threads(1)


def _mapped(pool: ThreadPoolExecutor, do: Callable[[Any], Any], items: Iterable[Item], ahead: int) -> Iterator[tuple[Item, Any]]:
    """(item, do(item)) in the order of the items, at most `ahead` of them at a time."""
    waiting: deque[tuple[Item, Future]] = deque()
    for item in items:
        waiting.append((item, pool.submit(do, item)))
        if len(waiting) >= ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for item, future in waiting:
        yield item, future.result()


def _ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The items, taken by a thread of its own, `depth` of them before they are asked for. Its errors are raised here; closing ends the thread."""
    ready: queue.Queue = queue.Queue(depth)
    stop, end = threading.Event(), object()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.05)
            except queue.Full:
                continue

    def fill() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((end, None))
        except BaseException as error:  # of any kind: raised where the items are used
            put((end, error))
        finally:
            items.close()

    thread = threading.Thread(target=fill, name="stream", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()
