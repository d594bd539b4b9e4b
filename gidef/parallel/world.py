"""The ranks of a run: who we are, on which device, and the few collectives that gidef needs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from gidef.errors import InputError, RankFailure
from gidef.parallel.watch import Watch, fresh_name
from gidef.precision import full_float32


@dataclass(frozen=True, slots=True)
class World:
    """This rank among `size`, and its device. With size 1 there is no process group and every collective is a no-op.

    All ranks must call the same methods in the same order. Small values travel as JSON over gloo, never as pickles.
    Every collective first waits until all ranks have come, as long as those that are missing are alive; one that fails or
    goes missing ends the wait with a RankFailure that names it (see `gidef.parallel.watch`).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    nccl: Any = field(default=None, repr=False, compare=False)
    watch: Watch | None = field(default=None, repr=False, compare=False)
    group: Any = field(default=None, repr=False, compare=False)
    """The gloo group of one axis of a mesh, whose ranks `rank` and `size` then count; None for all ranks of the run."""
    mesh: Any = field(default=None, repr=False, compare=False)
    """The run's `mesh.Mesh` where a client spans several ranks, else None."""
    cores: int = 0
    """This rank's share of its host's cores (see `gidef.parallel.seats`); 0 while nobody has asked."""

    def meet(self, label: str) -> None:
        """Wait for all ranks, however long those that live are busy; for code that calls torch's collectives itself, before it does.

        Raises: RankFailure if a rank fails or goes missing meanwhile, with its name.
        """
        if self.watch is not None:
            self.watch.meet(label)

    @contextlib.contextmanager
    def _together(self, label: str, *, met: bool = False) -> Iterator[None]:
        """All are there before a collective begins; one that breaks says who is lost. An axis' ranks do not wait for the others of the run."""
        if self.group is None and not met:
            self.meet(label)
        try:
            yield
        except RuntimeError as error:
            if self.watch is None:
                raise
            raise self.watch.explain(error, label) from error

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Around work that calls torch's own collectives: an error that follows from another rank's end is raised as a RankFailure that names it.

        Any other error is raised as it is, a RuntimeError some seconds later: whether a rank is lost is not known at once.
        """
        try:
            yield
        except RankFailure:
            raise
        except RuntimeError as error:
            if self.watch is None or (lost := self.watch.blamed()) is None:
                raise
            raise lost from error

    def all_reduce_sum_(self, tensor: Tensor, *, met: bool = False) -> Tensor:
        """Sum over ranks, in place: any shape, CPU or CUDA. Exact, and equal on all ranks, for integers. met: the caller has just called `meet`."""
        if self.size == 1:
            return tensor
        if tensor.is_cuda and self.nccl is None:  # ranks that share a GPU: NCCL refuses them
            host = tensor.cpu()
            with self._together("all_reduce_sum_", met=met):
                dist.all_reduce(host, group=self.group)
            return tensor.copy_(host)
        with self._together("all_reduce_sum_", met=met):
            dist.all_reduce(tensor, group=self.nccl if tensor.is_cuda else self.group)
        return tensor

    def all_reduce_buckets_(self, tensor: Tensor, *, entries: int) -> Iterator[int]:
        """As `all_reduce_sum_` of a flat tensor (n,), in buckets of so many entries: yields how many of the first entries are summed, while the next two
        buckets are on their way. All ranks have just met, and take all the buckets; no other collective meanwhile.
        """
        spans = [slice(first, min(first + entries, len(tensor))) for first in range(0, len(tensor), entries)]
        group = self.nccl if tensor.is_cuda else self.group
        on_the_way: deque[tuple[Tensor, Any]] = deque()
        for place, span in enumerate(spans):
            while self.size > 1 and len(on_the_way) < min(3, len(spans) - place):
                ahead = tensor[spans[place + len(on_the_way)]]
                part = ahead.cpu() if ahead.is_cuda and self.nccl is None else ahead  # ranks that share a GPU: NCCL refuses them
                with self._together("all_reduce_buckets_", met=True):
                    on_the_way.append((part, dist.all_reduce(part, group=group, async_op=True)))
            if on_the_way:
                part, work = on_the_way.popleft()
                with self._together("all_reduce_buckets_", met=True):
                    work.wait()
                if part.device != tensor.device:
                    tensor[span].copy_(part)
            yield span.stop

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """parts[r], 1-D and of one dtype and device, goes to rank r; returns what every rank sent here, by rank, of those lengths."""
        if self.size == 1:
            return [parts[0]]
        sent = torch.cat(list(parts))
        host = sent.cpu() if sent.is_cuda and self.nccl is None else sent
        received = host.new_empty(sum(lengths))
        with self._together("all_to_all"):
            dist.all_to_all_single(received, host, list(lengths), [len(part) for part in parts], group=self.nccl if host.is_cuda else self.group)
        return list(received.to(sent.device).split(list(lengths)))

    def reduce_scatter_sum(self, parts: Tensor) -> Tensor:
        """The sum over ranks of parts[rank]: parts (size, n) → (n,). Exact for integers."""
        if self.size == 1:
            return parts[0]
        host = parts.cpu() if parts.is_cuda and self.nccl is None else parts
        own = torch.empty_like(host[0])
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the older name, before torch 2.14
        with self._together("reduce_scatter_sum"):
            reduce_scatter(own, host.flatten(), group=self.nccl if host.is_cuda else self.group)
        return own.to(parts.device)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, of one shape and dtype, by rank."""
        if self.size == 1:
            return [tensor]
        host = tensor.cpu() if tensor.is_cuda and self.nccl is None else tensor
        parts = [torch.empty_like(host) for _ in range(self.size)]
        with self._together("all_gather"):
            dist.all_gather(parts, host, group=self.nccl if host.is_cuda else self.group)
        return [part.to(tensor.device) for part in parts]

    def barrier(self) -> None:
        """Return when every rank got here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank: the same answer on all, so that all stop together."""
        return bool(self.all_reduce_sum_(torch.tensor(int(flag))))

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Values go through JSON: tuples come back as lists, keys as strings."""
        data = json.dumps(value).encode()
        if self.size == 1:
            return [json.loads(data)]
        with self._together("all_gather_json"):
            lengths = [int(length) for length in self._gather(torch.tensor([len(data)]))]
            own = torch.zeros(max(lengths), dtype=torch.uint8)
            own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            parts = zip(self._gather(own), lengths, strict=True)
        return [json.loads(part[:length].numpy().tobytes()) for part, length in parts]

    def broadcast_json(self, value: Any, *, source: int = 0) -> Any:
        """The source rank's value on every rank, through JSON; the others' values are ignored."""
        data = json.dumps(value).encode() if self.rank == source else b""
        if self.size == 1:
            return json.loads(data)
        length = torch.tensor([len(data)])
        with self._together("broadcast_json"):
            dist.broadcast(length, group=self.group, group_src=source)
            text = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(text, group=self.group, group_src=source)
        return json.loads(text.numpy().tobytes())

    def agree(self, label: str, text: str | bytes) -> None:
        """Raise RuntimeError on every rank, naming those that differ from the majority, unless all hold the same text."""
        if self.size == 1:
            return
        digest = hashlib.sha256(text.encode() if isinstance(text, str) else text).digest()
        with self._together("agree"):
            digests = [bytes(part.tolist()) for part in self._gather(torch.frombuffer(bytearray(digest), dtype=torch.uint8))]
        common = max(digests, key=lambda one: (digests.count(one), -digests.index(one)))
        odd = [rank for rank, one in enumerate(digests) if one != common]
        if odd:
            raise RuntimeError(f"ranks disagree on {label}: {odd} of {self.size} ranks differ from the others")

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor on the CPU, by rank, once all have come."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.group)
        return parts


@dataclass(frozen=True, slots=True)
class Placement:
    """What the launcher said: this process among `size`, and where they meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    init_method: str = "env://"


def placement(environ: Mapping[str, str]) -> Placement:
    """Read torchrun's variables, else srun's, else a single process.

    torchrun:  RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
    srun:      SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID when the step has several tasks; they meet at
               MASTER_ADDR and MASTER_PORT if set, else on the step's first node at 20000 + job number mod 20000.
    A shell inside a Slurm allocation, and `srun -n1`, are single processes. Several independent runs under one `srun -n4` cannot
    be told from four ranks of one run: start them as steps of one task.

    Raises: InputError when a variable is missing or makes no sense.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, size, local_rank = (_number(environ, name, default=0 if name == "LOCAL_RANK" else None) for name in names)
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if size > 1 and name not in environ]
        if missing:
            raise InputError(f"WORLD_SIZE={size} without {' and '.join(missing)}: start with torchrun, or unset RANK and WORLD_SIZE")
        place = Placement(rank, size, local_rank)
    elif _number(environ, "SLURM_STEP_NUM_TASKS", default=1) > 1:
        rank, size, local_rank = (_number(environ, f"SLURM_{name}") for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
        host = environ.get("MASTER_ADDR") or first_host(nodes)
        port = environ.get("MASTER_PORT") or 20000 + _number(environ, "SLURM_JOB_ID") % 20000
        place = Placement(rank, size, local_rank, f"tcp://{host}:{port}")
    else:
        return Placement()
    if not 0 <= place.rank < place.size:
        raise InputError(f"rank {place.rank} of {place.size}: the launcher's variables contradict each other")
    return place


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: `a[003-010,12]n[1-2],b7` → `a003n1`. Raises InputError for an empty list."""
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes.strip())
    if first is None:
        raise InputError(f"no first host in SLURM_JOB_NODELIST={nodes!r}: set MASTER_ADDR to rank 0's host")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


@contextlib.contextmanager
def open_world(
    device: str = "auto", timeout_s: float = 180, *, stall_s: float = 3600, init_method: str | None = None, rank: int | None = None, size: int | None = None
) -> Iterator[World]:
    """Join the run's other ranks, if the launcher started any, and leave them at the end.

    Control values always travel over gloo. Sums of CUDA tensors travel over NCCL when every rank has a GPU to itself,
    and through host memory when ranks share one. An error leaves without waiting for anybody, and tells the others, whose
    next collective raises RankFailure.

    Args:    device: "auto" (GPU number LOCAL_RANK modulo the GPUs seen, else the CPU), "cpu", "cuda" or "cuda:1".
             timeout_s: a rank without a sign of life for so long is given up, as is a collective that all have entered.
             A rank that was killed is noticed at once.  stall_s: longest wait for a rank that lives but does not come.
             init_method, rank, size: meet there instead of where the launcher's variables say, e.g. "file:///shared/meet".
    Raises:  InputError for contradictory variables or a device that is not there.
    """
    place = placement(os.environ)
    if init_method is not None:
        place = Placement(rank or 0, size or 1, rank or 0, init_method)
    chosen = _choose_device(device, place.local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        full_float32()
    if place.size == 1:
        yield World(0, 1, place.local_rank, chosen)
        return
    timeout = timedelta(seconds=timeout_s)
    try:
        if place.init_method == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
            store = dist.PrefixStore(fresh_name(store, place.rank, place.size, timeout_s=timeout_s), store)
            dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size, timeout=timeout)
        else:
            dist.init_process_group("gloo", init_method=place.init_method, rank=place.rank, world_size=place.size, timeout=timeout)
    except RuntimeError as error:
        where = os.environ.get("MASTER_ADDR", place.init_method) if place.init_method == "env://" else place.init_method
        raise RankFailure(f"the {place.size} ranks did not all come together at {where} within {timeout_s:g} s: rank {place.rank} says {error}") from error
    nccl = watch = None
    try:
        watch = Watch(place.rank, place.size, _get_default_store(), timeout_s=timeout_s, stall_s=stall_s, store_host=_store_host())
        world = World(place.rank, place.size, place.local_rank, chosen, watch=watch)
        seats = world.all_gather_json(str(torch.cuda.get_device_properties(chosen).uuid) if chosen.type == "cuda" else None)
        if None not in seats and len(set(seats)) == place.size:
            nccl = dist.new_group(backend="nccl", timeout=timeout, device_id=chosen)
            world = dataclasses.replace(world, nccl=nccl)
        yield world
        watch.leave()
    except BaseException as error:
        if nccl is not None:
            nccl.abort()  # else destroy waits for collectives that the other ranks may never join
        if watch is not None:
            watch.fail(error)
        raise
    finally:
        dist.destroy_process_group()


def _store_host() -> str:
    """Where the ranks' store is, in words."""
    host = os.environ.get("MASTER_ADDR", "")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"the launcher on {host}"
    return f"rank 0 on {host}" if host else "rank 0's host"


def _choose_device(device: str, local_rank: int) -> torch.device:
    """Torch device of this rank."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda", local_rank % count) if count else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device={device!r}: expected auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device={device!r}: expected auto, cpu, cuda or cuda:N")
    if chosen.type == "cpu":
        return chosen
    if (chosen.index or 0) >= count:
        raise InputError(f"device={device!r}, but {count} CUDA devices are visible here: use auto or cpu")
    return chosen if chosen.index is not None else torch.device("cuda", local_rank % count)


def _number(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    """An integer variable."""
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdigit():
        raise InputError(f"environment variable {name}={text!r}: expected a number; unset the launcher's variables for a single process")
    return int(text)
