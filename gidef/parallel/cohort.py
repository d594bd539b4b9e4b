"""The cohort's mean over ranks and worker threads: the twin of `updates.mean_over`, with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gidef.errors import InputError
from gidef.parallel.plan import longest_first
from gidef.parallel.threads import run_on_threads
from gidef.parallel.world import World
from gidef.rng import stream_seed
from gidef.types import Client, Tensors, Update
from gidef.updates import CohortMean, FixedPointSum


def mean_over_world(world: World, *, workers: int = 1, threads: int = 1, costs: Callable[[Client], float] | None = None) -> Callable[..., CohortMean]:
    """`mean_over(shared_update, cohort, *, template, metric_names)` over all ranks, for `run_round`'s `over_cohort`.

    Clients go to ranks longest first, and within a rank to `workers` threads, each computing with `threads` threads;
    `shared_update(client, worker=i)` is told which worker it is on, since two threads must not share a model. The mean
    has the same bits for any number of ranks and workers, and as the serial one if that computes with `threads` threads too.
    One all-reduce a round; a rank without a client adds zeros. Every rank must pass the same cohort and template.

    Args:    costs: client → expected cost, equal on all ranks; default `client.num_examples`.
    Raises:  (by the returned callable, on every rank) InputError if the first failing client, in the cohort's order, raised one,
             else RuntimeError with that client, its rank and its error; RuntimeError if the ranks held different cohorts or plans;
             ValueError for an empty cohort.
    """
    cost_of = costs or (lambda client: client.num_examples)

    def over_cohort(
        shared_update: Callable[..., Update], cohort: Sequence[Client], *, template: Tensors, metric_names: Sequence[str] = ()
    ) -> CohortMean:
        total = FixedPointSum(template, metric_names=metric_names, max_terms=len(cohort), counters=2)
        mine = longest_first([cost_of(client) for client in cohort], world.size)[world.rank]

        def work(position: int, worker: int) -> None:
            client = cohort[position]
            update = shared_update(client, worker=worker)
            total.add(update.delta, update.num_examples, update.metrics, client=client.id)

        raised = run_on_threads(work, mine, workers=workers, threads=threads, device=world.device, stop_at_error=True)
        errors = {mine[index]: error for index, error in raised.items()}
        roll = sum(_mark(cohort[position]) for position in mine)
        total.counters.copy_(torch.tensor([len(errors), roll]))
        world.all_reduce_sum_(total.buffer)
        failures, roll = total.counters.tolist()
        if failures:
            _raise_first(world, cohort, errors)
        if roll != sum(map(_mark, cohort)):
            raise RuntimeError("the ranks held different cohorts or plans this round, so some clients were lost or counted twice")
        return CohortMean(*total.mean(), count=total.count)

    return over_cohort


def _mark(client: Client) -> int:
    """40-bit fingerprint; the ranks' sum shows a client that nobody or two ranks took, and 2^23 fit into int64."""
    return stream_seed(0, "client", client.id) >> 23


def _raise_first(world: World, cohort: Sequence[Client], errors: dict[int, Exception]) -> None:
    """Tell every rank of the failed clients and raise the first one's error."""
    mine = [[position, isinstance(error, InputError), str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"] for position, error in errors.items()]
    told = world.all_gather_json(mine)
    position, bad_input, text, rank = min([*failure, rank] for rank, failures in enumerate(told) for failure in failures)
    cause = errors.get(position) if rank == world.rank else None
    if bad_input:
        raise InputError(text) from cause
    raise RuntimeError(f"client {cohort[position].id} failed on rank {rank}: {text}") from cause
