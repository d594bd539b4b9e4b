"""K, the clients that a rank trains as one program: as asked for, or found by a short calibration; the same on all ranks, and for good.

K decides the last bits of a run, so it stands in every checkpoint, and in `clients_at_once.json` of the run's folder with the calibration's table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gidef.clients.participate import Participation
from gidef.clients.vectorised import cut_into_groups
from gidef.parallel import World
from gidef.parallel.plan import longest_first
from gidef.report.files import write_atomically
from gidef.types import Client, ServerState

FILE = "clients_at_once.json"
CANDIDATES = (2, 4, 8, 16, 32)
STEPS, REPETITIONS, ALONE = 3, 3, 4
"""Of a rehearsal: optimiser steps, how often it is timed, and on how many clients the loop is."""
BUDGET_S = 10.0
GAIN = 0.95
"""A program must take less than this share of the loop's time to be chosen: closer calls are noise."""


@dataclass(frozen=True, slots=True)
class Choice:
    """at_once: K, 1 for the loop.  milliseconds: per client and step, by K; empty if nothing was measured.  reason: why the loop, where it is not by choice."""

    at_once: int
    milliseconds: dict[int, float] = field(default_factory=dict)
    reason: str = ""


def choose(
    asked: int, participation: Participation, server: ServerState, cohort: Sequence[Client], *, world: World, slots: int, path: Path, name: str
) -> Choice:
    """Of one defence, on every rank the same; what was chosen for `name` before is chosen again.

    Args:    asked: K, or 0 for a calibration.  cohort: of the coming round.  slots: groups that train at the same time, over all ranks.
             path: the file, on rank 0.
    """
    if asked == 1:
        return Choice(1)
    told = None
    if world.rank == 0:
        before = json.loads(path.read_text()) if path.exists() else {}
        told = before.get(name) or _as_json(_choose(asked, participation, server, cohort, world.device, slots))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps({**before, name: told}, indent=1) + "\n").encode())
    told = world.broadcast_json(told)
    return Choice(told["at_once"], {int(size): value for size, value in told["milliseconds"].items()}, told["reason"])


def calibrate(
    measure: Callable[[Sequence[Sequence[Client]]], float], cohort: Sequence[Client], *, slots: int, budget_s: float = BUDGET_S
) -> tuple[int, dict[int, float]]:
    """(K, seconds per client and step by K): the K whose round would end first, 1 unless one is clearly faster than the loop.

    Sizes are tried from small to large while they help: up to the first that is slower than the one before, within the budget. Two at once
    may well be slower than the loop, where more are not; only if they take twice its time is that the end.

    Args:    measure: groups of clients, each to train as one program → seconds per client and step.  slots: groups that train at the same time.
    """
    began, sizes = time.perf_counter(), [client.num_examples for client in cohort]
    groups = {size: [[cohort[place] for place in group] for group in cut_into_groups(sizes, size)] for size in (1, *CANDIDATES) if size <= len(cohort)}
    found = {1: measure(groups[1][:ALONE])}
    for size in CANDIDATES:
        spent, last = time.perf_counter() - began, found[max(found)]
        if size not in groups or spent + size * last * STEPS * (REPETITIONS + 1) > budget_s:
            break
        found[size] = measure(groups[size][:1])
        if found[size] > (2 * last if size == CANDIDATES[0] else last):
            break

    def ends(at_once: int) -> float:
        groups = cut_into_groups(sizes, at_once)
        costs = [found[max(size for size in found if size <= len(group))] * sum(sizes[place] for place in group) for group in groups]
        return max(sum(costs[item] for item in items) for items in longest_first(costs, slots))

    best = min(found, key=ends)
    return (best if ends(best) < GAIN * ends(1) else 1), found


def _choose(asked: int, participation: Participation, server: ServerState, cohort: Sequence[Client], device: torch.device, slots: int) -> Choice:
    if not participation.can_vectorise:
        return Choice(1, reason="BatchNorm moves its running statistics" if participation.moves_statistics else f"{type(participation.players[0]).__name__} cannot be stacked")
    if any(getattr(client, "source", None) is not None for client in cohort):
        return Choice(1, reason="their images are streamed")
    trial = [cohort[place] for place in cut_into_groups([client.num_examples for client in cohort], asked or 2)[0]]
    if len(trial) == 1:
        return Choice(1)
    try:
        participation.rehearse(server, trial, 1)
        if asked:
            return Choice(asked)
        best, found = calibrate(lambda groups: _seconds(participation, server, groups, device), cohort, slots=slots)
    except Exception as error:  # of any kind: the loop trains whatever a program cannot
        return Choice(1, reason=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return Choice(best, {size: 1000 * value for size, value in found.items()})


def _seconds(participation: Participation, server: ServerState, groups: Sequence[Sequence[Client]], device: torch.device) -> float:
    """Per client and step: the shortest of a few rehearsals, the first one not counted. CPU time where the program has one thread."""
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    taken = []
    for _ in range(REPETITIONS + 1):
        began = clock()
        steps = sum(participation.rehearse(server, clients, STEPS) for clients in groups)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append((clock() - began) / steps)
    return min(taken[1:])


def _as_json(choice: Choice) -> dict[str, Any]:
    return {"at_once": choice.at_once, "milliseconds": choice.milliseconds, "reason": choice.reason}
