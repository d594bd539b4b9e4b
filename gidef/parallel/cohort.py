"""The cohort's mean over ranks and worker threads: the twin of `updates.mean_over`, with the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gidef.errors import Diverged, InputError
from gidef.parallel.sharded_server import Slices
from gidef.parallel.threads import run_on_threads
from gidef.parallel.work import Schedule, turns_of
from gidef.parallel.world import World
from gidef.rng import stream_seed
from gidef.types import Client, Tensors, Update
from gidef.updates import CohortMean, FixedPointSum, Float32Sum

OVERLAP_ABOVE = 0.05
"""Share of a round's seconds above which averaging is overlapped with the sum over ranks, which is then worth a word, too."""
BUCKET = 1 << 22
"""Entries of the sum that then travel at a time: a quarter of it costs more in calls than averaging beside them saves."""

COUNTERS = 3
"""Numbers of `Part.counters` in a sum."""

Groups = Callable[[Sequence[Client]], list[list[int]]]


def mean_over_world(
    world: World, *, workers: int = 1, threads: int = 1, costs: Callable[[Client], float] | None = None, schedule: Schedule = "longest_first",
    learn: Callable[[Sequence[Client], Sequence[float]], None] | None = None, groups: Groups | None = None,
    reduction: Literal["fixed_point", "float32"] = "fixed_point", slices: Slices | None = None, overlap_above: float = OVERLAP_ABOVE,
) -> Callable[..., CohortMean]:  # fmt: skip
    """`mean_over(shared_update, cohort, *, template, metric_names)` over all ranks, for `run_round`'s `over_cohort`.

    Clients go to ranks by `schedule`, and within a rank to `workers` threads, each computing with `threads` threads;
    `shared_update(client, worker=i)` is told which worker it is on, since two threads must not share a model. The mean
    has the same bits for any number of ranks and workers and any schedule, and as the serial one if that computes with `threads` threads too.
    One all-reduce a round, cut into buckets where it takes long, and a small gather of the seconds that each client took; a rank without a client adds zeros. Every
    rank must pass the same cohort and template.

    Args:    sum_of (of the returned callable): makes the sum, in place of what `reduction` says.
             costs: client → expected cost, equal on all ranks; default `client.num_examples`.  schedule: as in `run_tasks`.
             learn: called with the cohort and the seconds that each of its clients took, the same on every rank.
             groups: cohort → positions of the clients that one program trains. The cohort is cut before it is dealt out; `shared_update` then
             takes a group's clients in the place of one, and returns their updates in order.
             reduction: "float32" halves the bytes, and lets the last bits depend on ranks, workers and schedule.
             slices: the mean's delta is this rank's slice alone; a reduce-scatter and a small all-reduce take the all-reduce's place.
             overlap_above: once the sum took more than this share of a round on any rank, one of more than `BUCKET` entries travels, from the round
             after the next on, in buckets of so many, each averaged while the next ones are on their way: the same bits but for "float32", and a small all-reduce before them.
    Deviates: nothing of the all-reduce is hidden behind training. A part of the sum that went out while clients train would save no time, as what is
             left has as many bytes; and it would have to be entered by every rank within the collective's time limit, whereas ranks come to
             any common point minutes apart. What the sum takes is measured once all have come (`CohortMean.sum_seconds`), and a training that spends more
             than that share on it says what halves it. Sums that clients mask, and slices of the server, are not cut into buckets.
             Measured on two ranks of one machine, shares of a round: 0.04 to 0.2 % with 1.6 M parameters and 50 clients of five steps, 0.1 to 1.5 % with 4,882.
    Raises:  (by the returned callable, on every rank) InputError if the first failing client, in the cohort's order, raised one, Diverged if that,
             else RuntimeError with that client, its rank and its error; RuntimeError if the ranks held different cohorts or plans;
             ValueError for an empty cohort.
    """
    cost_of = costs or (lambda client: client.num_examples)
    slow = overlapped = False  # the last sum took long here; one did on some rank

    def over_cohort(
        shared_update: Callable[..., Update], cohort: Sequence[Client], *, template: Tensors, metric_names: Sequence[str] = (),
        sum_of: Callable[..., FixedPointSum] | None = None,
    ) -> CohortMean:
        nonlocal slow, overlapped
        started = time.perf_counter()
        make = sum_of or (FixedPointSum if reduction == "fixed_point" else Float32Sum)
        total = make(template, metric_names=metric_names, max_terms=len(cohort), counters=COUNTERS)
        in_buckets = overlapped and sum_of is None and slices is None and len(total.body) > BUCKET  # the same on all ranks
        at_once = reduction == "fixed_point" and slices is None and not in_buckets

        def add(position: int, update: Update) -> None:
            total.add(update.delta, update.num_examples, update.metrics, client=cohort[position].id)

        costs = [cost_of(client) for client in cohort]
        part = take_part(world, shared_update, cohort, add, costs, schedule=schedule, workers=workers, threads=threads, groups=groups)
        total.counters.copy_(part.counters(slow=slow))
        world.meet("the sum of a round")  # so that what follows is the sum's time, and no waiting for a rank that still trains
        began = time.perf_counter()
        world.all_reduce_sum_(total.buffer if at_once else total.tail, met=True)
        counters = total.counters.tolist()  # waits for the device
        summing = time.perf_counter() - began
        seconds, _ = part.settle(counters)
        own = mean = None
        if not at_once:
            began = time.perf_counter()
            if in_buckets:
                mean = total.mean(arriving=world.all_reduce_buckets_(total.body, entries=BUCKET))
            elif slices is not None:
                own = slices.cut(slices.reduce(total.body))
            else:
                world.all_reduce_sum_(total.body)
            total.body[:1].tolist()  # waits for the device
            summing += time.perf_counter() - began
        mean = mean or total.mean(own)
        slow, overlapped = world.size > 1 and summing > overlap_above * (time.perf_counter() - started), overlapped or counters[2] > 0
        if learn is not None:
            learn(cohort, seconds)
        return CohortMean(*mean, count=total.count, seconds=tuple(seconds), sum_seconds=summing if world.size > 1 else 0.0)

    return over_cohort


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank did in a round: the clients that it trained (by position in the cohort), their errors and seconds."""

    world: World
    cohort: Sequence[Client]
    taken: tuple[int, ...]
    errors: dict[int, Exception]
    seconds: dict[int, float]

    def counters(self, *, slow: bool = False) -> Tensor:
        """int64 (COUNTERS,), which the ranks add up: failures, who was trained, and how many found the sum before slow. Of one length whatever the cohort,
        so that unlike cohorts are noticed."""
        return torch.tensor([len(self.errors), sum(_mark(self.cohort[position]) for position in self.taken), int(slow)])

    def settle(self, counters: list[int]) -> tuple[list[float], list[int]]:
        """(seconds, rank) of every client, in the cohort's order, once the ranks' counters are added up. Raises as `mean_over_world` says."""
        failures, roll, _ = counters
        if failures:
            _raise_first(self.world, self.cohort, self.errors)
        # before the cohorts are compared: a rank that finds them alike must not wait here for one that does not
        told = self.world.all_gather_json([[self.cohort[position].id, self.seconds[position]] for position in self.taken])
        if roll != sum(map(_mark, self.cohort)):
            raise RuntimeError("the ranks held different cohorts or plans this round, so some clients were lost or counted twice")
        found = {client: (seconds, rank) for rank, part in enumerate(told) for client, seconds in part}
        seconds, ranks = zip(*(found[client.id] for client in self.cohort), strict=True)
        return list(seconds), list(ranks)


def take_part(
    world: World, shared_update: Callable[..., Any], cohort: Sequence[Client], receive: Callable[[int, Update], None], costs: Sequence[float],
    *, schedule: Schedule, workers: int, threads: int, groups: Groups | None = None,
) -> Part:  # fmt: skip
    """Train this rank's share of the cohort: `receive(position, update)` of each client, from the worker's thread, until the first error.

    A group's clients share its seconds evenly. groups: see `mean_over_world`.
    """
    cut = [[position] for position in range(len(cohort))] if groups is None else groups(cohort)
    turns, take = turns_of(world, [sum(costs[position] for position in group) for group in cut], schedule)
    taken: dict[int, list[int]] = {}  # turn of this rank → positions
    seconds: dict[int, float] = {}

    def work(turn: int, worker: int) -> None:
        place = take(turn)
        if place is None:
            return
        group = taken[turn] = cut[place]
        began = time.perf_counter()
        clients = [cohort[position] for position in group]
        updates = [shared_update(clients[0], worker=worker)] if groups is None else shared_update(clients, worker=worker)
        for position, update in zip(group, updates, strict=True):
            receive(position, update)
        seconds.update(dict.fromkeys(group, (time.perf_counter() - began) / len(group)))

    raised = run_on_threads(work, range(turns), workers=workers, threads=threads, device=world.device, stop_at_error=True)
    for turn, error in raised.items():
        if turn not in taken:
            raise error  # the queue's own: the ranks have lost one another
    positions = tuple(position for group in taken.values() for position in group)
    return Part(world, cohort, positions, {taken[turn][0]: error for turn, error in raised.items()}, seconds)


def _mark(client: Client) -> int:
    """40-bit fingerprint; the ranks' sum shows a client that nobody or two ranks took, and 2^23 fit into int64."""
    return stream_seed(0, "client", client.id) >> 23


KINDS = {"diverged": Diverged, "bad input": InputError}
"""Errors that keep their kind on their way to the other ranks; the first that fits counts."""


def _kind(error: Exception) -> str:
    return next((name for name, kind in KINDS.items() if isinstance(error, kind)), "defect")


def _raise_first(world: World, cohort: Sequence[Client], errors: dict[int, Exception]) -> None:
    """Tell every rank of the failed clients and raise the first one's error."""
    mine = [[position, _kind(error), str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"] for position, error in errors.items()]
    told = world.all_gather_json(mine)
    position, kind, text, rank = min([*failure, rank] for rank, failures in enumerate(told) for failure in failures)
    cause = errors.get(position) if rank == world.rank else None
    if kind in KINDS:
        raise KINDS[kind](text) from cause
    raise RuntimeError(f"client {cohort[position].id} failed on rank {rank}: {text}") from cause
