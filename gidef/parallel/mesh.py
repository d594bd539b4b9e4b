"""Two axes of ranks, clients × shard: the ranks of one group work on the same client, the groups on different ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gidef.errors import Diverged, InputError
from gidef.parallel.cohort import COUNTERS, Part
from gidef.parallel.plan import longest_first
from gidef.parallel.world import World
from gidef.types import Client, Tensors, Update
from gidef.updates import CohortMean, FixedPointSum


@dataclass(frozen=True, slots=True)
class Mesh:
    """Rank r of the run is number r mod G of group r // G.

    clients: the ranks with this rank's number, one of each group.  shard: the ranks of this rank's group.
    device_mesh: torch's mesh with the axes "clients" and "shard".  saving: a gloo group over `shard` for checkpoints, which are written
    by a thread while other collectives run.
    """

    clients: World
    shard: World
    device_mesh: DeviceMesh
    saving: Any


def with_mesh(world: World, shard_size: int, *, timeout_s: float = 600) -> World:
    """The world, with a mesh of groups of `shard_size` ranks; as it is for groups of one. All ranks call this together.

    A rank that is lost breaks the groups, whose collectives wait up to `timeout_s` for one that lives.

    Raises: InputError where the ranks do not fill whole groups, or where ranks share a GPU.
    """
    world.agree("the shard size", str(shard_size))
    if shard_size == 1:
        return world
    if world.size % shard_size:
        raise InputError(
            f"speed.shard_size={shard_size}, but the run has {world.size} rank(s), which do not make whole groups: start a multiple of {shard_size}, "
            f"e.g. torchrun --nproc-per-node {shard_size}, or set another shard size."
        )
    if world.device.type == "cuda" and world.nccl is None:
        raise InputError(f"speed.shard_size={shard_size} needs a GPU for each rank, and some share one: start fewer ranks, or set speed.device=cpu.")
    grid = torch.arange(world.size).reshape(-1, shard_size)
    group, number = divmod(world.rank, shard_size)
    axes = {"clients": grid.T.tolist(), "shard": grid.tolist()}
    timeout = timedelta(seconds=timeout_s)
    made = {name: _made(rows, "gloo", timeout) for name, rows in axes.items()}
    nccl = {name: _made(rows, "nccl", timeout) for name, rows in axes.items()} if world.nccl is not None else dict.fromkeys(axes)
    saving = _made(axes["shard"], "gloo", timeout)
    fast = [nccl[name] or made[name] for name in axes]
    mesh = Mesh(
        clients=World(group, len(grid), world.local_rank, world.device, nccl["clients"], watch=world.watch, group=made["clients"]),
        shard=World(number, shard_size, world.local_rank, world.device, nccl["shard"], watch=world.watch, group=made["shard"]),
        device_mesh=DeviceMesh.from_group(fast, world.device.type, mesh=grid, mesh_dim_names=tuple(axes)),
        saving=saving,
    )
    world.watch.guard([*made.values(), *(group for group in nccl.values() if group is not None), saving])
    return replace(world, mesh=mesh)


def _made(rows: list[list[int]], backend: str, timeout: timedelta) -> Any:
    """This rank's group of those that the rows name; every rank makes all of them."""
    return dist.new_subgroups_by_enumeration(rows, timeout=timeout, backend=backend)[0]


class Layout:
    """How named tensors lie over a group of ranks: in slices along dim 0, as torch.chunk cuts and FSDP2 lays parameters.

    A name's part behind its last "/" decides: `params/NAME` and `control/NAME` lie as NAME does. Names that are not among `shapes`, such as a
    decoder's, are whole on every rank.

    Args: shapes: of the whole tensors that are cut, each of one dim at least.
    """

    def __init__(self, mesh: Mesh, shapes: Mapping[str, torch.Size]) -> None:
        self.mesh, self._shapes = mesh, dict(shapes)

    def shape(self, name: str) -> torch.Size | None:
        """The whole tensor's, None if the name is not cut."""
        return self._shapes.get(name.rpartition("/")[2])

    def rows(self, name: str) -> slice:
        """This rank's rows of the whole tensor, possibly none."""
        rank, count = self.mesh.shard.rank, self._shapes[name.rpartition("/")[2]][0]
        each = -(-count // self.mesh.shard.size)
        return slice(min(count, rank * each), min(count, (rank + 1) * each))

    def slices(self, tensors: Tensors, device: torch.device | None = None) -> Tensors:
        """This rank's part of whole tensors, in memory of its own."""
        return {
            name: (tensor if self.shape(name) is None else tensor[self.rows(name)]).detach().to(device or tensor.device, copy=True)
            for name, tensor in tensors.items()
        }

    def whole(self, slices: Tensors) -> Mapping[str, Tensor]:
        """The whole tensors, each gathered when it is read: the group's ranks must read the same ones in the same order."""
        return _Whole(self, slices)

    def gathered(self, slices: Tensors, *, keep: bool = True) -> Tensors:
        """All whole tensors on the ranks with `keep`, and nothing on the others of the group, which must call this as well."""
        kept = {}
        for name, tensor in self.whole(slices).items():
            if keep:
                kept[name] = tensor
        return kept

    def numel(self, slices: Tensors) -> int:
        """Entries of the whole tensors."""
        return sum(math.prod(self.shape(name) or tensor.shape) for name, tensor in slices.items())

    def spread(self, slices: Tensors) -> dict[str, Tensor]:
        """The slices as DTensors, for torch.distributed.checkpoint."""
        return {name: tensor if self.shape(name) is None else self._spread(tensor, self.shape(name)) for name, tensor in slices.items()}

    def empty(self, tensors: Mapping[str, tuple[Sequence[int], torch.dtype]], device: torch.device) -> Tensors:
        """Slices, to be filled, of whole tensors of these shapes and dtypes.

        Raises: InputError where a shape is not the model's.
        """
        made = {}
        for name, (shape, dtype) in tensors.items():
            if self.shape(name) not in (None, torch.Size(shape)):
                raise InputError(f"{name} is {tuple(shape)} there and {tuple(self.shape(name))} in this model: it belongs to another one.")
            rows = list(shape) if self.shape(name) is None else [self.rows(name).stop - self.rows(name).start, *shape[1:]]
            made[name] = torch.zeros(rows, dtype=dtype, device=device)
        return made

    def _spread(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard  # more than half a second, which few runs need

        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(tensor, self.mesh.device_mesh["shard"], [Shard(0)], run_check=False, shape=shape, stride=stride)

    def _gather(self, name: str, tensor: Tensor) -> Tensor:
        shape = self.shape(name)
        if shape is None:
            return tensor
        padded = tensor.new_zeros(-(-shape[0] // self.mesh.shard.size), *shape[1:])
        padded[: len(tensor)] = tensor
        return torch.cat(self.mesh.shard.all_gather(padded))[: shape[0]]


class _Whole(Mapping):
    def __init__(self, layout: Layout, slices: Tensors) -> None:
        self._layout, self._slices = layout, slices

    def __getitem__(self, name: str) -> Tensor:
        return self._layout._gather(name, self._slices[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)


def mean_over_mesh(
    mesh: Mesh, *, costs: Callable[[Client], float] | None = None, learn: Callable[[Sequence[Client], Sequence[float]], None] | None = None
) -> Callable[..., CohortMean]:
    """`mean_over(shared_update, cohort, *, template, metric_names)` over the client axis: the twin of `mean_over_world` for groups of ranks.

    Each group trains its clients, longest first, and each of its ranks sums its slices of their updates with the same rank of the other groups:
    every client counts once, and nothing is gathered. The mean has the same bits for any number of groups.

    Args:    costs, learn: as in `mean_over_world`; a client's seconds are those of its group's first rank.
    Raises:  (by the returned callable) InputError on every rank if a client raised one, Diverged if that, which must be the same on all ranks of a group. Any
             other error leaves this rank at once: its group cannot go on, and the others see the connection close.
    """
    cost_of = costs or (lambda client: client.num_examples)

    def over_cohort(
        shared_update: Callable[..., Update], cohort: Sequence[Client], *, template: Tensors, metric_names: Sequence[str] = ()
    ) -> CohortMean:
        total = FixedPointSum(template, metric_names=metric_names, max_terms=len(cohort), counters=COUNTERS)
        mine = longest_first([cost_of(client) for client in cohort], mesh.clients.size)[mesh.clients.rank]
        errors: dict[int, Exception] = {}
        seconds: dict[int, float] = {}
        for position in mine:
            client, began = cohort[position], time.perf_counter()
            try:
                with mesh.shard.explained():
                    update = shared_update(client, worker=0)
                refused = None
                try:
                    total.add(update.delta, update.num_examples, update.metrics, client=client.id)
                except Diverged as error:
                    refused = error
                if mesh.shard.any(refused is not None):  # a slice that cannot be summed is one rank's alone
                    raise refused or Diverged(f"client {client.id}: another rank of its group refused its part of the update")
            except InputError as error:
                errors[position] = error
                break
            seconds[position] = time.perf_counter() - began
        part = Part(mesh.clients, cohort, tuple(mine), errors, seconds)
        total.counters.copy_(part.counters())
        mesh.clients.meet("the sum of a round")
        mesh.clients.all_reduce_sum_(total.buffer)
        spent, _ = part.settle(total.counters.tolist())
        spent = mesh.shard.broadcast_json(spent)  # a group whose ranks planned by clocks of their own would part
        if learn is not None:
            learn(cohort, spent)
        return CohortMean(*total.mean(), count=total.count, seconds=tuple(spent))

    return over_cohort
