"""Gradient matching of many attacks as one program.

An attack is one observation from one start. Attacks are cut into chunks; a chunk is one vectorised program, and an
independent task: it depends on nothing but its observations, settings and seed, so its result is the same in any chunk,
order, thread or rank (to rounding). `select` then picks each observation's best start by the attacker's own loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value

from gidef.attack.batch import LOST, OK, REASONS, Chunk, check_fit, gather, labels_of, normalised, over_attacks, pick, rows, starts
from gidef.attack.kinks import CurvedKinks
from gidef.attack.matching import Matching, Simulate, distance, kink_width, step_factor, tv_weight
from gidef.errors import InputError
from gidef.similarity import total_variation
from gidef.types import Observation, Reconstruction, Tensors

# K attacks of a chunk, B images, C channels, H, W
CURVE_POINTS = 200


@dataclass(frozen=True, slots=True)
class Progress:
    """One report of a running chunk. loss: mean objective of its attacks that have not failed (NaN if all have)."""

    iteration: int
    iterations: int
    attacks: int
    failed: int
    loss: float
    chunk: int = 0
    chunks: int = 1


def plan(num_observations: int, restarts: int, at_once: int) -> list[Chunk]:
    """Cut all attacks into chunks of `at_once`; the restarts of an observation stay together as far as that goes."""
    if at_once < 1:
        raise InputError(f"at_once={at_once}: expected at least one attack per chunk.")
    attacks = [(observation, restart) for observation in range(num_observations) for restart in range(restarts)]
    return [tuple(attacks[first : first + at_once]) for first in range(0, len(attacks), at_once)]


def run_chunk(
    chunk: Chunk,
    observations: Sequence[Observation],
    simulate: Simulate,
    matching: Matching,
    *,
    seed: int,
    mode: Literal["vmap", "loop"] = "vmap",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    every: int = 50,
) -> Generator[Progress, None, Tensors]:
    """Attack the observations of one chunk.

    Args:    chunk: which attacks.  observations: all of them, alike in sizes, names and shapes.  simulate: owned by this thread.
             seed: a start is drawn from (seed, observation, restart) alone.  mode: "vmap", or a plain "loop" over the attacks
             with the same numbers to rounding.  every: iterations between reports, the only points at which a device waits.
    Yields:  Progress, at multiples of `every` and at the end.
    Returns: tensors on the CPU, one row per attack and ready to be saved:
             attacks int64 (K, 2): observation and restart;  images float32 (K, B, C, H, W): of the lowest loss seen;
             noise float32 (K, *noise_shape), where noise was searched;  labels int64 (K, B);  loss float32 (K,): lowest objective;
             losses float32 (K, points): the objective at evenly spaced iterations, the last included;
             failure int64 (K,): 0 or the kind of failure;  failed_at int64 (K,): iteration.
    Raises:  InputError, before the first iteration, if observations do not fit the simulator, the settings or one another.
    """
    if len(sizes := {observation.num_examples for observation in observations}) > 1:
        raise InputError(f"the observations of one attack differ in num_examples, {sorted(sizes)}: attack them in separate calls.")
    cast = {"device": torch.device(device), "dtype": dtype}
    chosen = [observations[index] for index, _ in chunk]
    labels = labels_of(chosen, matching).to(cast["device"])
    targets = F.one_hot(labels, matching.num_classes).to(dtype)
    given, dims = zip(gather([o.params for o in chosen], cast), gather([o.known for o in chosen], cast), (targets, 0), strict=True)
    variables = starts(chunk, labels.shape[1], matching, seed, cast)
    with torch.no_grad():
        check_fit(_simulated(simulate, *pick((variables, *given), (0, *dims), 0)), observations)
    target, scale, failure = normalised([o.update for o in chosen], cast)
    failed_at = torch.zeros_like(failure)

    def objective(searched: tuple, given: tuple, target: Tensors, scale: Tensor, tv: float, width: float | None) -> tuple[Tensor, Tensor]:
        """What is descended, and the final objective at the same point."""
        with contextlib.nullcontext() if width is None else CurvedKinks(width):
            update = _simulated(simulate, searched, *given)
        fit = distance(matching.distance, update, target, scale)
        for noise in searched[1:]:
            fit = fit + matching.noise_weight * noise.square().mean()
        roughness = total_variation(searched[0]).mean()
        return fit + tv * roughness, fit + matching.tv * roughness

    def evaluated(*inputs: Any) -> tuple[Tensor, ...]:
        gradients, (_, final) = grad_and_value(objective, has_aux=True)(*inputs)
        return final, *gradients

    evaluate = over_attacks(evaluated, (0, dims, 0, 0, None, None), len(chunk), mode)
    best, best_loss = variables, torch.full_like(scale, torch.inf)
    moments = [(torch.zeros_like(v), torch.zeros_like(v)) for v in variables]
    curve: list[Tensor] = []
    for iteration in range(matching.iterations + 1):
        with torch.no_grad():  # for parameters that a simulator closes over; never around the yield, it would leak to the consumer
            loss, *gradients = evaluate(variables, given, target, scale, tv_weight(matching, iteration), kink_width(matching, iteration))
        better = loss < best_loss
        best = tuple(torch.where(rows(better, new), new, old) for new, old in zip(variables, best, strict=True))
        best_loss = torch.where(better, loss, best_loss)
        newly = (failure == OK) & ~loss.isfinite()
        failed_at = torch.where(newly, iteration, failed_at)
        failure = torch.where(newly, LOST, failure)
        curve.append(loss)
        if iteration % every == 0 or iteration == matching.iterations:
            alive = failure == OK
            yield Progress(iteration, matching.iterations, len(chunk), int((~alive).sum()), float(loss[alive].mean()))
        if iteration < matching.iterations:
            variables, moments = _step(variables, gradients, moments, matching, iteration)

    alive = failure == OK
    points = torch.linspace(0, matching.iterations, min(matching.iterations + 1, CURVE_POINTS)).round().long()
    result = {
        "attacks": torch.tensor(chunk),
        "images": torch.where(rows(alive, best[0]), best[0], 0.5).float(),
        "labels": labels,
        "loss": torch.where(alive, best_loss, torch.inf).float(),
        "losses": torch.stack([curve[point] for point in points.tolist()], 1).float(),
        "failure": failure,
        "failed_at": failed_at,
    }
    if len(best) > 1:
        result["noise"] = torch.where(rows(alive, best[1]), best[1], 0.0).float()
    return {name: tensor.cpu() for name, tensor in result.items()}


def select(results: Sequence[Tensors], num_observations: int) -> list[Reconstruction]:
    """Each observation's restart of the lowest final objective; a failed restart is never chosen while another one lives.

    Args:    results: of `run_chunk`, in any order, for every restart of every observation.
    Returns: one Reconstruction per observation, in order; restart_losses of failed restarts are infinite.
    Raises:  ValueError if an attack is missing or there twice.
    """
    found = {(o, r): (result, row) for result in results for row, (o, r) in enumerate(result["attacks"].tolist())}
    restarts = 1 + max((restart for _, restart in found), default=0)
    wanted = {(observation, restart) for observation in range(num_observations) for restart in range(restarts)}
    if found.keys() != wanted or len(found) != sum(len(result["attacks"]) for result in results):
        raise ValueError(f"the results do not cover {num_observations} observations × {restarts} restarts once each: {sorted(found)[:10]}")
    chosen = []
    for observation in range(num_observations):
        tried = [{name: tensor[row] for name, tensor in result.items()} for result, row in (found[observation, r] for r in range(restarts))]
        losses = torch.stack([one["loss"] for one in tried])
        restart = int(losses.argmin())
        one = tried[restart]
        failure = int(one["failure"])
        chosen.append(
            Reconstruction(
                images=one["images"],
                labels=one["labels"],
                loss=float(one["loss"]),
                losses=one["losses"],
                restart=restart,
                restart_losses=losses,
                restart_images=torch.stack([one["images"] for one in tried]),
                status="ok" if failure == OK else "failed",
                error="" if failure == OK else REASONS[failure].format(int(one["failed_at"])),
            )
        )
    return chosen


def invert(
    observations: Sequence[Observation], make_simulate: Callable[[], Simulate], matching: Matching, *, seed: int, at_once: int = 8, **speed: Any
) -> Generator[Progress, None, list[Reconstruction]]:
    """Attack every observation, chunk after chunk, in this thread.

    Args:    make_simulate: gives a simulator of this thread's own.  at_once: K, attacks in one vectorised program; it moves no
             result past rounding.  speed: mode, dtype, device and every, of `run_chunk`.
    Yields:  Progress.  Returns: one Reconstruction per observation.  Raises: as `run_chunk`.
    """
    chunks, simulate, results = plan(len(observations), matching.restarts, at_once), make_simulate(), []
    for number, chunk in enumerate(chunks):
        running = run_chunk(chunk, observations, simulate, matching, seed=seed, **speed)
        while True:
            try:
                progress = next(running)
            except StopIteration as end:
                results.append(end.value)
                break
            yield dataclasses.replace(progress, chunk=number, chunks=len(chunks))
    return select(results, len(observations))


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


def _simulated(simulate: Simulate, searched: tuple[Tensor, ...], params: Tensors, known: Tensors, targets: Tensor) -> Tensors:
    """The update at a point (images,) or (images, noise)."""
    return simulate(params, known, searched[0], targets, searched[1] if len(searched) > 1 else None)


def _step(
    variables: tuple[Tensor, ...], gradients: Sequence[Tensor], moments: list[tuple[Tensor, Tensor]], matching: Matching, iteration: int
) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, Tensor]]]:
    """One step of Adam (β 0.9, 0.999) on images, kept in [0, 1], and noise. Elementwise, so attacks cannot touch one another."""
    stepped, carried = [], []
    for place, (variable, gradient, (m, v)) in enumerate(zip(variables, gradients, moments, strict=True)):
        if place == 0 and matching.signed:
            gradient = gradient.sign()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
        lr = step_factor(matching, iteration) * (matching.noise_lr if place else matching.lr)
        # eps far below usual: gradients of one pixel of many are tiny, and Adam's steps are to be free of their scale
        move = lr * (m / (1 - 0.9 ** (iteration + 1))) / ((v / (1 - 0.999 ** (iteration + 1))).sqrt() + 1e-12)
        stepped.append((variable - move).clamp(0, 1) if place == 0 else variable - move)
        carried.append((m, v))
    return tuple(stepped), carried
