"""The server step in slices: each rank keeps, and steps, its share of the coordinates.

Reduce-scatter, step, all-gather instead of all-reduce and step: the same bytes travel, but of the sum, once it is reduced, and of the optimiser's slots a
rank holds 1 / ranks. Server steps work entry by entry, so that the bits are those of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gidef.parallel.world import World
from gidef.types import ServerState, Tensors

BLOCK = 1 << 20
"""Entries of a slice that travel at a time."""


class Slices:
    """The template's entries in name order, cut into `world.size` equal runs (the last may be shorter); rank r's is the r-th.

    A slice of named tensors is {name: 1-D tensor} of the entries in this rank's run, names without any left out.
    """

    def __init__(self, world: World, template: Tensors) -> None:
        self._world, self._shapes, self._begins, end = world, {}, {}, 0
        for name in sorted(template):
            self._shapes[name], self._begins[name] = template[name].shape, end
            end += template[name].numel()
        self.length, self.width = end, -(-end // world.size)
        self.begin = min(world.rank * self.width, end)
        self.end = min(self.begin + self.width, end)

    def of(self, tensors: Tensors) -> Tensors:
        """This rank's slice of whole tensors: views."""
        return {name: tensors[name].reshape(-1)[first:last] for name, (first, last) in self._within().items()}

    def cut(self, flat: Tensor) -> Tensors:
        """The named parts of this rank's run, 1-D of length end − begin: views."""
        return {name: flat[self._begins[name] + first - self.begin :][: last - first] for name, (first, last) in self._within().items()}

    def reduce(self, flat: Tensor) -> Tensor:
        """This rank's run of the sum over ranks of flat (length,)."""
        own = flat.new_zeros(self.width)
        for first in range(0, self.width, BLOCK):
            last = min(first + BLOCK, self.width)
            sent = flat.new_zeros(self._world.size, last - first)
            for rank, row in enumerate(sent):
                part = flat[min(rank * self.width + first, self.length) : min(rank * self.width + last, self.length)]
                row[: len(part)] = part
            own[first:last] = self._world.reduce_scatter_sum(sent)
        return own[: self.end - self.begin]

    def gather(self, slices: Tensors, like: Tensors, *, everywhere: bool = True) -> Tensors:
        """Whole tensors, on every rank or on the first alone (the others get {}), from the slice of each; names, shapes, dtypes and devices of `like`."""
        keep = everywhere or self._world.rank == 0
        whole = {name: torch.empty_like(like[name]) for name in like} if keep else {}
        for dtype in sorted({tensor.dtype for tensor in like.values()}, key=str):
            chosen = [name for name in self._shapes if like[name].dtype == dtype]
            device = like[chosen[0]].device
            own = torch.zeros(self.width, dtype=dtype, device=device)
            for name, (first, last) in self._within().items():
                if name in chosen:
                    at = self._begins[name] + first - self.begin
                    own[at : at + last - first] = slices[name]
            for begin in range(0, self.width, BLOCK):
                for rank, part in enumerate(self._world.all_gather(own[begin : begin + BLOCK].contiguous())):
                    if keep:
                        self._place(whole, chosen, rank * self.width + begin, part)
        return whole

    def _place(self, whole: Tensors, names: list[str], begin: int, part: Tensor) -> None:
        """Copy entries begin … of all into the tensors where they belong."""
        for name in names:
            first, last = max(self._begins[name], begin), min(self._begins[name] + whole[name].numel(), begin + len(part))
            if first < last:
                whole[name].view(-1)[first - self._begins[name] : last - self._begins[name]] = part[first - begin : last - begin]

    def _within(self) -> dict[str, tuple[int, int]]:
        """Of each tensor in this rank's run: its first entry there and the one after its last."""
        found = {}
        for name, begin in self._begins.items():
            first, last = max(self.begin - begin, 0), min(self.end - begin, self._shapes[name].numel())
            if first < last:
                found[name] = (first, last)
        return found


def sharded_step(step: Callable[[ServerState, Tensors], ServerState], slices: Slices, *, sliced: bool) -> Callable[[ServerState, Tensors], ServerState]:
    """The server step of this rank's run, and all parameters again afterwards. Slots stay slices; see `whole` and `own`.

    sliced: Δ comes as this rank's slice, else whole.
    """

    def sharded(state: ServerState, delta: Tensors) -> ServerState:
        after = step(ServerState(slices.of(state.params), state.round, state.slots), delta if sliced else slices.of(delta))
        return ServerState(slices.gather(after.params, state.params), after.round, after.slots)

    return sharded


def whole(state: ServerState, slices: Slices, *, everywhere: bool = False) -> ServerState:
    """The state with whole slots, in main memory, on the first rank, or on all: for a checkpoint, which any number of ranks may take up. Every rank
    calls this."""
    like = {name: tensor.cpu() for name, tensor in state.params.items()}
    gathered = {slot: slices.gather(values, like, everywhere=everywhere) for slot, values in sorted(state.slots.items())}
    return ServerState(state.params, state.round, gathered)


def own(state: ServerState, slices: Slices) -> ServerState:
    """The state with this rank's slices of whole slots."""
    return ServerState(state.params, state.round, {slot: {n: t.clone() for n, t in slices.of(values).items()} for slot, values in state.slots.items()})
