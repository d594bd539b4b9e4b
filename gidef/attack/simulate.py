"""From a gradient simulator to others: of local training, of several rounds, of the mean over noise, of a surrogate model."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.func import vmap

from gidef.attack.labels import LocalSteps
from gidef.attack.matching import Simulate
from gidef.errors import InputError
from gidef.types import Observation, Tensors, of_round
from gidef.updates import sign_slope

Step = Callable[[int, Tensors, Tensors], tuple[Tensors, Tensors]]
"""(t, slots, gradients) → slots, what is taken off the weights."""
DRAWS = "draws"
"""Under this name in `known`, `averaged` finds the noise of an iteration: (samples, *noise_shape)."""
MEMBERS = "members/"
"""Prefix in `known` of what the M clients of a cohort do not have in common, (M, *shape), as `cohort_mean` looks for it."""
WIDTH = 1.0
"""w of the slope that `local_adam` lends its steps, in units of mean |m̂|. Synthetic cells of 16 px, untrained small net, 250 iterations, tv 1e-2,
4 victims: in one step of one image 0.3 21.2 dB, 1 21.0, 3 16.8, 10 13.8, along the true derivative 6.7; in one step of all four 0.5 24.3; in four
steps of one each 1 15.0, 3 15.0, and 13.4 with the slope of m̂ / √(v̂ + (0.3 mean |m̂|)²)."""
ALPHA, FINAL = "alpha", "final/"
"""Of `surrogate_model`: the unknown in `known`, and the prefix there of the client's weights after its local training."""


def local_sgd(
    gradient: Simulate, *, steps: int, lr: float, momentum: float = 0.0, epochs: int = 1, moving: Collection[str] = ()
) -> Simulate:
    """A simulator of local SGD, unrolled and differentiable.

        v ← μ v + g_t(w, batch_t, noise_t),   w ← w − η v,   t = 1 … steps;   the update is w − w_server

    Args:    gradient: simulator of one step's gradient; tensors that it does not return stay as they are.
             moving: names of tensors that take the steps also where they stand in `known`, as those of a private front; the delta is of `params` alone.
             steps: in all epochs together.  lr: η > 0.  momentum: μ in [0, 1), as torch.optim.SGD.
             epochs: passes over the B images. The batches are the candidate's consecutive slices of B · epochs / steps images,
             in the same order in every epoch.
    Returns: simulate(params, known, images, labels, noise) → delta. noise has a leading axis of steps:
             (steps, B · epochs / steps, *latent), or of one epoch's, which then recurs in every epoch, or is None.
    Raises:  InputError if an argument is out of range; from `simulate`, if the images do not divide into the batches, or noise is of other steps.
    Source:  Geiping et al. 2020, arXiv:2003.14053, section 6 (federated averaging).
    """
    _check(steps, lr, epochs)
    if not 0 <= momentum < 1:
        raise InputError(f"momentum={momentum}: expected a number in [0, 1).")

    return _unrolled(gradient, _sgd(lr, momentum), steps, epochs, frozenset(moving))


def along(gradient: Callable[..., Tensors], params: Tensors, local: LocalSteps | None, *rows: Tensor) -> tuple[Tensors, list[Tensors]]:
    """The delta of local SGD in one epoch over −lr, and the weights that each step met; of `local` None the gradient.

    gradient(weights, *rows) of one step, whose rows are a slice of each of `rows`, (N, …).
    """
    if local is None:
        return gradient(params, *rows), [params]
    walked = list(_walk(gradient, _sgd(local.lr, local.momentum), params, zip(*(tensor.chunk(local.steps) for tensor in rows), strict=True)))
    return {name: sum(changes[name] for _, changes in walked) / local.lr for name in walked[0][1]}, [weights for weights, _ in walked]


def local_adam(
    gradient: Simulate, *, steps: int, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, epochs: int = 1,
    moving: Collection[str] = (), width: float | None = WIDTH,
) -> Simulate:  # fmt: skip
    """A simulator of local Adam, as `local_sgd` otherwise.

    The value is Adam's, exactly, and the slope a stand-in's, straight through, since the first steps are little more than signs:

        ∂step = ∂ η tanh(m̂ / (w · mean |m̂| + ε)),   the mean over a tensor's entries, held fixed

    Args:    lr, betas, eps: as torch.optim.Adam.
             width: w > 0; None for the true derivative, where the slope of √v at v = 0 is taken for 0 instead of ∞.
    Source:  Kingma and Ba 2015, arXiv:1412.6980; the slope as BPDA, Athalye et al. 2018, arXiv:1802.00420.
    Trap:    along the true derivative, which is nearly 0 almost everywhere, matching has little to descend. The stand-in's is not the slope of the
             objective: a search that compares values along it may stop early.
    """
    _check(steps, lr, epochs)
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps > 0):
        raise InputError(f"betas={betas}, eps={eps}: expected betas in [0, 1) and eps above 0.")
    if width is not None and not width > 0:
        raise InputError(f"width={width}: expected a number above 0, or None for the true derivative.")

    def step(t: int, slots: Tensors, gradients: Tensors) -> tuple[Tensors, Tensors]:
        slots = {
            **{f"m {name}": betas[0] * slots.get(f"m {name}", 0.0) + (1 - betas[0]) * g for name, g in gradients.items()},
            **{f"v {name}": betas[1] * slots.get(f"v {name}", 0.0) + (1 - betas[1]) * g.square() for name, g in gradients.items()},
        }
        changes = {}
        for name in gradients:
            m, v = slots[f"m {name}"] / (1 - betas[0] ** t), slots[f"v {name}"] / (1 - betas[1] ** t)
            root = torch.where(v > 0, torch.where(v > 0, v, torch.ones_like(v)).sqrt(), torch.zeros_like(v))
            exact = lr * m / (root + eps)
            changes[name] = exact if width is None else exact.detach() + lr * sign_slope(m, width * m.detach().abs().mean() + eps)
        return slots, changes

    return _unrolled(gradient, step, steps, epochs, frozenset(moving))


def _sgd(lr: float, momentum: float) -> Step:
    def step(t: int, slots: Tensors, gradients: Tensors) -> tuple[Tensors, Tensors]:
        slots = {name: momentum * slots[name] + g if slots else g for name, g in gradients.items()} if momentum else gradients
        return slots, {name: lr * slot for name, slot in slots.items()}

    return step


def _walk(gradient: Callable[..., Tensors], step: Step, weights: Tensors, batches: Iterable[tuple]) -> Iterator[tuple[Tensors, Tensors]]:
    """Of each batch, the weights that it meets and what its step takes off them."""
    slots: Tensors = {}
    for t, batch in enumerate(batches, 1):
        slots, changes = step(t, slots, gradient(weights, *batch))
        yield weights, changes
        weights = _stepped(weights, changes)


def _stepped(weights: Tensors, changes: Tensors) -> Tensors:
    return {name: tensor - changes[name] if name in changes else tensor for name, tensor in weights.items()}


def _check(steps: int, lr: float, epochs: int) -> None:
    if steps < 1 or epochs < 1 or steps % epochs or not lr > 0:
        raise InputError(f"steps={steps}, epochs={epochs}, lr={lr}: expected steps a multiple of epochs, both at least 1, and lr above 0.")


def _unrolled(
    gradient: Simulate, step: Step, steps: int, epochs: int, moving: frozenset[str]
) -> Simulate:
    """Local training as a simulator."""

    def simulate(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
        batches = steps // epochs
        if len(images) % batches:
            raise InputError(f"{len(images)} images do not divide into {batches} local batches of equal size: change the batch size or the steps.")
        if noise is not None and len(noise) not in (batches, steps):
            raise InputError(f"noise of {len(noise)} steps: expected one draw for each of {steps}, or for each of the {batches} of an epoch.")
        own = {name: tensor for name, tensor in known.items() if name in moving and name not in params}
        rest = {name: tensor for name, tensor in known.items() if name not in own}
        size, start = len(images) // batches, {**params, **own}

        def given() -> Iterator[tuple]:
            for t in range(steps):
                rows = slice((t % batches) * size, (t % batches + 1) * size)
                yield rest, images[rows], labels[rows], None if noise is None else noise[t % len(noise)]

        [(weights, changes)] = deque(_walk(gradient, step, start, given()), maxlen=1)
        weights = _stepped(weights, changes)
        return {name: weights[name] - params[name] for name in changes if name not in own}

    return simulate


def without_noise(simulate: Simulate) -> Simulate:
    """The simulator of an attacker who overlooks the noise (A0, A2)."""

    def noise_free(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
        return simulate(params, known, images, labels, None)

    if hasattr(simulate, "loss"):
        noise_free.loss = lambda params, known, images, labels, noise: simulate.loss(params, known, images, labels, None)
    return noise_free


def cohort_mean(simulate: Simulate, members: int, *, stepped: bool = False, in_turn: bool = False) -> Simulate:
    """The mean update of a cohort of M clients, as secure aggregation shows it.

    Args:    simulate: of one client.  members: M.  stepped: its noise has a leading axis of local steps.  in_turn: one client after another, for a
             simulator that draws, or that vmap does not take.
    Returns: simulate(params, known, images, labels, noise): images (M · B, C, H, W) and labels (M · B, K) stand client after client; noise is
             (M · B, *latent), or if stepped (steps, M · B / steps, *latent), in each step client after client. known: tensors under MEMBERS are one
             for each client, all others are everybody's.
    """

    def mean(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
        own = {name.removeprefix(MEMBERS): tensor for name, tensor in known.items() if name.startswith(MEMBERS)}
        common = {name: tensor for name, tensor in known.items() if not name.startswith(MEMBERS)}
        parts = [tensor.unflatten(0, (members, -1)) for tensor in (images, labels)]
        if noise is not None:
            noise = noise.unflatten(1, (members, -1)).movedim(1, 0) if stepped else noise.unflatten(0, (members, -1))

        def of_one(own: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
            return simulate(params, {**common, **own}, images, labels, noise)

        if in_turn:
            sent = [of_one({n: t[k] for n, t in own.items()}, parts[0][k], parts[1][k], None if noise is None else noise[k]) for k in range(members)]
            return {name: sum(one[name] for one in sent) / members for name in sent[0]}
        updates = vmap(of_one, in_dims=(0, 0, 0, None if noise is None else 0))(own, *parts, noise)
        return {name: tensor.mean(0) for name, tensor in updates.items()}

    return mean


def averaged(simulate: Simulate) -> Simulate:
    """The mean update over draws of the noise, which come in known["draws"] (samples, *noise_shape), fresh in every iteration (A1).

    Source:  expectation over transformation, Athalye et al. 2018, arXiv:1707.07397.
    Deviates: gradients of clients instead of logits; the noise that was really drawn is not among the attacker's, so its loss has a floor.
    """

    def mean(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
        rest = {name: tensor for name, tensor in known.items() if name != DRAWS}
        updates = vmap(lambda draw: simulate(params, rest, images, labels, draw))(known[DRAWS])
        return {name: tensor.mean(0) for name, tensor in updates.items()}

    return mean


def multi_round(simulate: Simulate, rounds: int, *, keeps_noise: bool = False) -> Simulate:
    """The updates of one batch in several rounds, each with its own weights, noise and unknowns (A9); observations by `merge_rounds`.

    Args:    keeps_noise: all rounds have the same noise.
    Returns: simulate over params, known and updates named "ROUND/name"; known tensors without a round are common to all. noise has a
             leading axis of rounds, unless it is one for all, or is None.
    """

    def every(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
        common = {name: tensor for name, tensor in known.items() if not name.partition("/")[0].isdigit()}
        found = {}
        for number in range(rounds):
            own = noise if noise is None or keeps_noise else noise[number]
            update = simulate(of_round(params, number), common | of_round(known, number), images, labels, own)
            found |= {f"{number}/{name}": tensor for name, tensor in update.items()}
        return found

    return every


def merge_rounds(observations: Sequence[Observation]) -> Observation:
    """One observation of the same batch's updates in several rounds, for `multi_round`.

    Match them with the distance `rounds_apart`: under a common cosine a round of large gradients drowns the others.
    Raises: InputError unless all have the same kind, size and labels.
    """
    first = observations[0]
    for other in observations[1:]:
        alike = (first.labels is None) == (other.labels is None) and (first.labels is None or torch.equal(first.labels, other.labels))
        if (other.num_examples, other.kind) != (first.num_examples, first.kind) or not alike:
            raise InputError("the rounds to be merged are of different batches: give updates of the same images and labels, of one kind.")
    merged = {
        place: {f"{number}/{name}": tensor for number, one in enumerate(observations) for name, tensor in getattr(one, place).items()}
        for place in ("params", "update", "known", "unmatched", "trust")
    }
    return dataclasses.replace(first, **merged, scaled=all(one.scaled for one in observations))


def rounds_apart(update: Tensors, target: Tensors, scale: Tensor, *, length: float = 0.0) -> Tensor:
    """A distance for `multi_round`: the mean over rounds of 1 − cos, so that no round drowns another. length: weight of (‖u‖ / ‖t‖ − 1)² beside it, where
    the released update's length tells something, as of labels that are searched."""
    numbers = sorted({name.partition("/")[0] for name in target})
    apart = torch.zeros_like(scale)
    for number in numbers:
        names = [name for name in target if name.startswith(f"{number}/")]
        power = sum(target[name].square().sum() for name in names)
        goal = torch.where(power > 0, power, 1.0).rsqrt()
        own = (sum((update[name] * scale).square().sum() for name in names) + 1e-12 * power + 1e-24).rsqrt() * scale
        apart = apart + 0.5 * sum((update[name] * own - target[name] * goal).square().sum() for name in names)
        if length:
            apart = apart + length * (scale * goal / own - 1).square()
    return apart / len(numbers)


def surrogate_model(gradient: Simulate) -> Simulate:
    """The delta of local training, from one gradient at a model between its first and its last weights (A10).

        ŵ = (1 − α) w_server + α w_client,   w_client − w_server ∥ −∇L(ŵ; all B images)

    Args:    gradient: simulator of one gradient.
    Returns: simulate(params, known, …) → −gradient, to be matched in direction (distance "cosine"); known["alpha"] in [0, 1] is searched
             (`Searched(start=0.5, low=0.0, high=1.0)`), known["final/NAME"] are w_client = w_server + Δ.
    Source:  Zhu, Yao and Blaschko 2023, "Surrogate model extension (SME): a fast and accurate weight update attack on federated learning", arXiv:2306.00127.
    """

    def simulate(params: Tensors, known: Tensors, images: Tensor, labels: Tensor, noise: Tensor | None) -> Tensors:
        alpha = known[ALPHA]
        between = {name: tensor + alpha * (known[FINAL + name] - tensor) for name, tensor in params.items()}
        rest = {name: tensor for name, tensor in known.items() if name != ALPHA and not name.startswith(FINAL)}
        return {name: -tensor for name, tensor in gradient(between, rest, images, labels, noise).items()}

    return simulate


def with_final_weights(observation: Observation) -> Observation:
    """The observation of a delta, with the client's last weights among what the attacker knows, for `surrogate_model`."""
    final = {FINAL + name: observation.params[name] + delta for name, delta in observation.update.items()}
    return dataclasses.replace(observation, known={**observation.known, **final})
