"""A chunk's attacks as stacked tensors: inputs checked, and gathered along one leading dim."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gidef.attack.labels import LabelsHidden, recover_labels, recover_soft_labels
from gidef.attack.matching import EXCHANGES, TRUST, Matching, Simulate, tables
from gidef.attack.optimisers import rows
from gidef.attack.program import pick
from gidef.attack.starts import STARTS
from gidef.errors import InputError
from gidef.rng import generator
from gidef.types import Observation, Tensors

Chunk = tuple[tuple[int, int], ...]
"""(index of the observation, start) of each attack; a start is a restart under one of the variants."""

Dims = dict[str, int | None]

OK, ZERO, NOT_FINITE, LOST, BROKEN, UNTOLD = range(6)
REASONS = {
    ZERO: "the observed update is zero: it holds nothing to match",
    NOT_FINITE: "the observed update is not finite",
    LOST: "the attacker's loss became infinite or NaN at iteration {}",
    BROKEN: "the attack's program raised an error",
    UNTOLD: "the labels cannot be recovered: the last layer's update is zero, not finite or degenerate",
}
ORDER_TRIES = 20
"""Draws for a first order that deals the labels to the batches as no earlier restart does."""
KEPT = "; the best point that it had found is kept"
"""Follows the reason where an attack has something all the same."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What stays constant while a chunk's K attacks run.

    given:  (params, known, targets (K, B, classes)).  target: observed updates over their norms.  scale: one over the norms, (K,).
    dims:   of (given, target), as vmap's in_dims: None where all attacks share a tensor.
    knobs, rates: schedules (iterations + 1, K), see `matching.tables`.
    order: where labels are `Unordered`, the first orders int64 (K, B).  exchanges: pairs of rows to be exchanged, int64 (trials, K, 2).
    """

    chunk: Chunk
    labels: Tensor
    given: tuple[Tensors, Tensors, Tensor]
    target: Tensors
    scale: Tensor
    dims: tuple[tuple[Dims, Dims, int], Dims]
    knobs: Tensors
    rates: Tensors
    seed: int
    order: Tensor | None = None
    exchanges: Tensor | None = None

    def given_at(self, iteration: int, matching: Matching) -> tuple[Tensors, Tensors, Tensor]:
        """`given`, with what is drawn afresh."""
        if not matching.drawn:
            return self.given
        params, known, targets = self.given
        cast = {"device": self.scale.device, "dtype": self.scale.dtype}
        return params, {**known, **draws(self.chunk, matching, iteration, self.seed, cast)}, targets

    def take(self, which: list[int]) -> Batch:
        """The same, of some of its attacks."""
        index = torch.tensor(which, device=self.scale.device)

        def some(tensors: Tensors, dims: Dims) -> Tensors:
            return {name: tensor if dims[name] is None else tensor[index] for name, tensor in tensors.items()}

        (params, known, targets), (over_params, over_known, _) = self.given, self.dims[0]
        return dataclasses.replace(
            self, chunk=tuple(self.chunk[row] for row in which), labels=self.labels[index],
            given=(some(params, over_params), some(known, over_known), targets[index]), target=some(self.target, self.dims[1]), scale=self.scale[index],
            knobs={name: tensor[:, index] for name, tensor in self.knobs.items()}, rates={name: tensor[:, index] for name, tensor in self.rates.items()},
            order=None if self.order is None else self.order[index], exchanges=None if self.exchanges is None else self.exchanges[:, index],
        )  # fmt: skip

    def lowered(self, dtype: torch.dtype) -> Batch:
        """The same, with parameters, known tensors and targets in a shorter type."""
        params, known, targets = self.given
        short = [{name: tensor.to(dtype) for name, tensor in tensors.items()} for tensors in (params, known, self.target)]
        return dataclasses.replace(self, given=(short[0], short[1], targets), target=short[2])

    def spread(self) -> Batch:
        """The same, with a target for each attack even where they share one: the shape that most chunks have."""
        count, dims = len(self.chunk), self.dims[1]
        target = {name: tensor if dims[name] == 0 else tensor.expand(count, *tensor.shape) for name, tensor in self.target.items()}
        return dataclasses.replace(self, target=target, dims=(self.dims[0], dict.fromkeys(dims, 0)))


def make_batch(chunk: Chunk, observations: Sequence[Observation], simulate: Simulate, matching: Matching, *, seed: int, cast: dict[str, Any]) -> tuple[Batch, Tensors, Tensor]:
    """(what stays constant, the first variables, failure codes (K,)) of a chunk. Raises InputError for observations that do not fit."""
    if len(sizes := {observation.num_examples for observation in observations}) > 1:
        raise InputError(f"the observations of one attack differ in num_examples, {sorted(sizes)}: attack them in separate calls.")
    chosen = [observations[index] for index, _ in chunk]
    labels, targets, untold = targets_of(chosen, matching, cast)
    params, over_params = gather([o.params for o in chosen], cast)
    known, over_known = gather([o.known for o in chosen], cast)
    variables = first_variables(chunk, labels.shape[1], matching, seed, cast)
    # one iteration of the simulator alone, on one attack: it says in words what would otherwise fail inside a program
    fresh = draws(chunk, matching, 0, seed, cast)
    known, over_known = {**known, **fresh}, over_known | dict.fromkeys(fresh, 0)
    given, dims = (params, known, targets), (over_params, over_known, 0)
    with torch.no_grad():
        check_fit(simulate(*_arguments(pick(variables, 0, 0), pick(given, dims, 0), matching)), observations)
    trust, over_trust = _trust_of(chosen, cast)
    known, over_known = {**known, **trust}, over_known | over_trust
    weighed = {id(one): {name: tensor * one.trust.get(name, 1.0) for name, tensor in one.update.items()} if one.trust else one.update for one in chosen}
    target, over_target, scale, failure = normalised([weighed[id(one)] for one in chosen], cast)
    failure = torch.where(untold & (failure == OK), UNTOLD, failure)
    knobs, rates = tables(matching, [start for _, start in chunk], list(variables), cast)
    order, exchanges = orders(chunk, targets, matching, seed) if matching.unordered is not None else (None, None)
    given, dims = (params, known, targets), (over_params, over_known, 0)
    return Batch(chunk, labels, given, target, scale, (dims, over_target), knobs, rates, seed, order, exchanges), variables, failure


def _trust_of(chosen: Sequence[Observation], cast: dict[str, Any]) -> tuple[Tensors, Dims]:
    """What the observations trust each tensor, under the names of TRUST, and its vmap dims; nothing where all trust all alike."""
    names = sorted({name for one in chosen for name in one.trust})
    for one in {id(one): one for one in chosen}.values():
        bad = [
            name for name, factor in one.trust.items()
            if name not in one.update or factor.shape not in ((), one.update[name].shape) or not ((factor > 0) & (factor < math.inf)).all()
        ]  # fmt: skip
        if bad:
            raise InputError(f"trust of {bad}: expected finite numbers above 0, one as a tensor without dims or one for every entry, for names of tensors in the update.")
    whole = torch.ones((), device=chosen[0].update[names[0]].device if names else None)
    each = [{name: one.trust.get(name, whole) for name in names} for one in chosen]
    apart = {name for name in names if len({one[name].shape for one in each}) > 1}
    each = [{f"{TRUST}{name}": factor.expand(seen.update[name].shape) if name in apart else factor for name, factor in one.items()} for seen, one in zip(chosen, each, strict=True)]
    return gather(each, cast)


def _arguments(variables: Tensors, given: tuple[Tensors, Tensors, Tensor], matching: Matching) -> tuple[Tensors, Tensors, Tensor, Tensor, Tensor | None]:
    params, known, targets = given
    images = matching.render(variables["code"]) if matching.render is not None else variables["images"]
    return params, {**known, **{name: variables[name] for name in matching.searched}}, images, targets, variables.get("noise")


def targets_of(observations: Sequence[Observation], matching: Matching, cast: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Labels int64 (K, B), granted, or recovered, once per observation; the same as probabilities (K, B, classes), which soft ones are;
    and bool (K,): they were to be recovered and could not. They are zeros then."""
    found: dict[int, tuple[Tensor, bool]] = {}
    for observation in observations:
        if id(observation) not in found:
            found[id(observation)] = _labels_of(observation, matching)
    each, untold = zip(*(found[id(observation)] for observation in observations), strict=True)
    targets = torch.stack([one if one.is_floating_point() else F.one_hot(one, matching.num_classes).double() for one in each])
    labels = torch.stack([one.argmax(1) if one.is_floating_point() else one for one in each])
    return labels.to(cast["device"]), targets.to(**cast), torch.tensor(untold, device=cast["device"])


def _labels_of(observation: Observation, matching: Matching) -> tuple[Tensor, bool]:
    """int64 (B,), or probabilities (B, classes) where those are recovered."""
    labels, size, classes = observation.labels, observation.num_examples, matching.num_classes
    if labels is None and matching.search_labels:
        return torch.zeros(size, dtype=torch.int64), False  # unknowns of the attack; the likeliest ones are returned
    if labels is None:
        params, update = {**observation.known, **observation.params}, {**observation.update, **observation.unmatched}
        try:
            recover = recover_soft_labels if matching.soft_labels else recover_labels
            return recover(dataclasses.replace(observation, params=params, update=update), classes, local=matching.local).cpu(), False
        except (LabelsHidden, torch.linalg.LinAlgError):
            return torch.zeros(size, dtype=torch.int64), True
    if labels.shape != (size,) or labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(f"granted labels {tuple(labels.shape)} do not fit {size} images of {classes} classes: give one class index per image.")
    return labels.long().cpu(), False


def orders(chunk: Chunk, targets: Tensor, matching: Matching, seed: int) -> tuple[Tensor, Tensor]:
    """Of `Unordered` labels (K, B, classes): the first orders (K, B), and the pairs of rows to be exchanged (trials, K, 2), every pair of different labels
    in turn; (0, 0), which changes nothing, where there is none. Both depend on (seed, observation, restart) alone. Raises InputError for batches that do
    not divide the images."""
    unordered, trials = matching.unordered, matching.iterations // EXCHANGES
    first, pairs = [], []
    if targets.shape[1] % unordered.parts:
        raise InputError(f"{targets.shape[1]} images do not divide into {unordered.parts} local batches of equal size: change the batch size or the steps.")
    for (observation, start), one in zip(chunk, targets.cpu(), strict=True):
        kinds = one.unique(dim=0, return_inverse=True)[1]
        restart = start % matching.restarts
        first.append(unordered.first(observation, start) if unordered.first is not None else _first_order(kinds, unordered.parts, observation, restart, seed))
        apart = (kinds[:, None] != kinds).triu().nonzero()
        draw = generator(seed, "exchanges", observation, restart)
        rounds = [apart[torch.randperm(len(apart), generator=draw)] for _ in range(-(-trials // len(apart)))] if len(apart) else []
        pairs.append(torch.cat(rounds)[:trials] if rounds else torch.zeros(trials, 2, dtype=torch.int64))
    return torch.stack(first).to(targets.device), torch.stack(pairs, 1).to(targets.device)


def _first_order(kinds: Tensor, parts: int, observation: int, restart: int, seed: int) -> Tensor:
    """The order as it is for restart 0; for others one that deals the labels to the batches otherwise than earlier restarts, where there is one."""
    order, draw = torch.arange(len(kinds)), generator(seed, "order", observation)

    def dealt(order: Tensor) -> tuple[int, ...]:
        return tuple(kinds[order].view(parts, -1).sort(1).values.flatten().tolist())

    seen = {dealt(order)}
    for _ in range(restart):
        for _ in range(ORDER_TRIES):
            order = torch.randperm(len(kinds), generator=draw)
            if dealt(order) not in seen:
                break
        seen.add(dealt(order))
    return order


def gather(each: Sequence[Tensors], cast: dict[str, Any]) -> tuple[Tensors, Dims]:
    """One map for all attacks, and its vmap dims: a tensor that all attacks share stays one, the others are stacked."""
    if len({tuple(sorted((name, tensor.shape) for name, tensor in tensors.items())) for tensors in each}) > 1:
        raise InputError("the observations of one attack differ in names or shapes of params or known tensors: attack them in separate calls.")
    tensors, dims = {}, {}
    for name, first in each[0].items():
        shared = all(one[name] is first for one in each)
        tensors[name] = (first if shared else torch.stack([one[name] for one in each])).detach().to(**cast)
        dims[name] = None if shared else 0
    return tensors, dims


def normalised(updates: Sequence[Tensors], cast: dict[str, Any]) -> tuple[Tensors, Dims, Tensor, Tensor]:
    """Observed updates over their norms and their vmap dims, one over the norms (K,), and failure codes (K,); a failed attack's target is zero.

    A tensor that all attacks share, since they are starts of one observation, stays one.
    """
    found, dims = gather(updates, {"device": cast["device"], "dtype": torch.float64})
    one = {name: tensor if dims[name] == 0 else tensor[None] for name, tensor in found.items()}
    square = sum(tensor.flatten(1).square().sum(1) for tensor in one.values())
    norm = (square if len(square) == len(updates) else square.expand(len(updates))).sqrt()
    failure = torch.where(norm == 0, ZERO, torch.where(norm.isfinite(), OK, NOT_FINITE))
    scale = torch.where(failure == OK, 1 / norm, 1.0)
    target = {}
    for name, tensor in one.items():
        few = slice(0, len(tensor))
        scaled = torch.where(rows(failure[few] == OK, tensor), tensor * rows(scale[few], tensor), 0.0).to(cast["dtype"])
        target[name] = scaled if dims[name] == 0 else scaled[0]
    return target, dims, scale.to(cast["dtype"]), failure


def first_variables(chunk: Chunk, size: int, matching: Matching, seed: int, cast: dict[str, Any]) -> Tensors:
    """Where the attacks begin: images (K, B, C, H, W) or codes, and noise (K, *noise_shape), logits and further unknowns if they are searched.

    A draw depends on (seed, observation, restart) alone, so that the variants of a restart begin at the same point.
    """
    each: dict[str, list[Tensor]] = {}
    shape = (size, *matching.image_shape)
    for observation, start in chunk:
        restart = start % matching.restarts
        draw, noise, told = generator(seed, "attack", observation, restart), None, {}
        if matching.render is not None:
            first = {"code": torch.randn((size, *matching.code_shape), generator=draw)}
        elif callable(matching.start):
            images, noise, *more = matching.start(observation, start if getattr(matching.start, "of_variants", False) else restart)
            first, told = {"images": _checked("images", images, shape)}, more[0] if more else {}
        else:
            first = {"images": STARTS[matching.start](shape, draw)}
        if matching.noise_shape is not None:
            if noise is None:
                noise = matching.noise_start * torch.randn(matching.noise_shape, generator=draw)
            first["noise"] = _checked("noise", noise, matching.noise_shape)
        if matching.search_labels:
            first["logits"] = torch.randn((size, matching.num_classes), generator=draw)
        for name, one in matching.searched.items():
            first[name] = one.start(one.shape, draw) if callable(one.start) else torch.full(one.shape, float(one.start))
        if foreign := sorted(told.keys() - (first.keys() - {"images", "noise"})):
            raise InputError(f"start gave {foreign}, which this attack does not search: beside images and noise give logits of searched labels, or what is in `searched`.")
        first |= {name: _checked(name, tensor, tuple(first[name].shape)) for name, tensor in told.items()}
        for name, tensor in first.items():
            each.setdefault(name, []).append(tensor)
    return {name: torch.stack(tensors).to(**cast) for name, tensors in each.items()}


def draws(chunk: Chunk, matching: Matching, iteration: int, seed: int, cast: dict[str, Any]) -> Tensors:
    """What is drawn afresh in an iteration, (K, …) by name; it depends on (seed, observation, restart, iteration) alone."""

    def one(draw: Any, name: str, observation: int, start: int) -> Tensor:
        return draw(generator(seed, "draws", name, observation, start % matching.restarts, iteration))

    return {name: _sent(torch.stack([one(draw, name, *attack) for attack in chunk]), cast) for name, draw in matching.drawn.items()}


def _sent(tensor: Tensor, cast: dict[str, Any]) -> Tensor:
    """To the attack's device and type; to a GPU from pinned memory, so that the host does not wait for what is queued there."""
    if torch.device(cast["device"]).type != "cuda" or tensor.is_cuda:
        return tensor.to(**cast)
    return tensor.to(cast["dtype"]).pin_memory().to(cast["device"], non_blocking=True)


def _checked(what: str, given: Tensor, expected: tuple[int, ...]) -> Tensor:
    if tuple(given.shape) != tuple(expected):
        raise InputError(f"start gave {what} of shape {tuple(given.shape)}, expected {tuple(expected)}.")
    return given


def check_fit(simulated: Tensors, observations: Sequence[Observation]) -> None:
    """Raise InputError unless every observed update has the simulated one's names and shapes."""
    for observation in observations:
        for name in sorted(simulated.keys() | observation.update.keys()):
            ours, theirs = (tuple(side[name].shape) if name in side else "missing" for side in (simulated, observation.update))
            if ours != theirs:
                raise InputError(
                    f"the simulated update does not fit the observed one: {name!r} is {ours} in the simulation and {theirs} in the observation. "
                    "Simulate the model that the client trains, and match the tensors that it releases."
                )
