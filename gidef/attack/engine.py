"""Gradient matching of many attacks as one program.

An attack is one observation from one start: a restart under one of the hyper-parameter variants. Attacks are cut into chunks; a chunk
is one vectorised program, and an independent task: it depends on nothing but its observations, settings and seed, so its
result is the same in any chunk, order, thread or rank (to rounding). `select` then picks each observation's best start by the attacker's own loss.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gidef.attack.batch import BROKEN, KEPT, LOST, OK, REASONS, Batch, Chunk, make_batch
from gidef.attack.matching import EXCHANGES, Matching, Simulate
from gidef.attack.optimisers import rows
from gidef.attack.program import Programs
from gidef.errors import InputError
from gidef.similarity import total_variation
from gidef.types import Observation, Reconstruction, Tensors

# K attacks of a chunk, B images, C channels, H, W
CURVE_POINTS = 200
IMPROVED = 1e-3
"""Patience counts an iteration as an improvement if the best loss fell by this share."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One report of a running chunk. failed: attacks that had nothing to match, or whose loss was infinite or NaN once.  loss: mean objective of the others (NaN without any).

    done: iterations of single attacks that are over or, with starts that were given up, will not come; of attacks × iterations.
    """

    iteration: int
    iterations: int
    attacks: int
    failed: int
    loss: float
    chunk: int = 0
    chunks: int = 1
    done: int = 0


def plan(num_observations: int, restarts: int, at_once: int, *, together: bool = False, done: Sequence[tuple[int, int]] = ()) -> list[Chunk]:
    """Cut all attacks into chunks of `at_once`; the starts of an observation stay together as far as that goes.

    together: keep all starts of an observation in one chunk, which then may exceed `at_once`.  done: attacks to leave out.
    """
    if at_once < 1:
        raise InputError(f"at_once={at_once}: expected at least one attack per chunk.")
    left = set(done)
    if together:
        missing = [o for o in range(num_observations) if any((o, restart) not in left for restart in range(restarts))]
        group = max(1, at_once // restarts)
        return [tuple((o, r) for o in missing[i : i + group] for r in range(restarts)) for i in range(0, len(missing), group)]
    attacks = [(o, r) for o in range(num_observations) for r in range(restarts) if (o, r) not in left]
    return [tuple(attacks[first : first + at_once]) for first in range(0, len(attacks), at_once)]


def run_chunk(
    chunk: Chunk,
    observations: Sequence[Observation],
    simulate: Simulate,
    matching: Matching,
    *,
    seed: int,
    mode: Literal["loop", "vmap", "traced", "compiled"] = "vmap",
    precision: Literal["float32", "tf32", "bfloat16", "bfloat16_all"] = "float32",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    every: int = 50,
    every_s: float = math.inf,
    at_once: int | None = None,
    programs: Programs | None = None,
) -> Generator[Progress, None, Tensors]:
    """Attack the observations of one chunk.

    Args:    chunk: which attacks.  observations: all of them, alike in sizes, names and shapes.  simulate: owned by this thread.
             seed: a start is drawn from (seed, observation, restart) alone.  mode: how the inner step runs, see program.py; with
             the same numbers to rounding.  precision: of the client's pass, see program.py; the matching loss is float32 always.
             every: iterations between reports, the only points at which a device waits.  every_s: seconds after which one comes earlier.
             at_once: attacks in one program; a larger chunk runs in turns, a smaller one is padded where programs are recorded, after a
             rung of halving to what is left of a whole chunk, with a program for each rung. None: all.  programs: recorded programs to share between chunks.
    Yields:  Progress, at multiples of `every`, whenever `every_s` are over, and at the end. A consumer may stop the attack there, by going away.
    Returns: tensors on the CPU, one row per attack and ready to be saved:
             attacks int64 (K, 2): observation and start;  images float32 (K, B, C, H, W): of the lowest loss seen, mid-grey if none was finite;
             noise float32 (K, *noise_shape), where noise was searched;  labels int64 (K, B), or the likeliest searched ones;
             loss float32 (K,): lowest objective, else infinite;  fit float32 (K,): its distance alone;  first_fit: that of the start;
             losses float32 (K, points): the objective at evenly spaced iterations, the last included, NaN after an attack stopped;
             iterations int64 (K,): evaluated;  snapshots float16 (K, S, B, C, H, W), if there are any;
             failure int64 (K,): 0 or the kind of failure;  failed_at int64 (K,): iteration. One whose loss became infinite or NaN on the way keeps its best point;
             given_up bool (K,): by halving;  order int64 (K, B), where labels are `Unordered`: whose row stood in each place of the simulator's.
    Raises:  InputError, before the first iteration, if observations do not fit the simulator, the settings or one another.
    """
    cast = {"device": torch.device(device), "dtype": dtype}
    batch, variables, failure = make_batch(chunk, observations, simulate, matching, seed=seed, cast=cast)
    if precision == "bfloat16_all":
        batch = batch.lowered(torch.bfloat16)
    run = ChunkRun(matching, simulate, programs or Programs(), mode, precision, every, every_s, at_once or len(chunk))
    state = first_state(variables, failure, matching, batch.order)
    yield from run.go(batch, state)
    return run.result(batch)


def first_state(variables: Tensors, failure: Tensor, matching: Matching, order: Tensor | None = None) -> dict[str, Tensors]:
    """All that changes while attacks run: maps of tensors with a leading dim of attacks, so that attacks can be taken out of it."""
    inf = torch.full_like(failure, torch.inf, dtype=next(iter(variables.values())).dtype)
    points = min(matching.iterations + 1, CURVE_POINTS)
    own = {
        "best_loss": inf, "best_fit": inf, "first_fit": inf, "mark": inf, "since": torch.zeros_like(failure), "failure": failure,
        "failed_at": torch.zeros_like(failure), "ran": torch.zeros_like(failure), "losses": inf[:, None].expand(-1, points) * torch.nan,
    }  # fmt: skip
    own |= {} if order is None else {"order": order, "best_order": order}
    state = {"variables": variables, "best": variables, "own": own, "descent": matching.descent().begin(variables), "snapshots": {}}
    if matching.snapshots:
        name = "code" if matching.render is not None else "images"
        state["snapshots"] = {"all": variables[name][:, None].expand(-1, matching.snapshots, *variables[name].shape[1:]).half()}
    return state


def _take(state: dict[str, Tensors], index: Tensor) -> dict[str, Tensors]:
    return {part: {name: tensor[index] for name, tensor in tensors.items()} for part, tensors in state.items()}


def _join(parts: Sequence[dict[str, Tensors]]) -> dict[str, Tensors]:
    return {part: {name: torch.cat([one[part][name] for one in parts]) for name in parts[0][part]} for part in parts[0]}


class ChunkRun:
    """A chunk on its way: which of its attacks are still running, and the results of those that stopped."""

    def __init__(
        self, matching: Matching, simulate: Simulate, programs: Programs, mode: str, precision: str, every: int, every_s: float, at_once: int
    ) -> None:
        self.matching, self.simulate, self.programs, self.mode, self.precision = matching, simulate, programs, mode, precision
        self.every, self.every_s, self.at_once = max(every, 1), every_s, at_once
        self.stopped: list[tuple[Chunk, dict[str, Tensors]]] = []
        self.given_up = 0

    def go(self, batch: Batch, state: dict[str, Tensors]) -> Generator[Progress, None, None]:
        """From rung to rung; the last one is the end."""
        total, attacks = self.matching.iterations, len(batch.chunk)
        for reached, rung, kept in stages(self.matching):
            width = len(batch.chunk) if self.matching.coupling is not None else width_of(self.matching, self.at_once, kept, least=len(batch.chunk))
            parts, turns = [], _turns(len(batch.chunk), width)
            for number, turn in enumerate(turns):
                some = turn if len(turns) > 1 else None
                part = state if some is None else _take(state, torch.tensor(some, device=batch.scale.device))
                running = self._advance(batch if some is None else batch.take(some), part, reached, rung, width)
                while True:
                    try:
                        at, failed, loss = next(running)
                    except StopIteration as end:
                        parts.append(end.value)
                        break
                    before = sum(map(len, turns[:number])) * (rung - reached) + self.given_up
                    yield Progress(at, total, attacks, failed, loss, done=before + len(batch.chunk) * reached + len(turn) * (at - reached))
            state = parts[0] if len(parts) == 1 else _join(parts)
            if rung < total:
                batch, state = self._halve(batch, state, rung)
        self.stopped.append((batch.chunk, state))

    def _advance(
        self, batch: Batch, state: dict[str, Tensors], first: int, last: int, width: int
    ) -> Generator[tuple[int, int, float], None, dict[str, Tensors]]:
        """Iterations first … last − 1, and the evaluation of the last point if it is the end; in a program of `width` attacks where it is recorded."""
        matching, count = self.matching, len(batch.chunk)
        padded = count < width and self.mode in ("traced", "compiled")
        if padded:  # one shape for all chunks: the last attack runs several times
            filled = [*range(count), *[count - 1] * (width - count)]
            batch, state = batch.take(filled).spread(), _take(state, torch.tensor(filled, device=batch.scale.device))
        variables, best, own, descent, kept = (state[part] for part in ("variables", "best", "own", "descent", "snapshots"))
        own = {**own, "losses": own["losses"].clone()}
        kept = {name: tensor.clone() for name, tensor in kept.items()}
        optimiser, end = matching.descent(), matching.iterations
        knobs_at = lambda t: {name: table[t] for name, table in batch.knobs.items()}  # noqa: E731
        dims = (dict.fromkeys(variables, 0), batch.dims[0], batch.dims[1], 0, dict.fromkeys(batch.knobs, 0))
        inputs = (variables, batch.given, batch.target, batch.scale, knobs_at(first))
        evaluate = self.programs.get(self.simulate, matching, dims, inputs, mode=self.mode, precision=self.precision)
        groups = _groups(batch.chunk)
        curve = {int(point): place for place, point in enumerate(_points(end))}
        marks: dict[int, list[int]] = {}
        told_at = time.monotonic()
        for place in range(matching.snapshots):  # several of an attack of few iterations
            marks.setdefault(end * (place + 1) // matching.snapshots, []).append(place)
        # patience reads the best loss and stops attacks; all of them at once is looked at when the loop reports
        for iteration in range(first, last + (last == end)):
            knobs = knobs_at(iteration)

            given = batch.given_at(iteration, matching)

            def measured(
                variables: Tensors, order: Tensor | None, knobs: Tensors = knobs, given: Any = given, iteration: int = iteration
            ) -> tuple[Tensor, Tensor, Tensor, Tensors]:
                if order is None:
                    loss, final, fit, gradients = evaluate(variables, given, batch.target, batch.scale, knobs)
                else:
                    there = (*given[:2], torch.take_along_dim(given[2], order[..., None], 1))
                    loss, final, fit, gradients = evaluate(matching.unordered.placed(variables, order), there, batch.target, batch.scale, knobs)
                    gradients = matching.unordered.returned(gradients, order)
                if matching.coupling is not None:
                    more, slope = matching.coupling(variables["images"], groups, iteration / max(end, 1), batch.labels)
                    loss, final = loss + more, final + more
                    gradients = {**gradients, "images": gradients["images"] + slope}
                return loss, final, fit, gradients

            with torch.no_grad():  # for parameters that a simulator closes over; never around the yield, it would leak to the consumer
                order = own.get("order")
                loss, final, fit, gradients = measured(variables, order)
                running = own["since"] >= 0
                if order is not None and iteration % EXCHANGES == EXCHANGES - 1 and iteration < end:
                    tried = _exchanged(order, batch.exchanges[iteration // EXCHANGES])
                    *others, slopes = measured(variables, tried)
                    lower = (others[1] < final) & running
                    order = torch.where(rows(lower, order), tried, order)
                    loss, final, fit = (torch.where(lower, new, old) for new, old in zip(others, (loss, final, fit), strict=True))
                    gradients = {name: torch.where(rows(lower, new), new, gradients[name]) for name, new in slopes.items()}
                    own["order"] = order
                best, own = _noted(best, own, variables, final, fit, iteration, running, matching.patience)
                if iteration in curve:
                    own["losses"][:, curve[iteration]] = torch.where(running, final, torch.nan)
                for place in marks.get(iteration, ()):  # by a number: a list would be copied to the device, for which the host waits
                    kept["all"][:, place] = best["code" if matching.render is not None else "images"].half()
            if iteration % self.every == 0 or iteration == end or time.monotonic() - told_at > self.every_s:
                alive = own["failure"][:count] == OK
                yield iteration, int((~alive).sum()), float(final[:count][alive].mean())
                told_at = time.monotonic()
                if matching.patience is not None and not bool((own["since"] >= 0).any()):
                    later = [place for at, places in marks.items() if at > iteration for place in places]
                    if later:
                        kept["all"][:, later] = best["code" if matching.render is not None else "images"].half()[:, None]
                    break
            if iteration < end:
                with torch.no_grad():
                    rates = {name: table[iteration] for name, table in batch.rates.items()}
                    index = torch.full((), iteration, device=loss.device, dtype=torch.int64)
                    moved, carried = optimiser.step(
                        variables, gradients, loss, descent, rates=rates, iteration=index, evaluate=lambda v, order=order: _loss_and_gradients(measured(v, order))
                    )
                    moved = _boxed(moved, matching)
                    if matching.patience is not None:  # an attack that stopped stays where it is
                        moved = {name: torch.where(rows(running, new), new, variables[name]) for name, new in moved.items()}
                    variables, descent = moved, carried
        state = {"variables": variables, "best": best, "own": own, "descent": descent, "snapshots": kept}
        return _take(state, torch.arange(count, device=batch.scale.device)) if padded else state

    def _halve(self, batch: Batch, state: dict[str, Tensors], rung: int) -> tuple[Batch, dict[str, Tensors]]:
        """Keep each observation's best starts by the attacker's own loss; the others stop here."""
        losses, failed = state["own"]["best_loss"].tolist(), (state["own"]["failure"] != OK).tolist()
        kept: list[int] = []
        for group in _groups(batch.chunk):
            ranked = sorted(group, key=lambda row: (failed[row], losses[row], batch.chunk[row]))
            kept += ranked[: max(1, -(-len(group) // self.matching.halving))]
        kept.sort()
        gone = [row for row in range(len(batch.chunk)) if row not in set(kept)]
        if gone:
            index = torch.tensor(gone, device=batch.scale.device)
            self.stopped.append((tuple(batch.chunk[row] for row in gone), _take(state, index)))
            self.given_up += len(gone) * self.matching.iterations
            batch, state = batch.take(kept), _take(state, torch.tensor(kept, device=batch.scale.device))
        return batch, state

    def result(self, batch: Batch) -> Tensors:
        """Of all attacks, in the order of the whole batch, on the CPU."""
        attacks = [attack for part, _ in self.stopped for attack in part]
        state = _join([state for _, state in self.stopped]) if len(self.stopped) > 1 else self.stopped[0][1]
        order = torch.tensor([attacks.index(attack) for attack in batch.chunk])
        matching, best, own = self.matching, state["best"], state["own"]
        # lost on the way: what it had found until then is what an attacker has
        alive = (own["failure"] == OK) | ((own["failure"] == LOST) & own["best_loss"].isfinite())
        images = best["images"] if matching.render is None else _rendered(matching, best["code"])
        result = {
            "images": torch.where(rows(alive, images), images, 0.5).float(),
            "loss": torch.where(alive, own["best_loss"], torch.inf).float(),
            "fit": torch.where(alive, own["best_fit"], torch.inf).float(),
            "first_fit": own["first_fit"].float(),
            "losses": own["losses"].float(),
            "iterations": own["ran"],
            "failure": own["failure"],
            "failed_at": own["failed_at"],
            "given_up": torch.arange(len(attacks)) < len(attacks) - len(self.stopped[-1][0]),
        }
        for name, tensor in best.items():
            if name != "images":
                result[name] = torch.where(rows(alive, tensor), tensor, 0.0).float()
        if matching.snapshots:
            kept = state["snapshots"]["all"]
            result["snapshots"] = kept if matching.render is None else _rendered(matching, kept.flatten(0, 1).float()).unflatten(0, kept.shape[:2]).half()
        if "best_order" in own:
            result["order"] = own["best_order"]
        if "logits" in best:
            batch = dataclasses.replace(batch, labels=best["logits"].argmax(-1)[order.to(best["logits"].device)])
        own = {"attacks": torch.tensor(batch.chunk), "labels": batch.labels.cpu()}
        return own | {name: tensor.cpu()[order].contiguous() for name, tensor in result.items()}


def broken(chunk: Chunk, observations: Sequence[Observation], matching: Matching) -> Tensors:
    """What `run_chunk` would return of attacks whose program raised an error: mid-grey images, and the failure's kind."""
    count, size = len(chunk), observations[0].num_examples
    granted = [observations[o].labels for o, _ in chunk]
    labels = torch.stack([one if one is not None else torch.zeros(size, dtype=torch.int64) for one in granted]).cpu()
    result = {
        "attacks": torch.tensor(chunk), "images": torch.full((count, size, *matching.image_shape), 0.5), "labels": labels,
        "losses": torch.full((count, min(matching.iterations + 1, CURVE_POINTS)), torch.nan), "failure": torch.full((count,), BROKEN),
    }  # fmt: skip
    result |= {name: torch.full((count,), torch.inf) for name in ("loss", "fit", "first_fit")}
    result |= {name: torch.zeros(count, dtype=torch.int64) for name in ("failed_at", "iterations")} | {"given_up": torch.zeros(count, dtype=torch.bool)}
    if matching.snapshots:
        result["snapshots"] = torch.full((count, matching.snapshots, size, *matching.image_shape), 0.5, dtype=torch.float16)
    return result


def joined(results: Sequence[Tensors], iterations: Sequence[int]) -> Tensors:
    """Stages of the same attacks, each of which began where the one before ended, as one result in the layout of `run_chunk`'s.

    What was found and its fit are the last stage's that saw a finite loss, `first_fit` the first one's, `iterations` those of all, snapshots the stages' one
    after another, and the curve has at most CURVE_POINTS points, evenly over all iterations; stages may have objectives of their own. Of failures the first
    one is told, and its iteration counts from the start.

    Args: results: of the stages, with equal `attacks`.  iterations: of each stage.
    """
    starts = [sum(iterations[:place]) for place in range(len(iterations))]
    at = torch.tensor([start + point for start, count in zip(starts, iterations, strict=True) for point in _points(count)])
    nearest = (torch.tensor(_points(sum(iterations)))[:, None] - at).abs().argmin(1)
    found = dict(results[-1])
    for one in reversed(results[:-1]):
        keep = found["loss"].isfinite() | ~one["loss"].isfinite()
        found |= {name: torch.where(rows(keep, found[name]), found[name], one[name]) for name in ("images", "labels", "noise", "order", "loss", "fit") if name in found and name in one}
    failure, failed_at = torch.zeros_like(found["failure"]), torch.zeros_like(found["failed_at"])
    for one, start in zip(reversed(results), reversed(starts), strict=True):
        later = torch.where(one["failure"] == LOST, one["failed_at"] + start, one["failed_at"])
        failure, failed_at = (torch.where(one["failure"] == OK, old, new) for old, new in ((failure, one["failure"]), (failed_at, later)))
    found |= {
        "first_fit": results[0]["first_fit"], "iterations": torch.stack([one["iterations"] for one in results]).sum(0),
        "losses": torch.cat([one["losses"] for one in results], dim=1)[:, nearest], "failure": failure, "failed_at": failed_at,
    }  # fmt: skip
    if all("snapshots" in one for one in results):
        found["snapshots"] = torch.cat([one["snapshots"] for one in results], dim=1)
    return found


def _rendered(matching: Matching, codes: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([matching.render(code) for code in codes])


def _rungs(matching: Matching) -> list[int]:
    """Iterations at which starts are given up, and the end."""
    total, rate = matching.iterations, matching.halving
    if rate == 1 or matching.starts == 1:
        return [total]
    survivors, count = 0, matching.starts
    while count > 1:
        survivors, count = survivors + 1, -(-count // rate)
    marks = [total // rate**power for power in range(survivors, 0, -1)]
    return [*sorted({mark for mark in marks if 0 < mark < total}), total]


def stages(matching: Matching) -> list[tuple[int, int, int]]:
    """From rung to rung: the first iteration, the one at which starts are given up, and how many starts of an observation run until then."""
    found, first, kept = [], 0, matching.starts
    for last in _rungs(matching):
        found.append((first, last, kept))
        first, kept = last, -(-kept // matching.halving)
    return found


def width_of(matching: Matching, at_once: int, kept: int, *, least: int = 0) -> int:
    """Attacks in a program while `kept` starts of each observation run: the same in all chunks of a plan, so that they share it, and at most `at_once`.

    least: attacks of a chunk that is larger than a planned one; it runs in equal turns.
    """
    most = max(at_once // matching.starts, 1) * kept if matching.together else at_once
    most = max(most, least)
    return -(-most // -(-most // at_once))


def _turns(count: int, at_once: int) -> list[list[int]]:
    return [list(range(first, min(first + at_once, count))) for first in range(0, count, at_once)]


def _groups(chunk: Chunk) -> list[list[int]]:
    """Rows of each observation's starts."""
    found: dict[int, list[int]] = {}
    for row, (observation, _) in enumerate(chunk):
        found.setdefault(observation, []).append(row)
    return list(found.values())


def _points(iterations: int) -> list[int]:
    """Iterations of the points of a curve."""
    return torch.linspace(0, iterations, min(iterations + 1, CURVE_POINTS)).round().long().tolist()


def _noted(
    best: Tensors, own: Tensors, variables: Tensors, final: Tensor, fit: Tensor, iteration: int, running: Tensor, patience: int | None
) -> tuple[Tensors, Tensors]:
    """The best point so far, and what is kept on each attack, after an evaluation."""
    better = (final < own["best_loss"]) & final.isfinite() & running
    best = {name: torch.where(rows(better, new), new, best[name]) for name, new in variables.items()}
    newly = (own["failure"] == OK) & ~final.isfinite() & running
    own = dict(own)
    own["best_loss"], own["best_fit"] = torch.where(better, final, own["best_loss"]), torch.where(better, fit, own["best_fit"])
    if "order" in own:
        own["best_order"] = torch.where(rows(better, own["order"]), own["order"], own["best_order"])
    own["failed_at"] = torch.where(newly, iteration, own["failed_at"])
    own["failure"] = torch.where(newly, LOST, own["failure"])
    own["ran"] = own["ran"] + running
    if iteration == 0:
        own["first_fit"] = fit
    if patience is not None:
        ahead = own["best_loss"] < own["mark"] * (1 - IMPROVED)
        own["mark"] = torch.where(ahead, own["best_loss"], own["mark"])
        since = torch.where(ahead, 0, own["since"] + 1)
        # −1 marks an attack that stopped: for want of progress, or because it failed
        own["since"] = torch.where(running & (since <= patience) & (own["failure"] == OK), since, -1)
    return best, own


def _exchanged(order: Tensor, pair: Tensor) -> Tensor:
    """Orders (K, B) in which the rows of each attack's pair (K, 2) have changed places."""
    one, other = pair[:, :1], pair[:, 1:]
    return torch.where(order == one, other, torch.where(order == other, one, order))


def _loss_and_gradients(measured: tuple[Tensor, Tensor, Tensor, Tensors]) -> tuple[Tensor, Tensors]:
    return measured[0], measured[3]


def _boxed(variables: Tensors, matching: Matching) -> Tensors:
    """Images in [0, 1], further unknowns between their bounds."""
    kept = dict(variables)
    if "images" in kept:
        kept["images"] = kept["images"].clamp(0, 1)
    for name, one in matching.searched.items():
        kept[name] = kept[name].clamp(one.low, one.high)
    return kept


def select(
    results: Sequence[Tensors], num_observations: int, *, choose_by: str = "objective", errors: Mapping[tuple[int, int], str] | None = None
) -> list[Reconstruction]:
    """Each observation's start that the attacker likes best; one that has nothing is never chosen while another one has.

    Args:    results: of `run_chunk`, in any order, for every start of every observation.  choose_by: the lowest "objective", "fit", or
             "tv" of the result, see `Matching`.  errors: of attacks whose program raised one.
    Returns: one Reconstruction per observation, in order, with the images of all starts; restart_losses of failed starts are infinite.
    Raises:  ValueError if an attack is missing or there twice.
    """
    found = {(o, r): (result, row) for result in results for row, (o, r) in enumerate(result["attacks"].tolist())}
    starts = 1 + max((start for _, start in found), default=0)
    wanted = {(observation, start) for observation in range(num_observations) for start in range(starts)}
    if found.keys() != wanted or len(found) != sum(len(result["attacks"]) for result in results):
        raise ValueError(f"the results do not cover {num_observations} observations × {starts} starts once each: {sorted(found)[:10]}")
    chosen = []
    for observation in range(num_observations):
        tried = [{name: tensor[row] for name, tensor in result.items()} for result, row in (found[observation, r] for r in range(starts))]
        losses = torch.stack([one["loss"] for one in tried])
        start = _chosen(tried, choose_by)
        one = tried[start]
        status, error = outcome(one, (errors or {}).get((observation, start), ""))
        chosen.append(
            Reconstruction(
                images=one["images"], labels=one["labels"], loss=float(one["loss"]), losses=one["losses"], restart=start, restart_losses=losses,
                restart_images=torch.stack([one["images"] for one in tried]), status=status, error=error,
                fit=float(one["fit"]), first_fit=float(one["first_fit"]), iterations=int(one["iterations"]), snapshots=one.get("snapshots"),
            )  # fmt: skip
        )
    return chosen


def outcome(one: Tensors, raised: str = "") -> tuple[Literal["ok", "failed"], str]:
    """Status and error of one attack, a row of a result: "failed" without a point of finite loss; "ok" with an error for one that was lost after such a point.

    raised: the error of its program, if it raised one.
    """
    failure = int(one["failure"])
    if failure == OK:
        return "ok", ""
    reason = raised or REASONS[failure].format(int(one["failed_at"]))
    return ("ok", reason + KEPT) if bool(one["loss"].isfinite()) else ("failed", reason)


def _chosen(tried: Sequence[Tensors], choose_by: str) -> int:
    """The number of the start that the attacker likes best. Smoothness says nothing of how far an attack has come: it chooses among those that ran longest."""
    if choose_by != "tv":
        return int(torch.stack([one["loss" if choose_by == "objective" else "fit"] for one in tried]).argmin())
    lengths = torch.tensor([_length(one) for one in tried])
    roughness = torch.stack([total_variation(one["images"]).mean() for one in tried])
    return int(torch.where(lengths == lengths.max(), roughness, torch.inf).argmin())


def _length(one: Tensors) -> float:
    """How long an attack ran: infinite to its end, which patience may set; until halving gave it up, or its loss was lost; −1 if it has nothing."""
    if not bool(one["loss"].isfinite()):
        return -1.0
    if int(one["failure"]) != OK:
        return float(one["failed_at"])
    return float(one["iterations"]) if bool(one.get("given_up", False)) else math.inf  # results that were saved before halving told have no "given_up"


def invert(
    observations: Sequence[Observation], make_simulate: Callable[[], Simulate], matching: Matching, *, seed: int, at_once: int = 8, **speed: Any
) -> Generator[Progress, None, list[Reconstruction]]:
    """Attack every observation, chunk after chunk, in this thread.

    Args:    make_simulate: gives a simulator of this thread's own.  at_once: K, attacks in one vectorised program; it moves no
             result past rounding.  speed: mode, precision, dtype, device, every and programs, of `run_chunk`.
    Yields:  Progress.  Returns: one Reconstruction per observation.  Raises: as `run_chunk`.
    """
    chunks = plan(len(observations), matching.starts, at_once, together=matching.together)
    simulate, results, programs = make_simulate(), [], speed.pop("programs", None) or Programs()
    for number, chunk in enumerate(chunks):
        running = run_chunk(chunk, observations, simulate, matching, seed=seed, at_once=at_once, programs=programs, **speed)
        while True:
            try:
                progress = next(running)
            except StopIteration as end:
                results.append(end.value)
                break
            yield dataclasses.replace(progress, chunk=number, chunks=len(chunks))
    return select(results, len(observations), choose_by=matching.choose_by)


def drain(running: Generator[Any, None, Any]) -> Any:
    """Run a generator to its end, and return what it returns."""
    while True:
        try:
            next(running)
        except StopIteration as end:
            return end.value


def run(observations: Sequence[Observation], make_simulate: Callable[[], Simulate], matching: Matching, **options: Any) -> list[Reconstruction]:
    """`invert`, without looking at its progress."""
    return drain(invert(observations, make_simulate, matching, **options))
