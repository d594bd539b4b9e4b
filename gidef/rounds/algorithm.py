"""One round, and the generator over rounds. No device, rank, file or logger in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from gidef.types import Client, ServerState, Update
from gidef.updates import CohortMean


class Round(NamedTuple):
    """number: of the finished round, from 0.  server: its state afterwards.  cohort: client numbers.  mean: what was aggregated."""

    number: int
    server: ServerState
    cohort: list[int]
    mean: CohortMean


def run_round(
    server: ServerState,
    cohort: Sequence[Client],
    *,
    train: Callable[..., Update],
    step: Callable[..., ServerState],
    over_cohort: Callable[..., CohortMean],
) -> tuple[ServerState, CohortMean]:
    """One round: broadcast, train locally, share, aggregate, step.

    Args:
        train:       train(server, client, worker=0) → Update: local training and the share policy; what the client
                     keeps goes to its own store inside.
        step:        server step, see `rounds.server`.
        over_cohort: over_cohort(shared_update, cohort) → Σ n_k Δ_k / Σ n_k, summed exactly; serial or over ranks.
    """

    def shared_update(client: Client, worker: int = 0) -> Update:
        return train(server, client, worker=worker)

    mean = over_cohort(shared_update, cohort)
    return step(server, mean.delta), mean


def federate(
    server: ServerState,
    clients: Sequence[Client],
    *,
    rounds: int,
    draw: Callable[[int], list[int]],
    run: Callable[..., tuple[ServerState, CohortMean]],
) -> Iterator[Round]:
    """Rounds server.round, …, rounds − 1, one at a time; whoever consumes them prints, saves and stops.

    Args:    draw: round number → client numbers.  run: `run_round` with its rules bound.
    """
    for number in range(server.round, rounds):
        numbers = draw(number)
        server, mean = run(server, [clients[k] for k in numbers])
        yield Round(number, server, numbers, mean)
