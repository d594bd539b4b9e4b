"""Aggregation of single updates over ranks: all-to-all, so that each rank combines some of the coordinates of all clients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gidef.errors import Diverged
from gidef.parallel import traffic
from gidef.parallel.cohort import COUNTERS, Groups, take_part
from gidef.parallel.work import Schedule
from gidef.parallel.world import World
from gidef.types import Client, Tensors, Update, check_same_names
from gidef.updates import CohortMean, FixedPointSum

BLOCK = traffic.BLOCK
"""Coordinates that travel, and are combined, at a time. Block b is rank b mod size's."""
LIMBS, LIMB, LOWEST = 7, 32, -120
"""Of an exact sum of distances: seven times 32 bits from 2^-120 on."""


def robust_over_world(
    world: World, rule: Any, *, workers: int = 1, threads: int = 1, costs: Callable[[Client], float] | None = None, schedule: Schedule = "longest_first",
    learn: Callable[[Sequence[Client], Sequence[float]], None] | None = None, groups: Groups | None = None,
) -> Callable[..., CohortMean]:  # fmt: skip
    """In the place of `mean_over_world`, by a rule that needs every client's own update (see rounds.robust).

    A rank keeps, in main memory, the updates of the clients that it trained: about cohort · parameters / ranks. Blocks of coordinates then travel so
    that one rank has a block of all clients, (cohort, BLOCK), and nothing larger. The bits depend on neither ranks, workers nor schedule: blocks
    are the same everywhere, and the blocks' parts of Krum's distances are added up as integers.

    Args:    rule: with name, combine and choose.  The others as in `mean_over_world`.
    Returns: over_cohort → CohortMean: delta by the rule; num_examples and metrics as in the mean.
    Raises:  as `mean_over_world`, but a client may send NaN, infinity or any size; Diverged if the rule's result is not finite.
    """
    cost_of = costs or (lambda client: client.num_examples)

    def over_cohort(
        shared_update: Callable[..., Update], cohort: Sequence[Client], *, template: Tensors, metric_names: Sequence[str] = ()
    ) -> CohortMean:
        rest = FixedPointSum({}, metric_names=metric_names, max_terms=len(cohort), counters=COUNTERS)
        kept: dict[int, Tensor] = {}
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in template.values()) else torch.float32
        lock = threading.Lock()

        def keep(position: int, update: Update) -> None:
            check_same_names(update.delta, template, f"client {cohort[position].id}: the update (left) against the template (right)")
            flat = torch.cat([update.delta[name].detach().to("cpu", dtype).flatten() for name in sorted(template)])
            rest.add({}, update.num_examples, update.metrics, client=cohort[position].id)
            with lock:
                kept[position] = flat

        costs = [cost_of(client) for client in cohort]
        part = take_part(world, shared_update, cohort, keep, costs, schedule=schedule, workers=workers, threads=threads, groups=groups)
        rest.counters.copy_(part.counters())
        world.all_reduce_sum_(rest.buffer)
        seconds, owners = part.settle(rest.counters.tolist())
        if learn is not None:
            learn(cohort, seconds)
        flat = _aggregate(world, rule, kept, owners, sum(tensor.numel() for tensor in template.values()), dtype)
        delta, begin = {}, 0
        for name in sorted(template):
            tensor = template[name]
            delta[name] = flat[begin : begin + tensor.numel()].to(tensor.device, tensor.dtype).view(tensor.shape)
            begin += tensor.numel()
        _, weight, metrics = rest.mean()
        return CohortMean(delta, weight, metrics, rest.count, tuple(seconds))

    return over_cohort


def _aggregate(world: World, rule: Any, kept: dict[int, Tensor], owners: list[int], length: int, dtype: torch.dtype) -> Tensor:
    """The rule's result, (length,), on the CPU of every rank."""
    rows, blocks = list(range(len(owners))), -(-length // BLOCK)

    def span(block: int) -> slice:
        return slice(min(block * BLOCK, length), min((block + 1) * BLOCK, length))

    def exchange() -> Iterator[tuple[int, Tensor]]:
        """(first block of the turn, (rows, width) of this rank's block in it) of each turn; every rank takes every turn."""
        of_rank = [[row for row in rows if owners[row] == rank] for rank in range(world.size)]
        arrived = [row for part in of_rank for row in part]
        order = torch.tensor([arrived.index(row) for row in rows], device=world.device)
        for first in range(0, blocks, world.size):
            parts = [
                torch.cat([kept[row][span(first + rank)] for row in of_rank[world.rank]] or [torch.empty(0, dtype=dtype)]).to(world.device)
                for rank in range(world.size)
            ]
            mine = span(first + world.rank)
            width = mine.stop - mine.start
            received = world.all_to_all(parts, [len(part) * width for part in of_rank])
            yield first, torch.cat(received).view(len(rows), width)[order]

    if rule.choose is not None:
        exact = torch.zeros(len(rows), len(rows), LIMBS + 1, dtype=torch.int64)
        for _, values in exchange():
            if values.numel():
                exact += _limbs(_distances(values)).cpu()
        rows = rule.choose(_value(world.all_reduce_sum_(exact)))
    result = torch.empty(length, dtype=dtype)
    for first, values in exchange():
        own = torch.zeros(BLOCK, dtype=dtype, device=world.device)
        if values.numel():
            own[: values.shape[1]] = rule.combine(values).to(dtype)
        for rank, part in enumerate(world.all_gather(own)):
            place = span(first + rank)
            result[place] = part[: place.stop - place.start].cpu()
    if not torch.isfinite(result).all():
        raise Diverged(f"{rule.name} of the cohort's updates is not finite: more clients sent NaN or infinity than it can pass over")
    return result


def _distances(values: Tensor) -> Tensor:
    """Squared distances (n, n) float64 between rows of (n, b), in an order of additions that depends on BLOCK alone."""
    number, found = len(values), torch.zeros(len(values), len(values), dtype=torch.float64, device=values.device)
    wide = torch.zeros(number, BLOCK, dtype=torch.float64, device=values.device)
    wide[:, : values.shape[1]] = values
    for row in range(number - 1):
        terms = (wide[row + 1 :] - wide[row]).square_()
        while terms.shape[1] > 1:  # halves are added elementwise: no device chooses the order
            terms = terms[:, : terms.shape[1] // 2] + terms[:, terms.shape[1] // 2 :]
        found[row, row + 1 :] = found[row + 1 :, row] = terms[:, 0]
    return found


def _limbs(values: Tensor) -> Tensor:
    """int64 (…, LIMBS + 1) of non-negative float64: digits to base 2^32, whose sums are exact; the last counts what is infinite, NaN or beyond 2^100."""
    fits = values < 2.0 ** (LIMBS * LIMB + LOWEST - 4)  # NaN fails
    rest, digits = torch.where(fits, values, 0.0) * 2.0**-LOWEST, []
    for place in reversed(range(LIMBS)):
        digit = (rest / 2.0 ** (place * LIMB)).floor()
        rest = rest - digit * 2.0 ** (place * LIMB)
        digits.append(digit.to(torch.int64))
    return torch.stack([*reversed(digits), (~fits).to(torch.int64)], -1)


def _value(limbs: Tensor) -> Tensor:
    """float64 of summed digits; infinity where any term was."""
    total = torch.zeros(limbs.shape[:-1], dtype=torch.float64)
    for place in reversed(range(LIMBS)):
        total = total + limbs[..., place].double() * 2.0 ** (place * LIMB + LOWEST)
    return torch.where(limbs[..., -1] > 0, torch.inf, total)
